"""Processes that start, agree and take turns; what they compute together is in tests/test_processes.py."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import hosts
from tests.processes import Job, run

VARIABLES = [name for names in hosts.COUNTS_AND_IDS for name in names]


@pytest.fixture
def started(monkeypatch):
    """Calls `start` in an environment, and returns what jax.distributed was asked for: None, or its options."""
    others = "JAX_COORDINATOR_BIND_ADDRESS", "OMPI_MCA_orte_hnp_uri", "SLURM_STEP_NUM_TASKS", "CTRL_JAX_JOIN_SECONDS"
    for name in ("JAX_COORDINATOR_ADDRESS", *others, *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    asked_for = []

    def initialize(**options):
        assert options.pop("heartbeat_timeout_seconds") < 60 and options.pop("shutdown_timeout_seconds") < 60
        assert options.pop("initialization_timeout") > 3600  # jax's own would end in SIGABRT
        if not any(name in os.environ for name in VARIABLES):
            raise ValueError("coordinator_address should be defined.")
        asked_for.append(options)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)

    def start(asked=False, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        hosts.start(asked=asked)
        return asked_for[0] if asked_for else None

    return start


SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
TOLD = {
    "coordinator_address": "node1:8476",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        # The script that calls srun is one process.
        (SLURM, None),
        (SLURM | {"SLURM_STEP_NODELIST": "node[1-4]"}, {}),
        (SLURM | {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # The shell of salloc is a step of one task in an allocation of several.
        (SLURM | {"SLURM_STEP_NODELIST": "node1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM | {"SLURM_STEP_NODELIST": "node[1-4]", "SLURM_STEP_NUM_TASKS": "4"}, {}),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, {}),
        (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "node1:8476"}, TOLD),
        ({"JAX_COORDINATOR_ADDRESS": "node1:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, TOLD),
    ],
)
def test_the_environment_tells_of_other_processes(started, environment, expected):
    assert started(**environment) == expected


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "'node1'; give the first process's host and a free port"),
        ({"JAX_COORDINATOR_ADDRESS": "node1:8476"}, "Set JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        (
            {"JAX_COORDINATOR_ADDRESS": "node1:8476", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES='two'",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "node1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID is 2 and JAX_NUM_PROCESSES 2; number the processes from 0",
        ),
        (OPEN_MPI, "Set JAX_COORDINATOR_ADDRESS"),
        ({"asked": True}, "`distributed` is given, but no other process is known"),
    ],
)
def test_an_environment_that_tells_half_is_refused(started, environment, told):
    with pytest.raises(InputError) as error:
        started(**environment)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("host", "listens"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", None),  # a name may mean another address on another machine
        ("192.0.2.7", None),  # no machine's own: RFC 5737
        ("[2001:db8::7]", None),
    ],
)
def test_the_coordinator_listens_where_it_is_asked_for_and_nowhere_else(started, host, listens):
    two = {"JAX_COORDINATOR_ADDRESS": f"{host}:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    assert started(**two).get("coordinator_bind_address") == (listens and f"{listens}:8476")


def test_where_the_coordinator_listens_can_be_chosen(started):
    chosen = {"JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:8476", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:8476"}
    assert "coordinator_bind_address" not in started(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0", **chosen)


@pytest.mark.parametrize("seconds", ["soon", "nan", "-1", "inf"])
def test_the_time_to_join_is_a_number_of_seconds(started, seconds):
    with pytest.raises(InputError, match=f"^The environment has CTRL_JAX_JOIN_SECONDS='{seconds}'"):
        started(JAX_COORDINATOR_ADDRESS="127.0.0.1:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0",
                CTRL_JAX_JOIN_SECONDS=seconds)  # fmt: skip


UNJOINED = """
import os, signal, sys, threading
os.environ.update(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=sys.argv[1], CTRL_JAX_JOIN_SECONDS=sys.argv[2])
from ctrl_jax import __main__ as command_line
from ctrl_jax.runtime import hosts, preemption
hosts.SAID_EVERY_SECONDS = 0.6
def job(arguments):
    if sys.argv[3:]:
        threading.Timer(0.7, os.kill, (os.getpid(), int(sys.argv[3]))).start()
    hosts.start()
