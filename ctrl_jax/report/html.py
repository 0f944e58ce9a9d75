"""Pages in HTML: templates filled with numbers, words and drawings.

Nothing is fetched: style and figures stand in the page. All text that comes from data or models is escaped, and what
would steer the reader's screen in it (control characters, changes of the writing direction) is made visible.
"""

import re
from collections.abc import Iterable
from typing import Any

import jinja2
from markupsafe import Markup

from ctrl_jax.checked_json import finite
from ctrl_jax.evaluation import Estimate
from ctrl_jax.report import glossary, svg
from ctrl_jax.report.names import spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.style import FONTS, PALETTE

TEXT_CHARACTERS = 4_000
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)


def render(template: str, **values: Any) -> str:
    words: set[str] = set()

    def finished(value: Any) -> Any:
        # What is markup is the page's own; all else is text of data, models, files or users.
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ctrl_jax", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finished,
    )
    environment.globals["words"] = lambda: glossary.glossary(words)
    environment.filters |= {
        "percent": lambda share: "–" if share is None else f"{100 * share:.1f} %",
        "percent_number": lambda share: f"{100 * share:.1f}",
        "whole_percent": lambda share: "–" if share is None else f"{100 * share:.0f} %",
        "brackets": brackets,
        "kl_brackets": lambda estimate: brackets(estimate, scale=1, digits=3),
        "points": signed,
        "points_brackets": lambda estimate: brackets(estimate, sign="+"),
        "nats": lambda value: signed(value, scale=1, digits=3),
        "nats_brackets": lambda estimate: brackets(estimate, scale=1, digits=3, sign="+"),
        "finite": finite,
        "spoken": spoken,
        "explained": lambda text: glossary.explained(finished(text), words=words),
        "clipped": lambda text: text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]} … (cut)",
    }
    return environment.get_template(template).render(palette=PALETTE, fonts=FONTS, **values)


def charts(identifier: str, panels: Iterable[Panel]) -> list[dict[str, Any]]:
    # `svg.element` escapes the texts that it is given; all else in the drawing is its own.
    return [
        {"title": panel.title, "svg": Markup(svg.element(panel, f"{identifier}-{index}"))}
        for index, panel in enumerate(panels)
    ]


def visible(text: str) -> str:
    """The text with what has no look of its own, yet steers a screen or hides words, as `⟦U+202E⟧`.

    Control characters but line feed and tab, overrides of the writing direction, lone surrogates (which no file can
    hold), and tag characters. A carriage return before a line feed is left out.
    """
    return _STEERING.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", text.replace("\r\n", "\n"))


def brackets(estimate: Estimate, *, scale: float = 100, digits: int = 1, sign: str = "") -> str:
    """The interval, in percent by default, or that there is none.

    Args:
      estimate: has it.
      scale: of what is shown.
      digits: behind the point.
      sign: `+` for a difference, whose ends show their signs.
    """
    if estimate.low is None or estimate.high is None:
        return "no interval" if sign else "no interval: 1 prompt"
    low, high = (f"{scale * end:{sign}.{digits}f}" for end in (estimate.low, estimate.high))
    return f"[{low}, {high}]".replace("-", "−" if sign else "-")


def signed(value: float, *, scale: float = 100, digits: int = 1) -> str:
    """A difference with its sign, of shares in percentage points by default."""
    return f"{scale * value:+.{digits}f}".replace("-", "−")
