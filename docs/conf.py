"""The pages as a site, with a reference from the docstrings: `make docs`."""

import inspect
import re
import runpy
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ctrl_jax as cj  # noqa: E402
from ctrl_jax.report import explorer_page  # noqa: E402
from ctrl_jax.report.glossary import TERMS  # noqa: E402

project = "ctrl_jax"
release = cj.__version__
myst_enable_extensions = ["deflist"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_fence_as_directive = ["math"]
html_math_renderer = "mathml"
exclude_patterns = ["_*"]
html_theme = "furo"
html_title = f"ctrl_jax {release}"
html_show_sphinx = False
html_theme_options = {"announcement": '<a href="explorer.html">Explore the theory</a>'}
html_copy_source = False
myst_heading_anchors = 4
# Docstrings have code in single backticks, as Markdown.
default_role = "code"
autodoc_typehints = "none"
napoleon_use_ivar = True  # else fields that a class describes itself are there twice
autodoc_member_order = "bysource"

TITLES = {
    "Start": ["your_model", "data", "library", "decoders", "judging", "serving"],
    "Choose": ["theory", "choosing", "results", "rivals", "real_models", "comparison", "log"],
    "Run": ["devices", "launch", "speed", "stages", "faults", "questions"],
    "Build on it": ["architecture", "extending", "api", "glossary", "changelog"],
}
"""Captions of the contents, and the pages below each."""


def contents() -> str:
    """The tree of pages, which has them all."""
    there = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    placed = {page for pages in TITLES.values() for page in pages}
    assert there == placed, f"TITLES in docs/conf.py and the pages differ in {sorted(there ^ placed)}"
    trees = []
    for title, pages in TITLES.items():
        listed = "\n".join(pages)
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n{listed}\n```\n")
    return "\n".join(trees)


def reference() -> str:
    """Every public name."""
    found = ["# Reference\n", "All that `import ctrl_jax as cj` has, in the order of [the library](library.md).\n"]
    for name in cj.__all__:
        value = getattr(cj, name)
        if inspect.isclass(value):
            entry = f".. autoclass:: ctrl_jax.{name}\n   :members:\n   :undoc-members:"
        else:
            entry = f".. {'autofunction' if callable(value) else 'autodata'}:: ctrl_jax.{name}"
        found.append(f"```{{eval-rst}}\n{entry}\n```\n")
    return "\n".join(found)


def glossary() -> str:
    """The words of the reports."""
    words = sorted(TERMS.items(), key=lambda pair: pair[0].lower())
    return "# Glossary\n\nThe words of the reports, which explain them where they stand.\n\n" + "\n".join(
        f"**{word}**\n: {text}\n" for word, text in words
    )


def within(text: str, folder: Path) -> str:
    """A page's links, of which those to what is no page of the site become names in code."""

    def link(found: re.Match[str]) -> str:
        image, shown, target = found[1], found[2], found[3]
        if "://" in target or target.startswith("#"):
            return found[0]
        path, _, heading = target.partition("#")
        place = (folder / path).resolve()
        anchor = f"#{heading}" if heading else ""
        if place == ROOT / "CHANGELOG.md":
            return f"[{shown}](changelog.md)"
        if place.parent == ROOT / "docs" and (image or place.suffix == ".md"):
            return f"{image}[{shown}]({place.name}{anchor})"
        if image:
            return f"![{shown}](../{place.relative_to(ROOT).as_posix()})"
        name = place.relative_to(ROOT).as_posix()
        return shown if shown.strip("`") == name else f"{shown} (`{name}`)"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def read(app: Any, page: str, source: list[str]) -> None:
    """What Sphinx reads of a page."""
    if page == "index":
        source[0] = within((ROOT / "README.md").read_text(encoding="utf-8"), ROOT) + "\n" + contents()
    elif page == "api":
        source[0] = reference()
    elif page == "glossary":
        source[0] = glossary()
    elif page == "changelog":
        source[0] = within((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), ROOT)
    else:
        source[0] = within(source[0], ROOT / "docs")


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written for readers of code: their formulas become literal blocks, and what reStructuredText would
    read as marks stays as it is."""
    found: list[str] = []
    formula = in_section = is_example = False
    for line in lines:
        if line.strip() and not line.startswith(" "):  # `Args:` and the like are indented too
            in_section = re.fullmatch(r"\w+:", line) is not None
        begins = line.startswith("    ") and not in_section and bool(found) and not found[-1].strip()
        if begins and not formula:
            found += ["::", ""]
        formula = begins or (formula and (line.startswith("    ") or not line.strip()))
        is_example = line.lstrip().startswith(">>> ") or (is_example and bool(line.strip()))
        found.append(line if formula or is_example else re.sub(r"(?<![`\\])([*|]|_(?=\W|$))", r"\\\1", line))
    lines[:] = found


def mathml(self: Any, node: Any) -> None:
    """A formula as MathML, which browsers draw by themselves."""
    from docutils import nodes
    from latex2mathml import converter

    self.body.append(f'<div class="math">{converter.convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def figures(app: Any) -> None:
    """Those of the theory, anew."""
    runpy.run_path(str(ROOT / "docs" / "theory_figures.py"))["draw_all"]()


def explorer(app: Any, error: Exception | None) -> None:
    """The theory's page, beside the others."""
    if error is None:
        (Path(app.outdir) / "explorer.html").write_text(explorer_page.render(), encoding="utf-8")


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("builder-inited", figures)
    app.connect("build-finished", explorer)
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", plain, priority=100)
