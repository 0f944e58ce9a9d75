"""A panel as an inline SVG whose colours are CSS variables, so that one drawing serves light and dark pages."""

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import PALETTE, settings


def element(panel: Panel, identifier: str) -> str:
    """The panel as an <svg> element to stand in HTML: colours as CSS variables, the page's font, ids of its own."""
    with mpl.rc_context(settings() | {"svg.fonttype": "none", "svg.hashsalt": identifier}):
        figure = Figure(figsize=panel.size, layout="constrained")
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
    width, height = (round(72 * inches, 2) for inches in panel.size)
    opening = (
        f'<svg class="chart" role="img" aria-labelledby="{identifier}-title" viewBox="0 0 {width} {height}">'
        f'<title id="{identifier}-title">{_escape(panel.title)}: {_escape(panel.description)}</title>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
