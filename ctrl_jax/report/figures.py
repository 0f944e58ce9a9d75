"""The report's figures: panels that draw themselves on an Axes, and the ways they leave the program.

A panel becomes an inline SVG whose colours are CSS variables, so that one drawing serves light and dark pages, joins
others in a picture for talks and papers (PNG, SVG, PDF), or gives the numbers that it draws as CSV. Colours have roles
(`PALETTE`), not places; they are told apart by colour-blind readers, and lines also by their dashes, points by their
shapes. Win rates are drawn in percent.
"""

import csv
import functools
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager, lines, patches, ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ctrl_jax.errors import InputError
from ctrl_jax.report.measurements import RELIABILITY_ARRAYS, Estimate, Evaluation, Run, wilson
from ctrl_jax.theory import procedures
from ctrl_jax.theory.objective import Ideal, Objective


@dataclass(frozen=True)
class Color:
    light: str
    dark: str


# Every light value is unique: `svg` finds a colour's role by it.
PALETTE = {
    "ink": Color("#1d2430", "#e8eaee"),
    "muted": Color("#5c6675", "#9aa5b4"),
    "rule": Color("#d9dde3", "#343c48"),
    "surface": Color("#fefefe", "#171b22"),
    "policy": Color("#0067a8", "#5db5ee"),
    "reference": Color("#98a1ad", "#7b8696"),
    "gold": Color("#c2570c", "#f0924c"),
    "green": Color("#00805f", "#2fc79b"),
    "pink": Color("#b0568c", "#e39bc6"),
    "sky": Color("#3fa0d8", "#a5d8f8"),
    "amber": Color("#b8860b", "#e8c468"),
}

FONTS = ("Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans")
ENDS = ("low", "high")
Y_AXIS = "y axis"
"""Marks the text that stands above a panel in place of its vertical axis's label."""
PANEL_SIZE = (4.2, 2.95)
"""Inches, at font sizes that stay legible when a phone shows the panel 340 pixels wide."""


@dataclass(frozen=True)
class Panel:
    title: str
    description: str
    """What the panel shows, for those who cannot see it."""
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Point:
    """One run of a sweep; `evaluation` is None until it is done."""

    name: str
    transform: str
    procedure: str
    kl_budget: float
    state: str
    evaluation: Evaluation | None = None
    report: str | None = None


def svg(panel: Panel, identifier: str) -> str:
    """The panel as an <svg> element to stand in HTML: colours as CSS variables, the page's font, ids of its own."""
    with mpl.rc_context(_style() | {"svg.fonttype": "none", "svg.hashsalt": identifier}):
        figure = Figure(figsize=PANEL_SIZE, layout="constrained")
        figure.patch.set_alpha(0)
        panel.draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The prologue, metadata and name spaces carry the only URLs; HTML needs none of them.
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{identifier}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{identifier}-", text)
    # The page names the fonts, and the text keeps its size.
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for role, color in PALETTE.items():
        text = text.replace(color.light, f"var(--{role})")
    width, height = (round(72 * inches, 2) for inches in PANEL_SIZE)
    opening = (
        f'<svg class="chart" role="img" aria-labelledby="{identifier}-title" viewBox="0 0 {width} {height}">'
        f'<title id="{identifier}-title">{_escape(panel.title)}: {_escape(panel.description)}</title>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)


def pictures(
    panels: Sequence[Panel],
    formats: Sequence[str],
    *,
    columns: int,
    title: str = "",
    ground: str = "none",
    dots_per_inch: int = 200,
) -> dict[str, bytes]:
    """The panels, each under its title, as one picture of `columns` columns in each of the formats png, svg and pdf.

    Ink is dark; the ground is transparent unless a colour is given. The same panels give the same bytes.
    """
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    # Text of a PDF stays text, in TrueType, as journals ask; that of an SVG becomes paths, which need no fonts.
    with mpl.rc_context(_style() | {"svg.hashsalt": title or panels[0].title, "pdf.fonttype": 42}):
        figure = Figure(
            figsize=(PANEL_SIZE[0] * columns, (PANEL_SIZE[1] + 0.3) * rows + (0.4 if title else 0)),
            layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
        )
        if title:
            figure.suptitle(title, x=0.008, ha="left", fontsize=12.5, fontweight="bold", color=_light("ink"))
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.patch.set_alpha(0)
            panel.draw(axes)
            axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=_light("ink"), pad=23)
        undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        drawn = {}
        for kind in formats:
            buffer = io.BytesIO()
            FigureCanvasAgg(figure).print_figure(
                buffer, format=kind, dpi=dots_per_inch, facecolor=ground, metadata=undated[kind]
            )
            drawn[kind] = buffer.getvalue()
    return drawn


TABLE_COLUMNS = ("panel", "series", "x", "y", "x_low", "x_high", "y_low", "y_high", "x_axis", "y_axis")


