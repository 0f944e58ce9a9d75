"""What the documents point at is there."""

import re
import runpy
from pathlib import Path

import pytest

import ctrl_jax

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "faults.md").read_text())


def test_every_fault_names_its_test():
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.count("|") == 6]
    assert len(rows) > 15
    assert all("`tests/" in row for row in rows[2:])


@pytest.mark.parametrize(("path", "test"), NAMED)
def test_a_test_that_is_named_exists(path, test):
    assert f"def {test}(" in (ROOT / path).read_text()


def test_the_site_has_a_place_for_every_page_and_every_public_name():
    conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    contents, reference = conf["contents"](), conf["reference"]()
    assert all(f"\n{page.stem}\n" in contents for page in (ROOT / "docs").glob("*.md") if page.stem != "index")
    assert all(f":: ctrl_jax.{name}\n" in reference for name in ctrl_jax.__all__)


def test_every_figure_of_the_theory_is_drawn_by_the_build():
    page = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    drawn = runpy.run_path(str(ROOT / "docs" / "theory_figures.py"))["FIGURES"]
    assert set(re.findall(r"\(theory/(\w+)\.svg\)", page)) == set(drawn)
    assert {path.stem for path in (ROOT / "docs" / "theory").iterdir()} == set(drawn)


def test_the_citation_is_of_this_version():
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert version == ctrl_jax.__version__


@pytest.mark.parametrize(
    "page", sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]), ids=lambda page: page.name
)
def test_what_a_page_points_to_is_there(page):
    """Files and folders, and the headings of pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        if "://" in target:
            continue
        other = (page.parent / path) if path else page
        assert other.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings]
            assert heading in anchors, target
