import json
import pathlib
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from ctrl_jax.commands import report
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Evaluation
from ctrl_jax.report.status import Status
from tests.report import synthetic

NAMES = ("sampling", "best_of_2", "best_of_4", "worst_of_2", "worst_of_4")
FIGURES = {
    "calibration", "margins", "proxy_gold", "reliability", "response_length", "training", "validation",
    "win_rate_vs_kl", "win_rate_vs_n",
}  # fmt: skip
KINDS = ("png", "svg", "pdf", "csv")


def evaluation(index: pathlib.Path) -> Evaluation:
    tree = json.loads((index.parents[1] / "evaluation.json").read_text())
    return Evaluation.from_json(tree, source="evaluation.json", remedy="")


def files(figures: set[str]) -> set[str]:
    return {f"{figure}.{kind}" for figure in figures for kind in KINDS}


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return report.write(synthetic.write_work_dir(tmp_path_factory.mktemp("runs") / "bon_helpful", names=NAMES))


def test_a_report_has_its_page_and_its_pictures(index: pathlib.Path) -> None:
    assert index.parts[-3:] == ("bon_helpful", "report", "index.html")
    assert index.stat().st_size < 1_500_000
    assert {path.name for path in (index.parent / "figures").iterdir()} == files(FIGURES)
    headline = index.parent / "headline.png"
    assert headline.stat().st_size < 300_000
    with Image.open(headline) as picture:
        assert picture.width > 2.5 * picture.height
    assert {path.name for path in index.parent.iterdir()} == {"index.html", "headline.png", "figures"}


def test_a_report_of_less_leaves_no_stale_picture(tmp_path: pathlib.Path) -> None:
    work_dir = synthetic.write_work_dir(tmp_path / "bare", gold=False, transform="identity", names=NAMES[:3])
    (work_dir / "metrics.jsonl").unlink()
    synthetic.seal(work_dir)
    figures = work_dir / "report" / "figures"
    figures.mkdir(parents=True)
    for kind in KINDS:
        (figures / f"training.{kind}").touch()
    index = report.write(work_dir)
    missing = {"proxy_gold", "training"}
    assert {path.name for path in (index.parent / "figures").iterdir()} == files(FIGURES - missing)


def test_nothing_is_written_before_all_is_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(synthetic.config("bon", "identity", "best_of_4", NAMES)))
    with pytest.raises(InputError, match=r"evaluation\.json is missing; `make evaluate`"):
        report.write(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation.npz", "samples.jsonl", "metrics.jsonl", "config.json"])
def test_a_file_of_another_run_is_refused(index: pathlib.Path, tmp_path: pathlib.Path, name: str) -> None:
    """Each file is whole, and good for a report of its own run."""
    mine = pathlib.Path(shutil.copytree(index.parents[1], tmp_path / "mine"))
    other = synthetic.write_work_dir(tmp_path / "other", transform="identity", seed=1, names=NAMES)
    shutil.copy(other / name, mine / name)
    page = (mine / "report" / "index.html").read_bytes()
    with pytest.raises(InputError, match=rf"{mine / name} is .*The same `train` command .*policy is kept"):
        report.write(mine)
    assert (mine / "report" / "index.html").read_bytes() == page


@pytest.mark.parametrize("contents", [None, "{}", "[" * 100_000])
def test_results_without_their_seal_are_refused(index: pathlib.Path, tmp_path: pathlib.Path, contents: str) -> None:
    work_dir = pathlib.Path(shutil.copytree(index.parents[1], tmp_path / "run"))
    if contents is None:
        (work_dir / "results.json").unlink()
    else:
        (work_dir / "results.json").write_text(contents)
    with pytest.raises(InputError, match=r"results\.json is missing or not what was written"):
        report.write(work_dir)


def test_a_sweep_is_written_with_its_picture(index: pathlib.Path, tmp_path: pathlib.Path) -> None:
    point = Status("later", "exponential(10)", "best_of_4", 0.75, "missing")
    path = report.write_sweep_report(
        tmp_path / "bon",
        [
            replace(point, name="good", state="done", evaluation=evaluation(index), report="good/report/index.html"),
            replace(point, name="diverged", state="failed", reason="evaluation.json of diverged has nan at ties."),
            point,
        ],
        {},
        [],
        [],
    )
    assert path == tmp_path / "bon" / "sweep.html"
    for kind in KINDS:
        assert 0 < (tmp_path / "bon" / f"pareto_best_of_4.{kind}").stat().st_size < 300_000
    text = path.read_text()
    assert 'href="good/report/index.html"' in text
    assert "1 of 3 runs evaluated" in text
    assert "diverged failed: evaluation.json of diverged has nan at ties." in text
    rows = re.findall(r"<tr><td.*?</tr>", text, flags=re.DOTALL)
    assert [re.findall(r"done|failed|missing", row)[0] for row in rows] == ["done", "failed", "missing"]


PROBE = """(() => {
    const all = Array.from(document.querySelectorAll("svg.chart text"));
    const paper = getComputedStyle(document.body);
    return {
        inner: innerWidth, scroll: document.documentElement.scrollWidth,
        paper: paper.backgroundColor, ink: paper.color,
        drawn: getComputedStyle(all[0]).fill, small: Math.min(...all.map(t => t.getBoundingClientRect().height))};
})()"""


@pytest.mark.parametrize(("width", "dark"), [(375, False), (375, True), (1200, False)])
def test_a_browser_shows_it_without_errors_and_without_scrolling_sideways(
    index: pathlib.Path, open_page: Callable[..., Any], width: int, dark: bool
) -> None:
    seen = open_page(index.as_uri(), width=width, dark=dark).evaluate(PROBE)
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert seen["small"] >= 9

    def brightness(color: str) -> float:
        return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3

    paper, ink, drawn = (brightness(seen[name]) for name in ("paper", "ink", "drawn"))
    assert (paper < 60 and ink > 180 and drawn > 120) if dark else (paper > 200 and ink < 80 and drawn < 130)


@pytest.mark.parametrize("width", [390, 1100])
def test_a_word_explains_itself_to_the_keyboard_within_the_window(
    index: pathlib.Path, open_page: Callable[..., Any], width: int
) -> None:
    page = open_page(index.as_uri(), width=width)
    page.keyboard.press("Tab")
    style = "getComputedStyle(document.activeElement, '::after')"
    assert page.evaluate("document.activeElement.className") == "term"
    tip = page.evaluate("document.activeElement.dataset.tip")
    assert tip in page.evaluate(f"{style}.content")
    assert page.evaluate(f"[{style}.position, {style}.display]") == ["fixed", "block"]
    described = "document.getElementById(document.activeElement.getAttribute('aria-describedby')).textContent"
    assert page.evaluate(described) == tip
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.evaluate("document.querySelector('details.configuration').open")


def test_the_table_of_a_sweep_fits_a_window_and_starts_with_the_states(
    index: pathlib.Path, open_page: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    running = Status("exponential(10)_kl1", "exponential(10)", "best_of_4", 1.0, "running")
    done = replace(running, name="exponential(10)_kl0.75", kl_budget=0.75, state="done", evaluation=evaluation(index))
    points = [done, running]
    path = report.write_sweep_report(tmp_path, points, {}, [], [])
    for width in (390, 1100):
        page = open_page(path.as_uri(), width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        firsts = "Array.from(document.querySelectorAll('tbody tr'), row => row.children[0].textContent)"
        assert page.evaluate(firsts) == ["done", "running"]
    assert (
        page.evaluate("(() => {const t = document.querySelector('.scroll'); return t.scrollWidth - t.clientWidth})()")
        == 0
    )
