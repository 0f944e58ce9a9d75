import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import platform


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0"])
def test_broken_jaxlibs_are_refused_with_the_command_that_mends(version):
    with pytest.raises(InputError) as error:
        platform.check_jaxlib(version)
    assert f"jaxlib {version}" in str(error.value)
    assert "-m pip install 'jax>=0.10.1,!=0.10.2,!=0.11.0'" in str(error.value)


@pytest.mark.parametrize("version", ["0.10.1", "0.11.1", "0.12.0.1", None])
def test_other_jaxlibs_pass(version):
    platform.check_jaxlib(version)


def test_a_second_process_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    program = f"""
import pathlib, jax
from ctrl_jax.runtime import platform
platform.setup_compilation_cache(pathlib.Path({str(tmp_path)!r}))
print(jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(7)).sum())
"""

    def run():
        output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        return output, {path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith("-atime")}

    (first, compiled), (second, after) = run(), run()
    assert first == second == "70\n"  # 3 · 21 + 7
    assert compiled and compiled == after
    [folder] = tmp_path.iterdir()
    assert platform.device_fingerprint() in folder.name


def test_the_environment_may_choose_where_compiled_programs_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "shared"))
    before = jax.config.jax_compilation_cache_dir
    try:
        assert platform.setup_compilation_cache(tmp_path / "own") == tmp_path / "shared"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "shared")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_environment_is_json_and_names_what_matters(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--some_flag=1")
    environment = json.loads(json.dumps(platform.environment()))
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["xla_flags"] == "--some_flag=1"
    assert len(environment["devices"]) == jax.device_count()
    assert environment["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]


def test_git_is_recorded_in_a_checkout_only(tmp_path):
    assert platform._git(tmp_path) is None
    for command in ("git init -q", "git -c user.name=a -c user.email=a@b commit -q --allow-empty -m one"):
        subprocess.run([*command.split()], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert platform._git(tmp_path) == {"commit": head, "modified": False}


def test_peak_memory_grows_with_what_is_held():
    before = platform.peak_memory()
    held = jnp.ones((64, 1024, 1024), jnp.float32).block_until_ready()
    # Never shrinks, so an earlier, larger peak of the test process is as good.
    assert platform.peak_memory() >= max(before, held.nbytes)


def test_the_environment_sets_neither_types_nor_draws():
    program = """
import jax
from ctrl_jax.runtime import platform
changed = [name for name, value in platform.PINNED.items() if getattr(jax.config, name) != value]
platform.pin_jax()
key = jax.random.key(7)
print(len(changed), jax.numpy.ones(1, "float").dtype, jax.random.key_data(key), jax.random.bits(key))
"""
    plain = {
        "JAX_PLATFORMS": "cpu",
        **{name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
    }
    others = {
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_RANDOM_SEED_OFFSET": "1",
    }
    printed = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for environment in (plain, {**plain, **others})
    ]
    assert printed[0].startswith("0 float32 [0 7] ") and printed[1] == printed[0].replace("0", str(len(others)), 1)
