"""The page of `explore`: what the ideal policies of a transform win, computed in the page itself."""

from ctrl_jax.report import html


def render() -> str:
    return html.render("explorer.html", title="ctrl_jax: theory")
