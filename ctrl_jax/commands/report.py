"""Pages to read and pictures for talks of what a run or a sweep measured."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

from ctrl_jax.commands.options import Options as RunOptions
from ctrl_jax.commands.options import read
from ctrl_jax.pipeline import results
from ctrl_jax.report import pictures, run_page, sweep_page, table
from ctrl_jax.report.charts import CHARTS, headline
from ctrl_jax.report.comparison import Comparison
from ctrl_jax.report.measurements import Run, read_run
from ctrl_jax.report.methods import AtEqualKl
from ctrl_jax.report.names import spoken
from ctrl_jax.report.overoptimization import Method
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.panels import along, equal_kl, overoptimization, pareto
from ctrl_jax.report.statistics import lift_share
from ctrl_jax.report.status import Status
from ctrl_jax.runtime.stages import write_bytes

PICTURES = ("png", "svg", "pdf")


@dataclasses.dataclass(frozen=True)
class Options(RunOptions):
    @property
    def needs_stages(self) -> bool:
        return False


def main(arguments: list[str]) -> int:
    asked = read("report", Options, arguments)
    from ctrl_jax.commands import summary
    from ctrl_jax.commands.launch import started
    from ctrl_jax.runtime import hosts

    with started(asked):
        if hosts.first():
            summary.print_report(write(asked.work_dir))
    return 0


def write(work_dir: pathlib.Path) -> pathlib.Path:
    """Write `report/` of a work directory and return the path of its index.html.

    Beside the page: `headline.png`, one wide picture for a README, and under `figures/` each figure as PNG, SVG and PDF
    on a transparent ground, with the numbers that it draws as CSV. Raises InputError where a required file is missing
    or corrupt.
    """
    results.check(work_dir)
    measured = read_run(work_dir)
    report_dir = work_dir / "report"
    charts = {name: panels(measured) for name, panels in CHARTS.items()}
    for name, panels in charts.items():
        for kind in (*PICTURES, "csv"):
            (report_dir / "figures" / f"{name}.{kind}").unlink(missing_ok=True)
        if panels:
            _write_figure(report_dir / "figures" / name, panels, columns=2)
    picture = pictures.draw(
        headline(measured), ("png",), columns=3, title=_headline(measured), ground="white", dots_per_inch=130
    )
    write_bytes(report_dir / "headline.png", picture["png"])
    index = report_dir / "index.html"
    write_bytes(index, run_page.render(measured).encode())
    return index


COLUMNS = 3
"""Panels beside each other in a picture of several."""


def write_sweep_report(
    sweep_dir: pathlib.Path,
    points: Sequence[Status],
    runs: Mapping[str, Run],
    comparisons: Sequence[Comparison],
    notes: Sequence[str],
    at_equal_kl: Sequence[AtEqualKl] = (),
    laws: Sequence[Method] = (),
) -> pathlib.Path:
    """Writes the page and the figures of a sweep into its directory; returns the page's path.

    The figures are `pareto_<procedure>.{png,svg,pdf,csv}`, `along_<procedure>` where trainings were measured on their
    way, `equal_kl_<procedure>` of several methods, and `overoptimization` where a gold reward judges several policies
    of one method.

    Args:
      sweep_dir: of the sweep.
      points: all, with their states; below the table stands why some failed.
      runs: what the points that are done measured, by their names.
      comparisons: of points with the baseline.
      notes: why others are not compared.
      at_equal_kl: of methods with several points each.
      laws: of methods with enough points that a gold reward judges.
    """
    notes = [*(f"{point.name} failed: {point.reason}" for point in points if point.reason), *notes]
    curves: list[Panel] = []
    beside: list[Panel] = []
    for procedure in dict.fromkeys(point.procedure for point in points):
        figures = {
            "pareto": pareto.panels([point for point in points if point.procedure == procedure], procedure),
            "along": along.panels(runs, procedure),
            "equal_kl": equal_kl.panels(at_equal_kl, procedure),
        }
        curves += figures["along"]
        beside += figures["equal_kl"]
        for kind, panels in figures.items():
            if panels:
                name = f"{kind}_{re.sub(r'[^A-Za-z0-9_.-]+', '_', procedure)}"
                _write_figure(sweep_dir / name, panels, columns=min(COLUMNS, len(panels)))
    if gains := overoptimization.panels(laws):
        _write_figure(sweep_dir / "overoptimization", gains, columns=COLUMNS)
    index = sweep_dir / "sweep.html"
    page = sweep_page.render(sweep_dir.name, points, notes, comparisons, curves, at_equal_kl, gains, laws, beside)
    write_bytes(index, page.encode())
    return index


def _write_figure(path: pathlib.Path, panels: Sequence[Panel], *, columns: int) -> None:
    """`path` with the endings of the pictures and of their numbers."""
    for kind, picture in pictures.draw(panels, PICTURES, columns=columns).items():
        write_bytes(path.with_name(f"{path.name}.{kind}"), picture)
    write_bytes(path.with_name(f"{path.name}.csv"), table.of_panels(panels).encode())


def _headline(measured: Run) -> str:
    estimate, ideal = (
        measured.evaluation.win_rates[measured.procedure],
        measured.evaluation.ideal.get(measured.procedure),
    )
    share = lift_share(estimate.mean, ideal.transform if ideal else None)
    return (
        f"{spoken(measured.procedure).capitalize()} win rate {100 * estimate.mean:.1f} % "
        + (
            ""
            if estimate.low is None or estimate.high is None
            else f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}] "
        )
        + f"at {measured.evaluation.kl.mean:.2f} nats"
        + (f", {100 * share:.0f} % of the ideal lift of {measured.transform}" if share is not None else "")
    )
