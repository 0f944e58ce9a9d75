"""What the documents point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "faults.md").read_text())


def test_every_fault_names_its_test():
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.count("|") == 6]
    assert len(rows) > 15
    assert all("`tests/" in row for row in rows[2:])


@pytest.mark.parametrize(("path", "test"), NAMED)
def test_a_test_that_is_named_exists(path, test):
    assert f"def {test}(" in (ROOT / path).read_text()
