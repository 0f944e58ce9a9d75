"""docs/extending.md: its code is put into a copy of the tree, where the tests that it brings, and its commands, run."""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import mutants

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
# Of tests/test_layout.py: what code that is added must keep to.
RULES = (
    "test_a_module_imports_only_what_its_row_names",
    "test_steps_are_pure",
    "test_no_modules_import_each_other",
    "test_no_function_is_long",
    "test_bad_input_has_field_value_and_remedy",
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Section:
    """What the page says of one kind of thing to add."""

    title: str
    text: str

    def blocks(self, kind: str) -> list[str]:
        return [body for found, body in BLOCK.findall(self.text) if found == kind]

    @property
    def new_files(self) -> dict[str, str]:
        """By path: Python whose first line is a comment with the path of its file."""
        return {
            body.split("\n", 1)[0].removeprefix("# "): body.split("\n", 1)[1].lstrip("\n")
            for body in self.blocks("python")
            if body.startswith("# ")
        }

    @property
    def changes(self) -> dict[str, list[tuple[str, str]]]:
        """By path: the lines of each hunk of a diff before and after it."""
        found: dict[str, list[tuple[str, str]]] = {}
        for body in self.blocks("diff"):
            for file in re.split(r"^--- ", body, flags=re.MULTILINE)[1:]:
                path, *hunks = re.split(r"^@@.*\n", file, flags=re.MULTILINE)
                for hunk in hunks:
                    lines = hunk.splitlines(keepends=True)
                    before = "".join(line[1:] or "\n" for line in lines if line[:1] != "+")
                    after = "".join(line[1:] or "\n" for line in lines if line[:1] != "-")
                    found.setdefault(path.strip(), []).append((before, after))
        return found

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command with lines that it prints."""
        found: list[tuple[str, list[str]]] = []
        for body in self.blocks("console"):
            for line in body.splitlines():
                if line.startswith("$ "):
                    found.append((line.removeprefix("$ "), []))
                else:
                    found[-1][1].append(line)
        return found

    def apply(self, tree: Path) -> None:
        for name, text in self.new_files.items():
            assert not (tree / name).exists(), f"{name} is there already"
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text, encoding="utf-8")
        for name, hunks in self.changes.items():
            text = (tree / name).read_text(encoding="utf-8")
            for before, after in hunks:
                assert text.count(before) == 1, f"{name} has this {text.count(before)} times, not once:\n{before}"
                text = text.replace(before, after)
            (tree / name).write_text(text, encoding="utf-8")


SECTIONS = [
    Section(*part.split("\n", 1))
    for part in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
]
EXAMPLES = [section for section in SECTIONS if section.new_files or section.changes]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with all that the page adds: so the examples do not get in each other's way either."""
    folder = tmp_path_factory.mktemp("extended")
    mutants.copy(ROOT, folder)
    for section in EXAMPLES:
        section.apply(folder)
    return folder


def test_the_page_has_an_example_of_each():
    wanted = ["transform", "procedure", "decoder", "algorithm", "reward", "data source", "architecture"]
    titles = [section.title for section in EXAMPLES]
    assert [name for name in wanted if not any(name in title for title in titles)] == []


def test_the_table_names_the_files_that_the_examples_touch():
    page = PAGE.read_text(encoding="utf-8").split("\n## ", 1)[0]
    rows = {row[1].strip(): row[2] for row in (line.split("|") for line in page.splitlines()) if len(row) == 4}
    for section in EXAMPLES:
        row = next(files for name, files in rows.items() if name.split("](")[0].lstrip("[") == section.title)
        touched = {name for name in (*section.new_files, *section.changes) if not name.startswith("tests/")}
        assert set(re.findall(r"`([\w/.]+\.py)`", row)) == touched, section.title


def test_the_tests_that_the_page_brings_pass(tree):
    brought = [name for section in EXAMPLES for name in section.new_files if name.startswith("tests/")]
    assert len(brought) == len(EXAMPLES)
    mutants.check_import(tree)
    rules = [f"tests/test_layout.py::{rule}" for rule in RULES]
    code, printed = mutants.pytest(tree, [*brought, *rules])
    assert code == mutants.PASSED, printed


def test_the_code_of_the_page_is_formatted(tree):
    touched = sorted({name for section in EXAMPLES for name in (*section.new_files, *section.changes)})
    for check in (("check", "-q"), ("format", "-q", "--check")):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, *touched], cwd=tree, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "lines"),
    [one for section in EXAMPLES for one in section.commands],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_command_prints_what_the_page_shows(tree, command, lines):
    program, *arguments = shlex.split(command)
    assert program == "python"
    environment = {**mutants.environment(tree), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, done.stderr
    printed = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert [line for line in lines if " ".join(line.split()) not in printed] == []


def test_a_hunk_that_fits_nowhere_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\ny = 2\n", encoding="utf-8")
    section = Section("A", "```diff\n--- a.py\n@@\n x = 1\n-y = 2\n+y = 3\n```\n")
    section.apply(tmp_path)
    assert (tmp_path / "a.py").read_text(encoding="utf-8") == "x = 1\ny = 3\n"
    with pytest.raises(AssertionError, match="0 times, not once"):
        section.apply(tmp_path)
