"""docs/architecture.md: its table of rooms is that of test_layout.py, and the places that it names are there.

`WRITE_TABLE=1 .venv/bin/python -m pytest tests/test_architecture.py` writes the table.
"""

import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.test_layout import BASICS, MAY_IMPORT

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text(encoding="utf-8")
BEGIN, END = "<!-- rooms -->\n", "<!-- end of rooms -->\n"
ROLES = {
    "errors": "bad input, as field, value and remedy",
    "types": "the arrays of a step, a shape a field, and the functions that a policy is",
    "theory": "maths on ranks: transforms, procedures, objectives, ideal and optimal policies",
    "steps": "the pure parts of a step: sampling, log-probs, calibration, loss, KL, win rates",
    "decoding": "ways to serve a policy: the decoder's protocol, decoders by order, and search by segments",
    "algorithms": "one file an algorithm: targets, loss, metrics",
    "models": "networks: architecture, decoder, families, weights, costs",
    "data": "records, sources, tokenizers, templates, batches",
    "runtime": "stages on disk, checkpoints, metrics, hosts, the loop, the console",
    "devices": "mesh, partitioning, and the programs that are compiled for them",
    "config": "the options of an experiment",
    "checked_json": "JSON trees read with checks, and errors that name the place",
    "evaluation": "evaluation.json as one value",
    "report": "pages and figures of what was measured",
    "rewards": "trained, classifier, function: each makes a score and its fingerprint",
    "pipeline": "the stages of a run: data, sft, reward model, calibration, training, evaluation",
    "planning": "time and memory of an experiment, and a profile of its steps",
    "commands": "one file a command, with its options",
    "library": "the functions behind `import ctrl_jax as cj`",
    "__main__": "the table of commands, and exit codes",
}


def table() -> str:
    rows = ["| room | role | imports |", "|---|---|---|"]
    for room, imports in MAY_IMPORT.items():
        named = [other for other in MAY_IMPORT if other in imports - (BASICS if imports >= BASICS else set())]
        others = ", ".join(named) or ("no other" if imports >= BASICS else "nothing")
        rows.append(f"| `{room}` | {ROLES[room]} | {others} |")
    return "\n".join(rows) + "\n"


def test_the_rooms_are_those_of_the_layout():
    before, rest = TEXT.split(BEGIN)
    written, after = rest.split(END)
    if os.environ.get("WRITE_TABLE"):
        PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
        pytest.skip("the table was written")
    assert written == table()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:ctrl_jax|tests)/[\w/.]*)`", TEXT))))
def test_a_place_that_the_page_names_is_there(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w.]+)(?:#[\w-]+)?\)", TEXT))))
def test_a_page_or_figure_that_it_points_to_is_there(path):
    assert (ROOT / "docs" / path).exists()


def test_the_figure_names_rooms_that_are_there():
    picture = ElementTree.parse(ROOT / "docs" / "architecture.svg")
    words = [text.text or "" for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    named = [
        word for text in words for word in re.findall(r"\b\w+/\w+\b", text) if not word.startswith(("runs/", "report/"))
    ]
    assert len(named) >= 4
    assert [name for name in named if not (ROOT / "ctrl_jax" / f"{name}.py").exists()] == []