command_line._run = job
preemption.run(lambda: command_line.main([]))
"""


@pytest.mark.parametrize("index", ["0", "1"])
def test_a_process_whose_others_never_start_says_so_and_may_be_started_again(index):
    (ended,) = Job(UNJOINED, 1, arguments=(index, "1.5")).wait(60)
    assert ended.code == 75, ended.errors
    *waits, last = ended.errors.splitlines()
    assert waits and all(line.startswith("Waiting for the other processes of the job, 1 s of 2 s") for line in waits)
    assert last.startswith("error: Not all processes of the job started within 2 s")
    assert f"this is process {index} of 2, the first is at 127.0.0.1:" in last and "CTRL_JAX_JOIN_SECONDS" in last


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_process_that_waits_for_others_can_be_stopped(number, code):
    (ended,) = Job(UNJOINED, 1, arguments=("1", "60", str(int(number)))).wait(60)
    assert ended.code == code, ended.errors


def test_one_process_is_the_first_and_waits_for_nobody():
    assert hosts.first() and not hosts.several()
    hosts.wait("anything")
    hosts.check_alike({"code": "a"})
    assert hosts.agree({"x": 1}) == {"x": 1}
    with hosts.first_then_others():
        pass
    np.testing.assert_array_equal(hosts.divided(lambda rows: 2 * rows, 3), [0, 2, 4])


TOGETHER = """
import json, pathlib, sys
from ctrl_jax.runtime import hosts
hosts.start()
import jax, numpy as np
from ctrl_jax.errors import InputError
from ctrl_jax.devices import mesh
hosts.check_alike({"code": "same", "devices": str(jax.local_device_count())})
index, folder = jax.process_index(), pathlib.Path(sys.argv[1])
found = {"first": hosts.first(), "several": hosts.several(), "agreed": hosts.agree(index + 7)}
with hosts.first_then_others():
    found["was there"] = (folder / "made").exists()
    if not found["was there"]:
        (folder / "made").touch()
        (folder / "0").mkdir()
        (folder / "0" / "made").touch()
rows = {"a": np.arange(24).reshape(8, 3), "b": np.arange(8)}
placed = mesh.shard(mesh.make_mesh(), rows)
found["held"] = [int(shard.data[0]) for shard in placed["b"].addressable_shards]
fetched = hosts.fetch({**placed, "c": np.arange(2)})
found["fetched"] = {name: x.tolist() for name, x in fetched.items()}
asked = []
def double(rows):
    asked.extend(rows.tolist())
    return np.stack([2 * rows, 2 * rows + 1], axis=1)
found["divided"] = hosts.divided(double, 5).tolist()
found["asked"] = asked
def refuse(rows):
    if index == 1:
        raise InputError("row 3 is bad")
    return rows
try:
    hosts.divided(refuse, 4)
except InputError as error:
    found["refused"] = str(error)
hosts.check_shared(folder / "made")
try:
    hosts.check_shared(folder / str(index) / "made")
except InputError as error:
    found["unseen"] = str(error)
print(json.dumps(found))
hosts.wait("done")
"""


def test_two_processes_agree_take_turns_and_divide_work(tmp_path):
    # Before it, jax's own communication says that it is connected.
    first, other = (json.loads(ended.printed.splitlines()[-1]) for ended in run(TOGETHER, 2, str(tmp_path)))
    assert (first["first"], other["first"]) == (True, False)
    assert first["several"] and other["several"]
    assert first["agreed"] == other["agreed"] == 7
    assert (first["was there"], other["was there"]) == (False, True)
    # Each process has its half of the rows on its device, and all rows in its memory once they are fetched.
    assert (first["held"], other["held"]) == ([0], [4])
    assert first["fetched"] == other["fetched"]
    assert first["fetched"] == {
        "a": np.arange(24).reshape(8, 3).tolist(),
        "b": np.arange(8).tolist(),
        "c": np.arange(2).tolist(),
    }
    assert first["divided"] == other["divided"] == np.arange(10).reshape(5, 2).tolist()
    assert (first["asked"], other["asked"]) == ([0, 1, 2], [3, 4, 4])
    assert first["refused"] == other["refused"] == "row 3 is bad"
    assert "is not seen by process 1 on " in first["unseen"] and "process 0" not in first["unseen"]
    assert "process 1 on " in other["unseen"]


def test_an_error_that_a_lost_process_explains(monkeypatch):
    gone = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer\nat ...")
    assert hosts.explain(gone) is None
    monkeypatch.setattr(hosts, "several", lambda: True)
    told = hosts.explain(gone)
    assert "Connection reset by peer)" in told and "goes on from the last checkpoint" in told
    assert hosts.explain(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")) is None
    assert hosts.explain(ValueError("UNKNOWN")) is None


DIFFERING = """
import sys
from ctrl_jax.runtime import hosts
hosts.start()
import jax
from ctrl_jax.errors import InputError
try:
    odd = jax.process_index() == 1
    hosts.check_alike({"code": "b" if odd else "a", "devices": "1", **({} if odd else {"option seed": "0"})})
except InputError as error:
    print(error)
    sys.exit(2)
"""


def test_the_process_that_differs_is_named_by_all():
    ended = Job(DIFFERING, 3).wait(120)
    assert [one.code for one in ended] == [2, 2, 2]
    for one in ended:
        assert "process 1 on " in one.printed and "process 0" not in one.printed and "process 2" not in one.printed
        assert "code is b, elsewhere a; option seed is None, elsewhere 0" in one.printed
