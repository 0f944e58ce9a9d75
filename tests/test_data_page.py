"""The example of docs/data.md runs as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ctrl_jax import config
from ctrl_jax.data import files
from tests.trained import COMPILE_FAST

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"^    python (.*)$", PAGE.split("The experiment, with a model")[1], re.MULTILINE)


def run(folder, arguments):
    environment = {**os.environ, "XLA_FLAGS": COMPILE_FAST, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *arguments.split()], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    assert list(BLOCKS) == ["rows.py", "rewards.py", "sums.py"]
    for name, code in BLOCKS.items():
        (tmp_path / name).write_text(code)
    assert COMMANDS == ["rows.py", "-m ctrl_jax train sums.py"]
    printed = [run(tmp_path, command) for command in COMMANDS]
    assert "40 rows gave" in printed[1]
    evaluation = json.loads((tmp_path / "runs" / "sums" / "evaluation.json").read_text())
    assert evaluation["win_rates"].keys() >= {"sampling", "best_of_4"}
    lines = (tmp_path / "runs" / "sums" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 8
    # Each response was scored with the answer to its own prompt.
    names: dict = {}
    exec(BLOCKS["rewards.py"], names)
    for line in lines:
        row = json.loads(line)
        first, second = map(int, re.findall(r"\d+", row["prompt"]))
        for side in ("policy", "reference"):
            assert row[side]["reward"] == pytest.approx(names["score"](row[side]["text"], first + second), abs=1e-6)


def test_the_page_names_what_there_is():
    for suffix in files.SUFFIXES:
        assert suffix in PAGE or suffix == ".arrow", "which only saved data sets have"
    for field in config.FIELDS:
        assert f"`{field}`" in PAGE
    named = set(re.findall(r"--data\.([a-z-]+)", PAGE))
    assert named <= {name.replace("_", "-") for name in config.Data.__dataclass_fields__}
