"""The report's figures: panels that draw themselves on an Axes, and the two ways they leave the program.

A panel becomes an inline SVG whose colours are CSS variables, so that one drawing serves light and dark pages, or joins
others in a PNG for talks. Colours have roles (`PALETTE`), not places; they are told apart by colour-blind readers, and
lines also by their dashes, points by their shapes. Win rates are drawn in percent.
"""

import functools
import io
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager, lines, patches, ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ctrl_jax.errors import InputError
from ctrl_jax.report.measurements import RELIABILITY_ARRAYS, Estimate, Evaluation, Run
from ctrl_jax.theory import ideal, optimal, procedures, transforms


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


def png(
    panels: Sequence[Panel], path: pathlib.Path, *, columns: int, title: str = "", dots_per_inch: int = 200
) -> None:
    """Write the panels, each under its title, as one light picture of `columns` columns."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with mpl.rc_context(_style()):
        figure = Figure(
            figsize=(PANEL_SIZE[0] * columns, (PANEL_SIZE[1] + 0.3) * rows + (0.4 if title else 0)),
            layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
            facecolor="white",
        )
        if title:
            figure.suptitle(title, x=0.008, ha="left", fontsize=12.5, fontweight="bold", color=_light("ink"))
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            panel.draw(axes)
            axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=_light("ink"), pad=23)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_figure(path, format="png", dpi=dots_per_inch, facecolor="white")


def win_rate_vs_n(run: Run) -> list[Panel]:
    """Best-of-N and worst-of-N win rates over N, the ideal policies at the measured KL behind them."""
    return [
        panel
        for panel in (_family(run, "best_of", "Best-of-N decoding"), _family(run, "worst_of", "Worst-of-N decoding"))
        if panel is not None
    ]


def training(run: Run) -> list[Panel]:
    """KL against its budget, win rate, calibrated reward and β over the steps of policy training."""
    if "step" not in run.metrics:
        return []
    budget = run.evaluation.kl_budget
    panels = [
        ("kl", "KL from the reference", "nats per response", 1.0, budget, "budget"),
        ("win_rate", f"Win rate under {spoken(run.procedure)}", "% against the reference", 100.0, None, ""),
        ("calibrated_reward", "Calibrated reward", "mean rank among the reference's rewards", 1.0, 0.5, "reference"),
        ("beta", "Weight of the KL, β", "against Φ on [0, 1]; log scale", 1.0, None, ""),
    ]  # fmt: skip
    return [
        Panel(
            title,
            f"{unit} over {len(run.metrics['step'])} training steps, ending at {run.metrics[column][-1] * scale:.4g}.",
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
    if run.evaluation.accuracy is None or not set(RELIABILITY_ARRAYS) <= run.arrays.keys():
        return []
    return [
        Panel(
            "Reward model's reliability",
            f"Observed against predicted preference; accuracy {run.evaluation.accuracy:.3f}, "
            f"expected calibration error {run.evaluation.ece:.3f}.",
            functools.partial(_draw_reliability, run),
        )
    ]


def proxy_gold(run: Run) -> list[Panel]:
    """Reward model against gold reward: win rates by procedure, and gold rank by the reward model's rank."""
    panels = []
    if run.evaluation.gold_win_rates:
        panels.append(
            Panel(
                "Win rates by reward model and by gold",
                "The same responses judged by the reward model and by the gold reward, procedure by procedure.",
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
            axes.plot(where, heights, color=_light(color), linewidth=1.2, linestyle=dashes, zorder=2)
            labels.append((float(heights[np.isfinite(heights)][-1]), text, color))
    estimates = [run.evaluation.win_rates[name] for name in sizes.values()]
    _errorbar(axes, where, estimates, "policy", line=True)
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
    if column != "beta":
        axes.plot(steps, values, color=_light("policy"), linewidth=0.8, alpha=0.4)
        values = _smooth(values)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.plot(steps, values, color=_light("policy"), linewidth=1.8)
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
        axes.stairs(density, edges, color=_light(color), linewidth=1.3)
        handles.append(patches.Patch(facecolor=_light(color), alpha=1.6 * alpha, label=name))
    kl = run.evaluation.kl.mean
    policy = _ideal_policy(run.transform, run.procedure, kl)
    if policy is not None:
        # In the histogram's own bins: a density that doubles within a bin cannot be compared with one that is averaged.
        density = np.diff(np.asarray(policy.cdf(edges), float)) / np.diff(edges)
        axes.stairs(density, edges, color=_light("ink"), linewidth=1.4, linestyle=(0, (3, 1.5)), baseline=None)
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
    kept = (count > 0) & np.isfinite(predicted) & np.isfinite(observed)
    predicted, observed, count = predicted[kept], observed[kept], count[kept]
    low, high = _wilson(observed, count)
    start = 0.0 if predicted.size == 0 or predicted.min() < 0.45 else 0.5
    axes.plot([start, 1], [start, 1], color=_light("muted"), linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate(
        "as sure as right", (start + 0.42 * (1 - start),) * 2, xytext=(-8, 6), textcoords="offset points", ha="right",
        color=_light("muted"), fontsize=8,
    )  # fmt: skip
    axes.errorbar(
        predicted, observed, yerr=[np.maximum(observed - low, 0), np.maximum(high - observed, 0)], fmt="o-",
        markersize=4.5, linewidth=1.4, elinewidth=1.2, color=_light("policy"), **_edge(),
    )  # fmt: skip
    axes.set_xlim(start - 0.01, 1.01)
    axes.tick_params(labelbottom=False)
    _above(axes, "share in which it is preferred, with 95 % intervals")
    counts = axes.inset_axes((0, -0.34, 1, 0.24), sharex=axes)
    counts.bar(predicted, count, width=0.6 * (1 - start) / max(len(count), 1), color=_light("reference"))
    counts.yaxis.set_major_locator(ticker.MaxNLocator(2, integer=True))
    counts.set_xlabel("predicted probability that a response is preferred")
    counts.set_ylabel("pairs", fontsize=8, color=_light("muted"))
    counts.grid(False)


def _draw_dumbbells(run: Run, axes: Axes) -> None:
    names = [name for name in run.evaluation.win_rates if name in run.evaluation.gold_win_rates]
    names.sort(key=procedure_order)
    heights = np.arange(len(names))[::-1]
    for source, color, marker, text in (
        (run.evaluation.win_rates, "policy", "o", "reward model"),
        (run.evaluation.gold_win_rates, "gold", "D", "gold"),
    ):
        estimates = [source[name] for name in names]
        means = np.array([100 * e.mean for e in estimates])
        axes.errorbar(
            means, heights, xerr=_distances(estimates), fmt=marker, markersize=5, elinewidth=1.3, color=_light(color),
            **_edge(), label=text, zorder=3,
        )  # fmt: skip
    for height, name in zip(heights, names, strict=True):
        ends = [100 * run.evaluation.win_rates[name].mean, 100 * run.evaluation.gold_win_rates[name].mean]
        axes.plot(ends, [height, height], color=_light("rule"), linewidth=3, zorder=1, solid_capstyle="round")
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
    path = None
    if {"kl", "win_rate"} <= run.metrics.keys():
        path = _smooth(run.metrics["kl"]), 100 * _smooth(run.metrics["win_rate"])
    widest = max(kl.high, kl.mean, run.evaluation.kl_budget or 0, 0.05 if path is None else float(np.nanmax(path[0])))
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
        axes.plot(kls, curve, color=_light(color), linewidth=1.2, linestyle=dashes, zorder=2)
        labels.append((float(curve[np.isfinite(curve)][-1]), text, color))
    if path is not None:
        axes.plot(*path, color=_light("policy"), linewidth=1.2, alpha=0.55, zorder=3)
    if run.evaluation.kl_budget is not None:
        axes.axvline(run.evaluation.kl_budget, color=_light("rule"), linewidth=1.2, zorder=1)
        axes.annotate(
            "budget", (run.evaluation.kl_budget, 0.02), xycoords=("data", "axes fraction"), xytext=(-3, 0),
            textcoords="offset points", color=_light("muted"), fontsize=8, va="bottom", ha="right",
        )  # fmt: skip
    _cross(axes, kl, measured, "policy", "o")
    axes.set_xlim(0, kls[-1])
    axes.set_ylim(bottom=50)
    axes.set_xlabel("KL, nats per response")
    _above(axes, "win rate against the reference, %")
    _label_ends(axes, labels)


def _draw_pareto(points: Sequence[Point], procedure: str, axes: Axes) -> None:
    names = list(dict.fromkeys(point.transform for point in points))
    kls = _kl_grid(1.06 * max(0.1, *(point.evaluation.kl.high for point in points if point.evaluation)))
    looks = _looks(names)
    shown = dict.fromkeys([*names, "identity", "optimal"])
    for name in shown:
        if name == "raw":
            continue
        color, dashes = (
            ("ink", (0, (1, 1.6))) if name == "optimal" else (looks.get(name, ("reference", "o"))[0], "solid")
        )
        curve = 100 * _ideal_curve(name, procedure, kls)
        axes.plot(kls, curve, color=_light(color), linewidth=1.2, linestyle=dashes, alpha=0.75, zorder=2)
    handles = []
    for name in names:
        color, marker = looks[name]
        for point in points:
            if point.transform == name and point.evaluation:
                _cross(axes, point.evaluation.kl, point.evaluation.win_rates[procedure], color, marker)
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
    # From 10 points below the lowest run: on the whole range down to 50 the intervals are smaller than their marks.
    lowest = min(100 * point.evaluation.win_rates[procedure].low for point in points if point.evaluation)
    axes.set_xlim(0, kls[-1])
    axes.set_ylim(bottom=lowest - 10)
    axes.set_xlabel("KL, nats per response")
    _above(axes, "win rate against the reference, %")
    axes.legend(handles=handles, loc="lower right", handlelength=1.8)


# ---- numbers


@functools.lru_cache(maxsize=512)
def _ideal_policy(transform: str, procedure: str, kl: float) -> ideal.IdealPolicy | None:
    """The ideal policy of a transform, by its name, at a KL. None for a raw reward, and where there is none."""
    if transform == "raw" or kl <= 0:
        return None
    rule = procedures.parse(procedure)
    phi = None if transform == "optimal" else transforms.parse(transform)
    try:
        return ideal.at_kl(optimal.optimal_transform(rule, kl=kl) if phi is None else phi, kl)
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
    """Centred moving mean over at most `width` steps, fewer at the ends; nan is left out."""
    half = width // 2
    windows = [values[max(index - half, 0) : index + half + 1] for index in range(len(values))]
    return np.array([np.nanmean(window) if np.isfinite(window).any() else np.nan for window in windows])


def _wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share: right also near 0 and 1, where the normal one leaves [0, 1]."""
    z = 1.96
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return center - half, center + half


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
    return 100 * np.array([[max(e.mean - e.low, 0) for e in estimates], [max(e.high - e.mean, 0) for e in estimates]])


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


def _errorbar(axes: Axes, where: np.ndarray, estimates: Sequence[Estimate], color: str, *, line: bool) -> None:
    axes.errorbar(
        where, [100 * e.mean for e in estimates], yerr=_distances(estimates), fmt="o-" if line else "o", markersize=5.5,
        linewidth=1.8, elinewidth=1.4, color=_light(color), **_edge(), zorder=4,
    )  # fmt: skip


def _cross(axes: Axes, kl: Estimate, win_rate: Estimate, color: str, marker: str) -> None:
    axes.errorbar(
        [kl.mean], [100 * win_rate.mean], xerr=[[max(kl.mean - kl.low, 0)], [max(kl.high - kl.mean, 0)]],
        yerr=_distances([win_rate]), fmt=marker, markersize=5, elinewidth=1.4, capsize=2.5, color=_light(color),
        **_edge(), zorder=5,
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
