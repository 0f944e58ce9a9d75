"""The picture of a bench: a panel of speed and one of memory for each case."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ctrl_jax.report.style import PALETTE

TITLES = {"sampling": "Sampling", "step": "A whole RL step"}
BAR_INCHES, HEAD_INCHES = 0.26, 0.62
INK, MUTED, RULE = (PALETTE[role].light for role in ("ink", "muted", "rule"))
STYLE = {
    "font.size": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "bench",
    "text.color": INK,
}


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes an SVG: tokens/s beside the floor on the left, peak memory on the right."""
    timed = [[each for each in result["contenders"] if each["median_seconds"] is not None] for result in results]
    shown = [(result, contenders) for result, contenders in zip(results, timed, strict=True) if contenders]
    if not shown:
        return
    heights = [HEAD_INCHES + BAR_INCHES * len(contenders) for _, contenders in shown]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, sum(heights)), facecolor="white", layout="constrained")
        panels = figure.subplots(len(shown), 2, width_ratios=(3, 1.3), height_ratios=heights, squeeze=False)
        for (left, right), (result, contenders) in zip(panels, shown, strict=True):
            _speed(left, result, contenders)
            _memory(right, contenders, "the GPU" if result["device"] == "gpu" else "the process")
        FigureCanvasSVG(figure).print_figure(path, metadata={"Date": None})


def _speed(axes: Axes, result: dict[str, Any], contenders: Sequence[dict[str, Any]]) -> None:
    tokens = result["prompts"] * result["samples"] * result["new_tokens"]
    least = tokens / result["floor_seconds"]["total"]
    texts = [
        f"{each['tokens_per_second']:,.0f}"
        + ("" if _ours(each) or ratio is None else f"   ctrl_jax {ratio:.2f} × as fast")
        for each in contenders
        for ratio in [each["ctrl_jax_is_faster_by"]]
    ]
    _bars(axes, contenders, [each["tokens_per_second"] for each in contenders], texts)
    axes.axvline(least, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate(
        f"floor {least:,.0f}", (least, 1), xycoords=("data", "axes fraction"), xytext=(0, 3),
        textcoords="offset points", color=MUTED, fontsize=8, ha="right",
    )  # fmt: skip
    axes.set_xlim(0, 1.02 * least)
    axes.set_yticks(range(len(contenders)), [each["label"] for each in contenders])
    for tick, each in zip(axes.get_yticklabels(), contenders, strict=True):
        tick.set_color(INK)
        tick.set_fontweight("bold" if _ours(each) else "normal")
    model = result["shape"].rpartition("-")[0]
    _head(
        axes,
        f"{TITLES[result['task']]}, {model}: {result['prompts']} × {result['samples']} responses",
        f"tokens/s, {result['prompt_length']} tokens read and {result['new_tokens']} written",
    )


def _memory(axes: Axes, contenders: Sequence[dict[str, Any]], whose: str) -> None:
    peaks = [each["peak_gib"] for each in contenders]
    _bars(axes, contenders, peaks, [f"{peak:.2f}" for peak in peaks])
    axes.set_xlim(0, 1.35 * max(peaks))
    axes.set_yticks([])
    _head(axes, "Peak memory", f"GiB of {whose}")


def _head(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=16)
    axes.annotate(
        unit, (0, 1), xycoords="axes fraction", xytext=(0, 3), textcoords="offset points", color=MUTED, fontsize=8
    )


def _ours(contender: dict[str, Any]) -> bool:
    return contender["name"].startswith("ctrl_jax")


def _bars(axes: Axes, contenders: Sequence[dict[str, Any]], values: Sequence[float], texts: Sequence[str]) -> None:
    colors = [PALETTE["policy" if _ours(each) else "reference"].light for each in contenders]
    axes.barh(range(len(values)), values, height=0.68, color=colors)
    for height, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.annotate(
            text, (value, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(RULE)
    axes.tick_params(axis="both", length=0)
    axes.set_xticks([])
