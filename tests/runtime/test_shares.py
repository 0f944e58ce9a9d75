"""Shares of the machine: together no more than there is, and none overlapping another."""

import os

import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import shares
from ctrl_jax.runtime.shares import Share


@pytest.fixture
def machine(monkeypatch):
    """Pretends that jax finds some devices, and that the process may run on some cores."""

    def pretend(platform: str, devices: int, cores: int = 8) -> None:
        monkeypatch.setattr(shares, "_devices", lambda: (platform, devices))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return pretend


def test_one_job_has_everything(machine):
    for platform in ("cpu", "gpu", "tpu"):
        machine(platform, 4)
        assert shares.shares(1) == [Share(4, {}, None)]


@pytest.mark.parametrize(("cores", "jobs"), [(8, 2), (8, 3), (5, 4), (2, 2)])
def test_cores_are_divided_and_each_is_used(machine, cores, jobs):
    machine("cpu", 1, cores)
    found = shares.shares(jobs)
    assert [share.devices for share in found] == [1] * jobs
    assert sorted(core for share in found for core in share.cores) == list(range(cores))
    sizes = [len(share.cores) for share in found]
    assert max(sizes) - min(sizes) <= 1


def test_more_jobs_than_cores_share_them(machine):
    machine("cpu", 1, cores=2)
    found = shares.shares(5)
    assert all(len(share.cores) == 1 for share in found)
    assert {core for share in found for core in share.cores} == {0, 1}


def test_gpus_are_divided_and_odd_ones_stay_idle(machine, monkeypatch):
    machine("gpu", 5)
    assert shares.shares(2) == [
        Share(2, {"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        Share(2, {"CUDA_VISIBLE_DEVICES": "2,3"}, None),
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,GPU-ab,3,1,0")
    assert [share.environment["CUDA_VISIBLE_DEVICES"] for share in shares.shares(2)] == ["6,GPU-ab", "3,1"]


@pytest.mark.parametrize(
    ("platform", "devices", "jobs", "told"),
    [
        ("gpu", 2, 3, "`jobs` is 3, but 2 GPUs are visible"),
        ("tpu", 4, 2, "TPU chips of a machine belong to one process"),
        ("cpu", 1, 0, "`jobs` is 0"),
    ],
)
def test_what_cannot_be_divided_is_refused(machine, platform, devices, jobs, told):
    machine(platform, devices)
    with pytest.raises(InputError, match=told):
        shares.shares(jobs)


def test_the_devices_are_counted_in_a_process_of_their_own(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert shares.shares(1) == [Share(3, {}, None)]


def test_a_platform_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    with pytest.raises(InputError, match=r"jax finds no devices: .*abacus"):
        shares.shares(1)