def table(panels: Sequence[Panel]) -> str:
    """The numbers that the panels draw, in the units of their axes, as CSV: a row for each point of each series."""
    text = io.StringIO()
    writer = csv.DictWriter(text, TABLE_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for panel in panels:
        with mpl.rc_context(_style()):
            figure = Figure(figsize=PANEL_SIZE)
            panel.draw(figure.add_subplot())
        for axes in (figure.axes[0], *figure.axes[0].child_axes):
            assert isinstance(axes, Axes)
            y_axis = next((text.get_text() for text in axes.texts if text.get_gid() == Y_AXIS), axes.get_ylabel())
            about = {"panel": panel.title, "x_axis": axes.get_xlabel(), "y_axis": y_axis}
            for row in _rows(axes):
                named = {key: _named(axes, key, value) for key, value in row.items()}
                writer.writerow(about | named)
    return text.getvalue()


def _rows(axes: Axes) -> Iterator[dict[str, Any]]:
    """Of all artists with a label: points with their intervals, lines, histograms and bars."""
    within = set()
    for container in axes.containers:
        series = str(container.get_label())
        if isinstance(container, ErrorbarContainer):
            points, _, bars = container.lines
            within |= {points}
            sides = [side for side, has in (("x", container.has_xerr), ("y", container.has_yerr)) if has]
            ends = {
                side: np.array(bar.get_segments())[:, :, "xy".index(side)]
                for side, bar in zip(sides, bars, strict=True)
            }
            for index, (x, y) in enumerate(np.asarray(points.get_xydata())):
                bounds = {f"{side}_{end}": of[index, i] for side, of in ends.items() for i, end in enumerate(ENDS)}
                yield {"series": series, "x": x, "y": y, **bounds}
        elif isinstance(container, BarContainer):
            for bar in container.patches:
                low = bar.get_x()
                yield {"series": series, "x_low": low, "x_high": low + bar.get_width(), "y": bar.get_height()}
    for line in axes.lines:
        if line not in within and _has_name(line):
            for x, y in np.asarray(line.get_xydata()):
                yield {"series": line.get_label(), "x": x, "y": y}
    for patch in axes.patches:
        if isinstance(patch, patches.StepPatch) and _has_name(patch):
            values, edges, _ = patch.get_data()
            for index, value in enumerate(values):
                yield {"series": patch.get_label(), "x_low": edges[index], "x_high": edges[index + 1], "y": value}


def _has_name(artist: Artist) -> bool:
    """Whether its label was given; Matplotlib's own begin with an underscore."""
    label = str(artist.get_label())
    return bool(label) and not label.startswith("_")


def _named(axes: Axes, key: str, value: Any) -> Any:
    """A place on an axis whose ticks have names, such as procedures or the N of a logarithm, by its name."""
    if key == "series":
        return value
    axis = axes.xaxis if key.startswith("x") else axes.yaxis
    formatter = axis.get_major_formatter()
    name = formatter(float(value)) if isinstance(formatter, ticker.FuncFormatter) else ""
    return name or f"{value:.6g}"


def win_rate_vs_n(run: Run) -> list[Panel]:
    """Best-of-N and worst-of-N win rates over N, the ideal policies at the measured KL behind them."""
    return [
        panel
        for panel in (_family(run, "best_of", "Best-of-N decoding"), _family(run, "worst_of", "Worst-of-N decoding"))
        if panel is not None
    ]


def training(run: Run) -> list[Panel]:
    """KL against its budget, win rate, calibrated reward, β and response length over the steps of policy training."""
    if "step" not in run.metrics:
        return []
    budget = run.evaluation.kl_budget
    panels = [
        ("kl", "KL from the reference", "nats per response", 1.0, budget, "budget"),
        ("win_rate", f"Win rate under {spoken(run.procedure)}", "% against the reference", 100.0, None, ""),
        ("calibrated_reward", "Calibrated reward", "mean rank among the reference's rewards", 1.0, 0.5, "reference"),
        ("beta", "Weight of the KL, β", "against Φ on [0, 1]; log scale", 1.0, None, ""),
        ("response_length", "Response length", "tokens, mean over rollouts", 1.0, None, ""),
        ("unfinished", "Unfinished responses", "% without an end within the longest length", 100.0, None, ""),
    ]  # fmt: skip
    return [
        Panel(
            title,
            f"{unit} over {len(run.metrics['step'])} training steps, "
            f"ending at {_last(run.metrics[column]) * scale:.4g}.",
            functools.partial(_draw_curve, run, column, unit, scale, level, level_name),
        )
        for column, title, unit, scale, level, level_name in panels
        if np.isfinite(run.metrics.get(column, np.array([]))).any()
    ]


def calibration(run: Run) -> list[Panel]:
    """Calibrated rewards of reference and policy, under the density of the ideal policy at the measured KL."""
    policy, reference = run.arrays["policy_calibrated"], run.arrays["reference_calibrated"]
    return [
        Panel(
            "Calibrated rewards",
            f"Density; mean {reference.mean():.3f} for the reference, {policy.mean():.3f} for the policy.",
            functools.partial(_draw_calibration, run),
        )
    ]


def reliability(run: Run) -> list[Panel]:
    """How often the reward model's preferred response is the chosen one, by how sure the model is."""
    quality = run.evaluation.reward_model
    if quality.accuracy is None or quality.ece is None or not set(RELIABILITY_ARRAYS) <= run.arrays.keys():
        return []
    return [
        Panel(
            "Reward model's reliability",
            f"Observed against predicted preference; accuracy {quality.accuracy:.3f}, "
            f"expected calibration error {quality.ece:.3f}.",
            functools.partial(_draw_reliability, run),
        )
    ]


def lengths(run: Run) -> list[Panel]:
    """How long the responses to test prompts are, policy and reference."""
    if not {"policy_lengths", "reference_lengths"} <= run.arrays.keys():
        return []
    policy, reference = (run.arrays[f"{side}_lengths"].mean() for side in ("policy", "reference"))
    return [
        Panel(
            "Response length",
            f"Share of responses by their tokens; mean {policy:.1f} for the policy, {reference:.1f} for the reference.",
            functools.partial(_draw_lengths, run),
        )
    ]


def proxy_gold(run: Run) -> list[Panel]:
    """The training reward against other judges: win rates by procedure, and gold rank by the reward's rank."""
    panels = []
    others = [name for name, *_ in _judges(run)[1:]]
    if others:
        panels.append(
            Panel(
                "Win rates of the same picks, by who judges",
                f"The training reward's picks, judged by itself and by {' and '.join(others)}, procedure by procedure.",
                functools.partial(_draw_dumbbells, run),
            )
        )
    if {"policy_gold", "reference_gold"} <= run.arrays.keys():
        panels.append(
            Panel(
                "Gold rank at each proxy rank",
                "Mean calibrated gold reward of responses binned by their calibrated reward, policy and reference.",
                functools.partial(_draw_gold_by_proxy, run),
            )
        )
    return panels


def _judges(run: Run) -> list[tuple[str, Mapping[str, Estimate], str, str, float]]:
    """(name, win rates, colour, mark, its size) of each judge; larger marks first, so that equal ones stay visible."""
    evaluation = run.evaluation
    judges = [
        ("training reward", evaluation.win_rates, "policy", "o", 8.0),
        ("gold", evaluation.gold_win_rates, "gold", "D", 5.0),
        (short_name(evaluation.judge), evaluation.judge_win_rates, "green", "^", 4.5),
    ]
    return [judge for judge in judges if judge[1]]


def short_name(judge: str | None) -> str:
    """`rewards:brevity` as brevity, and a directory by its last part."""
    name = re.split(r"[:/\\]", (judge or "judge").rstrip("/"))[-1] or "judge"
    return name if len(name) <= 24 else f"{name[:23]}…"


def frontier(run: Run) -> list[Panel]:
    """The run in the plane of win rate against KL: its training path and its test point over the ideal curves."""
    return [
        Panel(
            f"Win rate under {spoken(run.procedure)} against KL",
            f"Measured on test prompts: {_percent(run.evaluation.win_rates[run.procedure].mean)} at "
            f"{run.evaluation.kl.mean:.3f} nats per response.",
            functools.partial(_draw_frontier, run),
        )
    ]


def pareto(points: Sequence[Point], procedure: str) -> list[Panel]:
    """A sweep's measured points with intervals in both directions, over the ideal curves of their transforms."""
    measured = [point for point in points if point.evaluation and procedure in point.evaluation.win_rates]
    if not measured:
        return []
    return [
        Panel(
            f"Win rate under {spoken(procedure)} against KL",
            f"{len(measured)} runs with 95 % intervals over the ideal curves of their transforms.",
            functools.partial(_draw_pareto, measured, procedure),
        )
    ]


def headline(run: Run) -> list[Panel]:
    """The three panels that tell the run's story."""
    family = "worst_of" if run.procedure.startswith("worst_of") else "best_of"
    by_n = _family(run, family, f"{spoken(family).capitalize()}-N decoding")
    return [*frontier(run), *([by_n] if by_n else []), *calibration(run)]


def spoken(procedure: str) -> str:
    """`best_of_4` as people say it: best-of-4."""
    return procedure.replace("_", "-")


# ---- panels


def _family(run: Run, family: str, title: str) -> Panel | None:
    sizes = {1: "sampling"} | {
        int(name.removeprefix(f"{family}_")): name
        for name in run.evaluation.win_rates
        if re.fullmatch(rf"{family}_\d+", name)
    }
    if len(sizes) < 2:
        return None
    largest = sizes[max(sizes)]
    return Panel(
        title,
        f"Win rate over N, from {_percent(run.evaluation.win_rates['sampling'].mean)} for one sample to "
        f"{_percent(run.evaluation.win_rates[largest].mean)} at N = {max(sizes)}.",
        functools.partial(_draw_family, run, dict(sorted(sizes.items()))),
    )


def _draw_family(run: Run, sizes: Mapping[int, str], axes: Axes) -> None:
    where = np.log2(list(sizes))
    labels = []
    theory = (
        ("optimal", "best possible", "ink", (0, (1, 1.6))),
        ("transform", f"ideal {run.transform}", "policy", (0, (5, 2))),
        ("identity", "ideal identity", "reference", (0, (5, 2))),
    )
    for field, text, color, dashes in theory:
        if field == "transform" and run.transform in ("identity", "optimal"):
            continue
        heights = np.array(
            [
                np.nan if (known := run.evaluation.ideal.get(name)) is None or getattr(known, field) is None
                else 100 * getattr(known, field)
                for name in sizes.values()
            ]
        )  # fmt: skip
        if np.isfinite(heights).any():
            axes.plot(where, heights, color=_light(color), linewidth=1.2, linestyle=dashes, zorder=2, label=text)
            labels.append((float(heights[np.isfinite(heights)][-1]), text, color))
    estimates = [run.evaluation.win_rates[name] for name in sizes.values()]
    axes.errorbar(
        where, [100 * e.mean for e in estimates], yerr=_distances(estimates), fmt="o-", markersize=5.5, linewidth=1.8,
        elinewidth=1.4, color=_light("policy"), **_edge(), zorder=4, label="policy",
    )  # fmt: skip
    labels.append((100 * estimates[-1].mean, "policy", "policy"))
    if run.procedure in sizes.values():
        n = next(n for n, name in sizes.items() if name == run.procedure)
        axes.axvline(np.log2(n), color=_light("rule"), linewidth=8, zorder=0)
        side = -1 if n == max(sizes) else 1
        axes.annotate(
            "trained for", (np.log2(n), 0), xycoords=("data", "axes fraction"), xytext=(7 * side, 4),
            textcoords="offset points", ha="right" if side < 0 else "left", color=_light("muted"), fontsize=8,
        )  # fmt: skip
    axes.set_xticks(where, [str(n) for n in sizes])
    axes.set_xlabel("N responses a prompt, on both sides")
    axes.margins(x=0.04)
    _above(axes, "win rate against the reference, %")
    _label_ends(axes, labels)


def _draw_curve(
    run: Run, column: str, unit: str, scale: float, level: float | None, level_name: str, axes: Axes
) -> None:
    steps, values = run.metrics["step"], run.metrics[column] * scale
    if column == "kl" and "kl_standard_error" in run.metrics:
        half = 1.96 * run.metrics["kl_standard_error"]
        axes.fill_between(steps, values - half, values + half, color=_light("policy"), alpha=0.15, linewidth=0)
        for end, bound in zip(ENDS, (values - half, values + half), strict=True):
            axes.plot(steps, bound, linewidth=0, label=f"95 % interval, {end}")
    if column != "beta":
        axes.plot(steps, values, color=_light("policy"), linewidth=0.8, alpha=0.4, label="every step")
        values = _smooth(values)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    label = "every step" if column == "beta" else "moving mean"
    axes.plot(steps, values, color=_light("policy"), linewidth=1.8, label=label)
    if level is not None:
        axes.axhline(level, color=_light("muted"), linewidth=1, linestyle=(0, (4, 2)))
        axes.annotate(
            f"{level_name}\n{level:g}", (1, level), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", color=_light("muted"), fontsize=8.5, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.margins(x=0.01)
    if column == "kl":
        axes.set_ylim(bottom=0)
    _above(axes, unit)


def _draw_calibration(run: Run, axes: Axes) -> None:
    edges = np.linspace(0, 1, 21)
    handles: list[Artist] = []
    for name, color, alpha in (("reference", "reference", 0.4), ("policy", "policy", 0.28)):
        calibrated = run.arrays[f"{name}_calibrated"]
        # The reference's are calibrated against the others of their prompt.
        references = run.arrays["reference_rewards"].shape[1] - (name == "reference")
        ranks = _spread(calibrated, references=references)
        density, _ = np.histogram(ranks, edges, density=True)
        axes.stairs(density, edges, fill=True, color=_light(color), alpha=alpha, linewidth=0)
        axes.stairs(density, edges, color=_light(color), linewidth=1.3, label=name)
        handles.append(patches.Patch(facecolor=_light(color), alpha=1.6 * alpha, label=name))
    kl = run.evaluation.kl.mean
    policy = _ideal_policy(run.transform, run.procedure, kl)
    if policy is not None:
        # In the histogram's own bins: a density that doubles within a bin cannot be compared with one that is averaged.
        density = np.diff(np.asarray(policy.policy.cdf(edges), float)) / np.diff(edges)
        axes.stairs(
            density, edges, color=_light("ink"), linewidth=1.4, linestyle=(0, (3, 1.5)), baseline=None,
            label=f"ideal {run.transform}",
        )  # fmt: skip
        handles.append(
            lines.Line2D(
                [],
                [],
                color=_light("ink"),
                linewidth=1.4,
                linestyle=(0, (3, 1.5)),
                label=f"ideal {run.transform}\nat {kl:.2f} nats",
            )
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.legend(handles=handles, loc="best", handlelength=1.6)
    axes.set_xlabel("calibrated reward: rank among the reference's rewards")
    _above(axes, "density over test prompts")


def _draw_reliability(run: Run, axes: Axes) -> None:
    predicted, observed, count = (run.arrays[f"reliability_{name}"] for name in ("predicted", "observed", "count"))
    # Each pair counts in both orders, so that the diagram is its own image about (½, ½): half of it says all.
    kept = (count > 0) & np.isfinite(predicted) & np.isfinite(observed) & (predicted >= 0.5)
    predicted, observed, count = predicted[kept], observed[kept], count[kept]
    low, high = wilson(observed, count)
    axes.plot([0.5, 1], [0.5, 1], color=_light("muted"), linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate(
        "as sure as right", (0.72, 0.72), xytext=(-8, 6), textcoords="offset points", ha="right",
        color=_light("muted"), fontsize=8,
    )  # fmt: skip
    axes.errorbar(
        predicted, observed, yerr=[np.maximum(observed - low, 0), np.maximum(high - observed, 0)], fmt="o-",
        markersize=4.5, linewidth=1.4, elinewidth=1.2, color=_light("policy"), **_edge(), label="observed",
    )  # fmt: skip
    lowest = float(low.min()) if low.size else 0.5
    axes.set_xlim(0.5, 1.005)
    axes.set_ylim(min(0.5, math.floor(10 * lowest) / 10), 1.01)
    axes.yaxis.set_major_locator(ticker.MultipleLocator(0.1))
    axes.tick_params(labelbottom=False)
    _above(axes, "share in which it is preferred, with 95 % intervals")
    counts = axes.inset_axes((0, -0.34, 1, 0.24), sharex=axes)
    left = np.minimum(np.floor(predicted * 10), 9) / 10
    counts.bar(left + 0.05, count, width=0.08, color=_light("reference"), label="pairs")
    counts.patch.set_alpha(0)
    counts.yaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
    counts.set_xlabel("predicted probability that a response is preferred")
    counts.set_ylabel("pairs", fontsize=8, color=_light("muted"))
    counts.grid(False)


def _draw_lengths(run: Run, axes: Axes) -> None:
    longest = int(max(run.arrays[f"{side}_lengths"].max() for side in ("policy", "reference")))
    width = -(-longest // 40)
    edges = np.arange(0.5, longest + width + 0.5, width)
    handles = []
    for name, color, alpha in (("reference", "reference", 0.4), ("policy", "policy", 0.28)):
        tokens = run.arrays[f"{name}_lengths"]
        shares = 100 * np.histogram(tokens, edges)[0] / tokens.size
        axes.stairs(shares, edges, fill=True, color=_light(color), alpha=alpha, linewidth=0)
        axes.stairs(shares, edges, color=_light(color), linewidth=1.3, label=name)
        handles.append(patches.Patch(facecolor=_light(color), alpha=1.6 * alpha, label=name))
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(bottom=0)
    axes.legend(handles=handles, loc="best", handlelength=1.6)
    axes.set_xlabel("tokens of a response")
    _above(axes, "share of responses, %")


def _draw_dumbbells(run: Run, axes: Axes) -> None:
    judges = _judges(run)
    names = sorted(set.intersection(*(set(table) for _, table, *_ in judges)), key=procedure_order)
    heights = np.arange(len(names))[::-1]
    for text, source, color, marker, size in judges:
        estimates = [source[name] for name in names]
        means = np.array([100 * e.mean for e in estimates])
        axes.errorbar(
            means, heights, xerr=_distances(estimates), fmt=marker, markersize=size, elinewidth=1.3,
            color=_light(color), **_edge(), label=text, zorder=3,
        )  # fmt: skip
    for height, name in zip(heights, names, strict=True):
        ends = [100 * table[name].mean for _, table, *_ in judges]
        axes.plot([min(ends), max(ends)], [height] * 2, color=_light("rule"), linewidth=3, zorder=1)
    axes.axvline(50, color=_light("muted"), linewidth=1)
    axes.set_yticks(heights, [spoken(name) for name in names])
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(_light("ink" if name == run.procedure else "muted"))
        label.set_fontweight("bold" if name == run.procedure else "normal")
    axes.grid(axis="y", visible=False)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel("win rate against the reference, %")
    _legend_above(axes)


def _draw_gold_by_proxy(run: Run, axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=_light("muted"), linewidth=1, linestyle=(0, (4, 2)), zorder=1)
    reference_gold = run.arrays["reference_gold"]
    for name, color, marker in (("reference", "reference", "s"), ("policy", "policy", "o")):
        gold = _ranks(run.arrays[f"{name}_gold"], reference_gold, among_itself=name == "reference")
        where, means, half = _binned(run.arrays[f"{name}_calibrated"], gold, bins=10)
        axes.errorbar(
            where, means, yerr=half, fmt=f"{marker}-", markersize=4.5, linewidth=1.4, elinewidth=1.2,
            color=_light(color), **_edge(), label=name, zorder=3,
        )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xlabel("calibrated reward, in ten bins of equal count")
    _above(axes, "calibrated gold reward")
    axes.legend(loc="upper left")


def _draw_frontier(run: Run, axes: Axes) -> None:
    measured, kl = run.evaluation.win_rates[run.procedure], run.evaluation.kl
    path = _path(run)
    widest = max(kl.bounds[1], run.evaluation.kl_budget or 0, 0.05, *path[0])
    kls = _kl_grid(1.08 * widest)
    labels: list[tuple[float, str, str]] = []
    for transform, text, color, dashes in (
        ("optimal", "best possible", "ink", (0, (1, 1.6))),
        (run.transform, f"ideal {run.transform}", "policy", (0, (5, 2))),
        ("identity", "ideal identity", "reference", (0, (5, 2))),
    ):
        if (transform != "optimal" and text in {f"ideal {name}" for name in ("optimal", "raw")}) or any(
            text == label[1] for label in labels
        ):
            continue
        curve = 100 * _ideal_curve(transform, run.procedure, kls)
        axes.plot(kls, curve, color=_light(color), linewidth=1.2, linestyle=dashes, zorder=2, label=text)
        labels.append((float(curve[np.isfinite(curve)][-1]), text, color))
    if path[0].size:
        axes.plot(*path, color=_light("policy"), linewidth=1.2, alpha=0.55, zorder=3, label="training, moving mean")
    if run.evaluation.kl_budget is not None:
        axes.axvline(run.evaluation.kl_budget, color=_light("rule"), linewidth=1.2, zorder=1)
        axes.annotate(
            "budget", (run.evaluation.kl_budget, 0.02), xycoords=("data", "axes fraction"), xytext=(-3, 0),
            textcoords="offset points", color=_light("muted"), fontsize=8, va="bottom", ha="right",
        )  # fmt: skip
    _cross(axes, kl, measured, "policy", "o", label="policy")
    axes.set_xlim(0, kls[-1])
    axes.set_ylim(bottom=_floor([100 * measured.bounds[0], *path[1]]))
    axes.set_xlabel("KL, nats per response")
    _above(axes, "win rate against the reference, %")
    _label_ends(axes, labels)


def _draw_pareto(points: Sequence[Point], procedure: str, axes: Axes) -> None:
    evaluated = [(point, point.evaluation) for point in points if point.evaluation is not None]
    names = list(dict.fromkeys(point.transform for point in points))
    kls = _kl_grid(1.06 * max(0.1, *(evaluation.kl.bounds[1] for _, evaluation in evaluated)))
    looks = _looks(names)
    shown = dict.fromkeys([*names, "identity", "optimal"])
    for name in shown:
        if name == "raw":
            continue
        color, dashes = (
            ("ink", (0, (1, 1.6))) if name == "optimal" else (looks.get(name, ("reference", "o"))[0], "solid")
        )
        curve = 100 * _ideal_curve(name, procedure, kls)
        text = "best possible" if name == "optimal" else f"ideal {name}"
        axes.plot(kls, curve, color=_light(color), linewidth=1.2, linestyle=dashes, alpha=0.75, zorder=2, label=text)
    # From 10 points below the lowest run: on the whole range down to 50 the intervals are smaller than their marks.
    win_rates = [evaluation.win_rates[procedure] for _, evaluation in evaluated]
    axes.set_xlim(0, kls[-1])
    axes.set_ylim(bottom=100 * min(win_rate.bounds[0] for win_rate in win_rates) - 10)
    sizes = _nested_sizes(
        axes, [(run.kl.mean, 100 * win_rate.mean) for (_, run), win_rate in zip(evaluated, win_rates, strict=True)]
    )
    handles = []
    for name in names:
        color, marker = looks[name]
        for (point, run), win_rate, size in zip(evaluated, win_rates, sizes, strict=True):
            if point.transform == name:
                _cross(axes, run.kl, win_rate, color, marker, label=point.name, size=size)
        handles.append(
            lines.Line2D(
                [],
                [],
                color=_light(color),
                marker=marker,
                markeredgecolor=_light("surface"),
                markersize=6,
                linestyle="none" if name in ("raw", "optimal") else "solid",
                linewidth=1.2,
                label=name,
            )
        )
    handles.append(
        lines.Line2D([], [], color=_light("ink"), linestyle=(0, (1, 1.6)), linewidth=1.2, label="best possible")
    )
    axes.set_xlabel("KL, nats per response")
    _above(axes, "win rate against the reference, %")
    axes.legend(handles=handles, loc="lower right", handlelength=1.8)


# ---- numbers


@functools.lru_cache(maxsize=512)
def _ideal_policy(transform: str, procedure: str, kl: float) -> Ideal | None:
    """The ideal policy of a transform, by its name, at a KL. None for a raw reward, and where there is none."""
    try:
        return Objective.parse(transform, procedure, kl).ideal() if kl > 0 else None
    except InputError:
        # Out of reach: past some KL a worst-of-N always wins, and no optimum has more; or Φ is flat at its top.
        return None


def _ideal_curve(transform: str, procedure: str, kls: np.ndarray) -> np.ndarray:
    """Ideal win rates at each KL, ½ at KL 0; nan where there is none."""
    rule = procedures.parse(procedure)
    policies = [_ideal_policy(transform, procedure, float(kl)) for kl in kls]
    return np.array(
        [
            0.5 if kl <= 0 else math.nan if policy is None else policy.win_rate(rule)
            for kl, policy in zip(kls, policies, strict=True)
        ]
    )


def _kl_grid(widest: float) -> np.ndarray:
    """From 0 to `widest`, denser near 0: a win rate rises there as the square root of the KL."""
    return widest * np.linspace(0, 1, 17) ** 2


def _spread(calibrated: np.ndarray, *, references: int) -> np.ndarray:
    """Calibrated rewards [B, M], each spread over the ranks that it stands for: [B, M, 16].

    They take steps of 1/K, K = `references`, which beat against a histogram's bins: k wins of K stand for the ranks
    from k/(K+1) to (k+1)/(K+1).
    """
    offsets = (np.arange(16) + 0.5) / 16
    return (calibrated[..., None] * references + offsets) / (references + 1)


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving mean over at most `width` steps, fewer at the ends; nan is left out.

    At the start the window shrinks on both sides alike: one that reached further ahead than back would start a curve
    that rises from the reference too high.
    """
    halves = [min(width // 2, index) for index in range(len(values))]
    windows = [values[index - half : index + half + 1] for index, half in enumerate(halves)]
    return np.array([np.nanmean(window) if np.isfinite(window).any() else np.nan for window in windows])


def _path(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """(KL, win rate in percent) through training, where both are known; smoothed as the training's curves are."""
    if not {"kl", "win_rate"} <= run.metrics.keys():
        return np.empty(0), np.empty(0)
    path = np.stack([_smooth(run.metrics["kl"]), 100 * _smooth(run.metrics["win_rate"])])
    kl, win_rate = path[:, np.isfinite(path).all(axis=0)]
    return kl, win_rate


def _last(values: np.ndarray) -> float:
    """The last that is a number."""
    return float(values[np.isfinite(values)][-1])


def _floor(percents: Sequence[float]) -> float:
    """Where an axis of win rates starts: at 50 %, or a little below the lowest of them."""
    lowest = min(percents)
    return 50.0 if lowest >= 50 else max(0.0, lowest - 1.5)


def _nested_sizes(axes: Axes, places: Sequence[tuple[float, float]]) -> list[float]:
    """Sizes of marks at places in data units: those that would cover each other are nested, the first the largest."""
    low, high = axes.get_xlim(), axes.get_ylim()
    unit = np.array([low[1] - low[0], high[1] - high[0]])
    near = 0.03
    sizes = []
    for index, place in enumerate(places):
        behind = sum(
            bool(np.hypot(*((np.array(place) - other) / unit)) < near) for other in places[index + 1 :]
        )  # fmt: skip
        sizes.append(5.0 + 4.0 * behind)
    return sizes


def _ranks(values: np.ndarray, reference: np.ndarray, *, among_itself: bool) -> np.ndarray:
    """Calibrated values [B, M] among the reference's [B, K] of the same prompt: share below plus half the ties.

    `among_itself` leaves a reference response out of its own comparison.
    """
    ordered = np.sort(reference, axis=1)
    below = np.stack([np.searchsorted(row, own, "left") for row, own in zip(ordered, values, strict=True)])
    through = np.stack([np.searchsorted(row, own, "right") for row, own in zip(ordered, values, strict=True)])
    wins = (below + through) / 2
    return (wins - 0.5) / (reference.shape[1] - 1) if among_itself else wins / reference.shape[1]


def _binned(where: np.ndarray, values: np.ndarray, *, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of `where` and `values` [B, M] in bins of equal count over `where`, and the half width of 95 % intervals.

    The responses of a prompt are not independent: the interval is that of a ratio of sums over prompts. Ties share
    a bin.
    """
    edges = np.unique(np.quantile(where, np.linspace(0, 1, bins + 1)))
    index = np.clip(np.searchsorted(edges, where, "right") - 1, 0, max(len(edges) - 2, 0))
    prompts = where.shape[0]
    middles, means, halves = [], [], []
    for bin_index in np.unique(index):
        inside = index == bin_index
        count = inside.sum(axis=1)
        total = np.where(inside, values, 0).sum(axis=1)
        mean = total.sum() / count.sum()
        spread = ((total - mean * count) ** 2).sum() * prompts / max(prompts - 1, 1)
        middles.append(where[inside].mean())
        means.append(mean)
        halves.append(1.96 * np.sqrt(spread) / count.sum())
    return np.array(middles), np.array(means), np.array(halves)


def procedure_order(procedure: str) -> tuple[int, int]:
    """Worst-of-16 ... sampling ... best-of-16."""
    family, _, size = procedure.rpartition("_")
    n = int(size) if size.isdigit() else 1
    return (0, 0) if procedure == "sampling" else (1, n) if family.startswith("best") else (2, n)


def _distances(estimates: Sequence[Estimate]) -> np.ndarray:
    """Percent below and above the means, as Matplotlib's error bars want them."""
    low, high = np.array([estimate.bounds for estimate in estimates]).T
    means = np.array([estimate.mean for estimate in estimates])
    return 100 * np.maximum([means - low, high - means], 0)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ---- looks


def _light(role: str) -> str:
    return PALETTE[role].light


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _style() -> dict[Any, Any]:
    installed = set(font_manager.fontManager.get_font_names())
    return {
        "font.family": [next((name for name in FONTS if name in installed), "sans-serif")],
        "font.size": 9,
        "axes.edgecolor": _light("rule"),
        "axes.labelcolor": _light("muted"),
        "axes.labelsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _light("rule"),
        "grid.linewidth": 0.6,
        "grid.alpha": 0.8,
        "xtick.color": _light("rule"),
        "ytick.color": _light("rule"),
        "xtick.labelcolor": _light("muted"),
        "ytick.labelcolor": _light("muted"),
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "ytick.major.size": 0,
        "text.color": _light("ink"),
        "text.parse_math": False,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.labelcolor": _light("muted"),
        "figure.constrained_layout.h_pad": 0.04,
        "figure.constrained_layout.w_pad": 0.04,
    }


def _looks(transform_names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each transform: the same in every sweep for the well-known, in order for the others."""
    fixed = {"identity": ("reference", "o"), "raw": ("gold", "X"), "logarithm": ("green", "^"), "optimal": ("ink", "p")}
    others = iter([("policy", "s"), ("pink", "D"), ("sky", "v"), ("amber", "P")] * len(transform_names))
    return {name: fixed[name] if name in fixed else next(others) for name in transform_names}


def _edge() -> dict[str, Any]:
    """Marks stand off from what they cover."""
    return {"markeredgecolor": _light("surface"), "markeredgewidth": 0.7}


def _cross(
    axes: Axes, kl: Estimate, win_rate: Estimate, color: str, marker: str, *, label: str, size: float = 5.0
) -> None:
    """A point with its intervals in both directions; larger marks stand behind smaller ones."""
    low, high = kl.bounds
    axes.errorbar(
        [kl.mean], [100 * win_rate.mean], xerr=[[max(kl.mean - low, 0)], [max(high - kl.mean, 0)]],
        yerr=_distances([win_rate]), fmt=marker, markersize=size, elinewidth=1.4, capsize=2.5, color=_light(color),
        **_edge(), zorder=6 - size / 100, label=label,
    )  # fmt: skip


def _above(axes: Axes, text: str) -> None:
    """What the vertical axis shows, said level, above it: it reads without a turned head."""
    axes.annotate(
        text,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 6),
        textcoords="offset points",
        color=_light("muted"),
        fontsize=8.5,
        gid=Y_AXIS,
    )


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.1, borderpad=0.1, handletextpad=0.3)


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, pushed apart where they would overlap."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    gap = 10.5 / 72 * figure.dpi / axes.get_window_extent().height * (top - bottom)
    heights = [height for height, _, _ in labels]
    order = np.argsort(heights)
    placed = np.array(heights)[order]
    for _ in range(50):
        for lower in range(len(placed) - 1):
            overlap = gap - (placed[lower + 1] - placed[lower])
            if overlap > 0:
                placed[lower] -= overlap / 2
                placed[lower + 1] += overlap / 2
    for height, index in zip(placed, order, strict=True):
        _, text, color = labels[index]
        axes.annotate(
            text, (1, height), xycoords=("axes fraction", "data"), xytext=(5, 0), textcoords="offset points",
            color=_light("muted" if color == "reference" else color), fontsize=8.5, va="center", annotation_clip=False,
            fontweight="bold" if text == "policy" else "normal",
        )  # fmt: skip
