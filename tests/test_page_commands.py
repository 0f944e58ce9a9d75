"""Every command in a shell's block of the pages is one that there is, with options that it has, and what it exports can
be exported; what Python there asks for is there."""

import ast
import inspect
import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

import ctrl_jax as cj
from ctrl_jax import __main__ as command_line
from ctrl_jax.commands.experiments import load_experiment, names
from ctrl_jax.data import scored_responses
from ctrl_jax.pipeline import export, export_reward
from ctrl_jax.runtime.stages import plain

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
ELSEWHERE = {
    "hf download": "downloads a model",
    "vllm serve": "needs a GPU",
    "sbatch": "needs a cluster",
    "for job in": "needs a cluster",
    ".ci/run": "runs this",
    "experiments/launch/": "tests/test_launch.py, with stand-ins for what needs a cloud",
    "make setup": "tests/test_makefile.py",
    "python -m benchmarks": "measures minutes",
}
"""Beginnings of commands that are not checked here, and why."""
PYTHON = {
    "library.md": "tests/test_library.py",
    "extending.md": "tests/test_extending.py",
    "data.md": "tests/test_data_page.py",
    "judging.md": "here",
    "README.md": "here",
    "serving.md": "nothing here: tests/commands/test_export.py makes its calls where transformers is installed",
}
"""Pages with blocks of Python, and what runs these."""


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each line of the shells' blocks that is a command."""
    found = []
    for page, text in PAGES.items():
        for language, block in BLOCK.findall(text):
            if language not in ("", "sh"):
                continue
            shown = "$ " in re.findall(r"^..", block)[:1]
            lines = block.replace("\\\n", " ").splitlines()
            # Where some lines have a prompt the others are what was printed.
            lines = [line[2:] for line in lines if line.startswith("$ ")] if shown else lines
            found += [(page, words) for line in lines if (words := shlex.split(line, comments=True))]
    return found


COMMANDS = [(page, words) for page, words in commands() if not " ".join(words).startswith(tuple(ELSEWHERE))]


class Read(Exception):
    """The options could be read."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The checkout's experiments, and options that are read and go no further."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)

    original = tyro.cli

    def cli(*given: Any, **options: Any) -> Any:
        original(*given, **options)
        raise Read

    monkeypatch.setattr(tyro, "cli", cli)
    return tmp_path


def write_run(folder: Path, name: str) -> None:
    """A run that a page names, as far as its options; a page may give one a name of its own."""
    made = load_experiment(name if name in names() else "bon_helpful").experiment()
    run = folder / "runs" / name
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps({**plain(made), "versions": {}}))


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else None)
def test_a_command_is_one_that_there_is(folder, page, words):
    for name in re.findall(r"runs/(\w+)", " ".join(words)):
        write_run(folder, name)
    if words[0] == "make":
        target = words[1]
        given = dict(word.split("=", 1) for word in words[2:])
        assert target in TARGETS and set(given) <= {"EXP", "ARGS", "EXTRA", "VERSIONS"}, words
        if target not in command_line.COMMANDS:
            return
        arguments = [*([given["EXP"]] if "EXP" in given else []), *shlex.split(given.get("ARGS", ""))]
    else:
        launcher, count = ("python -m ctrl_jax", 3) if words[0] == "python" else (".venv/bin/ctrl-jax", 1)
        assert " ".join(words[:count]) == launcher, f"{page}: {' '.join(words)} is neither checked nor in ELSEWHERE"
        target, *arguments = words[count:]
    if "--help" in arguments:
        arguments.remove("--help")
    if target == "export":
        form = arguments[-1] if "--format" in arguments else "merged"
        checked = load_experiment(arguments[0]).experiment()
        export_reward.check(checked, folder / "out") if form == "reward" else export.check(
            checked, folder / "out", form
        )
    module = import_module(f"ctrl_jax.commands.{target.replace('-', '_')}")
    with pytest.raises(Read):
        module.main(arguments)


def test_every_page_with_python_has_what_runs_it():
    there = {page for page, text in PAGES.items() if any(language == "python" for language, _ in BLOCK.findall(text))}
    assert there == set(PYTHON)


def test_what_the_readme_calls_is_there_and_takes_what_it_is_given():
    (block,) = (text for language, text in BLOCK.findall(PAGES["README.md"]) if language == "python")
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    checked = 0
    for call in calls:
        function = ast.unparse(call.func)
        if function.startswith("cj.") or function.split(".")[0] in ("objective", "aligned"):
            owner = {"objective": cj.Objective, "aligned": cj.Aligned, "cj": cj}[function.split(".")[0]]
            signature = inspect.signature(getattr(owner, function.split(".")[1]))
            own = [] if owner is cj else [None]
            signature.bind(*own, *call.args, **{one.arg: one.value for one in call.keywords})
            checked += 1
    assert checked > 8


def test_judgings_blocks_run(tmp_path, monkeypatch):
    first, second = (text for language, text in BLOCK.findall(PAGES["judging.md"]) if language == "python")
    random = np.random.default_rng(0)
    names = ("policy_rewards", "reference_rewards", "policy_gold", "reference_gold")
    arrays = {name: random.normal(size=(12, 64)) for name in names}
    run = tmp_path / "runs" / "bon_helpful"
    run.mkdir(parents=True)
    np.savez(run / "evaluation.npz", **arrays)
    (run / "samples.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(12)))
    monkeypatch.chdir(tmp_path)
    exec(second, {})
    for side in ("policy", "reference"):
        found = scored_responses.read(tmp_path / f"{side}.jsonl", ["rewards", "gold"], texts=False)
        np.testing.assert_array_equal(found.values["gold"], arrays[f"{side}_gold"])
    exec(first, {**arrays, "gold": arrays["policy_gold"]})
