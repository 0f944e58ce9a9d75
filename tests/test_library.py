"""The names of `import ctrl_jax as cj`, and the pages that show them."""

import ast
import doctest
import json
import linecache
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich

import ctrl_jax as cj
from tests.pipeline.pretrained import write_model

ROOT = Path(__file__).parents[1]
LAZY = ("jax", "flax", "numpy", "orbax", "matplotlib")


def imported_for_types() -> dict[str, tuple[str, str]]:
    """Public name to (module, name there), as type checkers read them."""
    tree = ast.parse((ROOT / "ctrl_jax" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_and_programs_see_the_same_names():
    places = {name: (f"ctrl_jax.{module}", attribute) for name, (module, attribute) in cj._PLACES.items()}
    assert imported_for_types() == places
    assert {*places, "__version__"} == set(cj.__all__)
    assert len(cj.__all__) == len(set(cj.__all__))


@pytest.mark.parametrize("name", cj.__all__)
def test_every_name_is_there_and_described(name):
    value = getattr(cj, name)
    assert name == "__version__" or value.__doc__
    assert name in dir(cj)


def test_importing_imports_nothing_else():
    program = f"import sys; before = set(sys.modules); import ctrl_jax; print(*({LAZY} & sys.modules.keys()))"
    program = program.replace(str(LAZY), str(set(LAZY)))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    assert run.stdout.split() == []


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'calibrat'"):
        _ = cj.calibrat


def test_the_page_shows_every_name():
    page = (ROOT / "docs" / "library.md").read_text()
    missing = [name for name in cj.__all__ if f"cj.{name}" not in page and f"`{name}" not in page]
    assert missing == []


@pytest.mark.usefixtures("compile_fast")
def test_the_page_is_right(tmp_path, monkeypatch):
    """A tiny model of random weights stands where the page has one that people know."""
    write_model(tmp_path / "models" / "SmolLM2-135M-Instruct", num_hidden_layers=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rich.get_console(), "quiet", True)
    results = doctest.testfile(
        str(ROOT / "docs" / "library.md"), module_relative=False, optionflags=doctest.ELLIPSIS, encoding="utf-8"
    )
    assert results.attempted > 20 and results.failed == 0


def code_cells() -> list[dict[str, Any]]:
    notebook = json.loads((ROOT / "docs" / "align.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_with_what_it_printed():
    outputs = [output for cell in code_cells() for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code_cells()] == list(range(1, len(code_cells()) + 1))
    assert not any(output["output_type"] == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """As it is, in three minutes: the policy beats the model, at the KL budget, and falls short of the ideal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.setattr(rich.get_console(), "quiet", True)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(code_cells()):
        source = "".join(cell["source"])
        # As IPython does it, so that the source of the reward can be read.
        linecache.cache[f"<cell {number}>"] = (len(source), None, source.splitlines(keepends=True), f"<cell {number}>")
        exec(compile(source, f"<cell {number}>", "exec"), names)
    evaluation, budget = names["evaluation"], names["budget"]
    measured, ideal = evaluation.win_rates["best_of_4"], evaluation.ideal["best_of_4"].transform
    assert evaluation.kl.mean == pytest.approx(budget, rel=0.3)
    assert measured.low > 0.5 and measured.mean > 0.5 + 0.6 * (ideal - 0.5)
    assert (tmp_path / "runs" / "brevity" / "report" / "index.html").exists()
    assert cj.generate(cj.load_model("out"), names["prompts"][:1])
