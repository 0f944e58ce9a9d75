import json

import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import checksums


def write(folder, **files):
    for name, contents in files.items():
        (folder / name).write_text(contents)
    (folder / "seal.json").write_text(json.dumps(checksums.sealed(folder, files, {"step": 3})))
    return folder / "seal.json"


def test_what_is_as_it_was_is_whole(tmp_path):
    seal = write(tmp_path, a="1", b="22")
    assert checksums.broken(seal) == [] and checksums.about(seal) == {"step": 3}
    (tmp_path / "other").write_text("beside")
    assert checksums.broken(seal) == []


def test_every_file_that_is_not_is_named(tmp_path):
    seal = write(tmp_path, a="1", b="22", c="333", d="4444")
    (tmp_path / "a").write_text("2")
    (tmp_path / "b").unlink()
    (tmp_path / "c").unlink()
    (tmp_path / "c").mkdir()
    assert checksums.broken(seal) == ["a", "b", "c"]


@pytest.mark.parametrize("contents", ["{}", "", "[]", "null", "3", '{"sha256": "x"}', "[" * 10**5, '{"a": ' * 10**5])
def test_what_is_no_seal_counts_as_none(tmp_path, contents):
    seal = write(tmp_path, a="1")
    seal.write_text(contents)
    assert checksums.broken(seal) == ["seal.json"]
    with pytest.raises(InputError, match=r"seal\.json is missing or damaged"):
        checksums.about(seal)


def test_a_seal_covers_itself(tmp_path):
    """Any one byte that is another: what it says of the files, or beside them."""
    seal = write(tmp_path, a="1")
    contents = seal.read_bytes()
    for index in range(len(contents)):
        seal.write_bytes(contents[:index] + bytes([contents[index] ^ 2]) + contents[index + 1 :])
        assert checksums.broken(seal) == ["seal.json"], contents[index - 3 : index + 3]


def test_arrays_are_told_apart_by_names_types_shapes_and_values():
    trees = [
        {"a": jnp.zeros(4), "b": jnp.ones(2)},
        {"a": jnp.zeros(4), "c": jnp.ones(2)},
        {"a": jnp.zeros((2, 2)), "b": jnp.ones(2)},
        {"a": jnp.zeros(4, jnp.bfloat16), "b": jnp.ones(2)},
        {"a": jnp.zeros(4), "b": jnp.array([1.0, np.nextafter(np.float32(1), 2)])},
    ]
    assert len({checksums.of_arrays(tree) for tree in trees}) == len(trees)
    assert checksums.of_arrays(trees[0]) == checksums.of_arrays({"b": np.ones(2, "f"), "a": np.zeros(4, "f")})
