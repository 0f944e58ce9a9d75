"""How the report looks: colours, fonts, and Matplotlib's settings.

Colours have roles (`PALETTE`), not places; they are told apart by colour-blind readers, and lines also by their dashes,
points by their shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import font_manager


@dataclass(frozen=True)
class Color:
    light: str
    dark: str


# Every light value is unique: svg.py finds a colour's role by it.
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


def light(role: str) -> str:
    return PALETTE[role].light


def settings() -> dict[Any, Any]:
    installed = set(font_manager.fontManager.get_font_names())
    return {
        "font.family": [next((name for name in FONTS if name in installed), "sans-serif")],
        "font.size": 9,
        "axes.edgecolor": light("rule"),
        "axes.labelcolor": light("muted"),
        "axes.labelsize": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": light("rule"),
        "grid.linewidth": 0.6,
        "grid.alpha": 0.8,
        "xtick.color": light("rule"),
        "ytick.color": light("rule"),
        "xtick.labelcolor": light("muted"),
        "ytick.labelcolor": light("muted"),
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "ytick.major.size": 0,
        "text.color": light("ink"),
        "text.parse_math": False,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.labelcolor": light("muted"),
        "figure.constrained_layout.h_pad": 0.04,
        "figure.constrained_layout.w_pad": 0.04,
    }


def looks(transform_names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each transform: the same in every sweep for the well-known, in order for the others."""
    fixed = {"identity": ("reference", "o"), "raw": ("gold", "X"), "logarithm": ("green", "^"), "optimal": ("ink", "p")}
    others = iter([("policy", "s"), ("pink", "D"), ("sky", "v"), ("amber", "P")] * len(transform_names))
    return {name: fixed[name] if name in fixed else next(others) for name in transform_names}


def edge() -> dict[str, Any]:
    """Marks stand off from what they cover."""
    return {"markeredgecolor": light("surface"), "markeredgewidth": 0.7}
