"""Panels as pictures for talks and papers: PNG, SVG and PDF."""

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ctrl_jax.report.panel import PANEL_SIZE, Panel
from ctrl_jax.report.style import light, settings


def draw(
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
    height = (max(panel.height for panel in panels) + 0.3) * rows
    # Text of a PDF stays text, in TrueType, as journals ask; that of an SVG becomes paths, which need no fonts.
    with mpl.rc_context(settings() | {"svg.hashsalt": title or panels[0].title, "pdf.fonttype": 42}):
        figure = Figure(
            figsize=(PANEL_SIZE[0] * columns, height + (0.4 if title else 0)),
            layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
        )
        if title:
            figure.suptitle(title, x=0.008, ha="left", fontsize=12.5, fontweight="bold", color=light("ink"))
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.patch.set_alpha(0)
            panel.draw(axes)
            axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=light("ink"), pad=23)
        undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
        drawn = {}
        for kind in formats:
            buffer = io.BytesIO()
            FigureCanvasAgg(figure).print_figure(
                buffer, format=kind, dpi=dots_per_inch, facecolor=ground, metadata=undated[kind]
            )
            drawn[kind] = buffer.getvalue()
    return drawn
