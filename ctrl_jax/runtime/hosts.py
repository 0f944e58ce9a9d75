"""Several processes that run one job together: how they start, agree, take turns at files, and notice a loss.

Each runs the same program on the same configuration, and each step is one program over the devices of all. What is not
such a program is done by all alike, from the same arrays; files alone are written by the first process, in folders that
all of them see.
"""

import contextlib
import ipaddress
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from ctrl_jax.errors import InputError

HEARTBEAT_SECONDS = 30
"""A process that is silent for so long is taken for lost, and ends the others."""
JOIN_SECONDS = 300.0
"""What a process waits for all others to start, unless CTRL_JAX_JOIN_SECONDS is another number: hosts of a cluster may
be minutes apart, for want of an image or of the libraries in their file cache."""
SAID_EVERY_SECONDS = 15.0
"""Between the lines that say that it waits."""
PATIENCE_SECONDS = 24 * 3600
"""What others wait for the first process: it may have to fetch and to prepare the data."""

COUNTS_AND_IDS = (
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    # The last is set within srun alone, and not in the script that calls it.
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
"""The environment variables that give the number of processes, and which one this is."""


class NotJoined(RuntimeError):
    """Not all processes of the job have started in time: a fault of the cluster, so the job may be started again."""


_turns = itertools.count()
_OF_OTHERS = ("UNKNOWN", "UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL")


def start(*, asked: bool = False) -> None:
    """Joins the other processes of the job, if there are any, before anything else is asked of jax.

    The environment names them: by the variables of Slurm's srun and Open MPI; or by JAX_COORDINATOR_ADDRESS, the
    host:port of the first process, with JAX_NUM_PROCESSES and JAX_PROCESS_ID. On a TPU pod jax finds them, if asked.

    Raises:
      InputError: if the environment is incomplete, or names no others though they are asked for.
      NotJoined: if not all of them have started within JOIN_SECONDS. The process has to `leave` then: a usual exit
        may wait for them.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    names = next((names for names in COUNTS_AND_IDS if all(name in os.environ for name in names)), None)
    count = _number(names[0]) if names else 1
    if names and names[0] == "SLURM_NTASKS" and os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        count = 1  # the shell of salloc, which sees the tasks of the whole allocation
    options: dict[str, Any] = {}
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(
                f"JAX_COORDINATOR_ADDRESS is {address!r}; give the first process's host and a free port, such as "
                "node1:8476."
            )
        if names is None:
            raise InputError(
                f"JAX_COORDINATOR_ADDRESS is {address}, but the number of processes, and which one this is, are not "
                "set. Set JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0) too."
            )
        process = _number(names[1])
        if process >= count:
            raise InputError(f"{names[1]} is {process} and {names[0]} {count}; number the processes from 0.")
        # Everything is given explicitly; auto-detection would take one device for each of a machine's processes.
        options = {"coordinator_address": address, "num_processes": count, "process_id": process}
        options["cluster_detection_method"] = "deactivate"
        listening = _own_address(host)
        if listening is not None and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
            options["coordinator_bind_address"] = f"{listening}:{port}"
    elif count == 1 and not asked:
        return
    elif names is not None and names[0] != "SLURM_NTASKS" and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        raise InputError(
            f"{names[0]} is {count}, but the address of the first process is not known (Open MPI names it "
            "until its version 4). Set JAX_COORDINATOR_ADDRESS to its host and a free port, such as node1:8476."
        )
    handler = signal.getsignal(signal.SIGTERM)
    limit = _seconds("CTRL_JAX_JOIN_SECONDS", JOIN_SECONDS)
    try:
        _join(options, limit)
    except ValueError as error:
        raise InputError(
            "`distributed` is given, but no other process is known: neither JAX_COORDINATOR_ADDRESS nor Slurm's "
            f"or Open MPI's variables are set, and this is no TPU pod ({error}). Leave it out on a single machine."
        ) from error
    if not several():
        signal.signal(signal.SIGTERM, handler)  # jax's own, for several, has taken its place


def _own_address(host: str) -> str | None:
    """The address if it is one of this machine's: the coordinator need not listen on any other.

    None for a name, which this machine may resolve otherwise than the others do (Debian has its own name at 127.0.1.1).
    """
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family) as tried:
            tried.bind((str(address), 0))
    except (ValueError, OSError):
        return None
    return host


def _join(options: dict[str, Any], limit: float) -> None:
    """Returns when all processes of the job are there, and says meanwhile that it waits for them.

    The wait is here and not jax's own: that is silent, deaf to signals, and ends in SIGABRT.
    """
    failed: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **options, initialization_timeout=PATIENCE_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            )  # fmt: skip
        except Exception as error:
            failed.append(error)

    started = time.monotonic()
    thread = threading.Thread(target=connect, name="joins the other processes", daemon=True)
    thread.start()
    while thread.is_alive():
        waited = time.monotonic() - started
        if waited >= limit:
            raise NotJoined(
                f"Not all processes of the job started within {limit:.0f} s{_this_process()}. Check that each of them "
                "was started and still runs (its own log says), that all have the same address and count, and that no "
                "firewall keeps them from the first process. The same command starts anew; CTRL_JAX_JOIN_SECONDS gives "
                "them longer."
            )
        thread.join(min(limit - waited, SAID_EVERY_SECONDS - waited % SAID_EVERY_SECONDS))
        waited = time.monotonic() - started
        if thread.is_alive() and waited < limit:
            about = f"{waited:.0f} s of {limit:.0f} s{_this_process()}"
            print(f"Waiting for the other processes of the job, {about}.", file=sys.stderr)
    if failed:
        raise failed[0]


def _this_process() -> str:
    state = _state()
    if state.coordinator_address is None:  # not found yet
        return ""
    return (
        f" (this is process {state.process_id} of {state.num_processes}, the first is at {state.coordinator_address})"
    )


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"The environment has {name}={text!r}; it has to be a number of seconds.")
    return value


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise InputError(f"The environment has {name}={value!r}; with several processes it has to be a number.")
    return int(value)


def several() -> bool:
    return _state().num_processes not in (None, 1)


def first() -> bool:
    """Whether this process writes the files. Asks no device, so that who only starts other processes may ask it."""
    return _state().process_id == 0


def check_alike(facts: Mapping[str, str]) -> None:
    """Refuses, on every host, to go on unless all have the same facts: of their code, configuration and devices.

    Raises:
      InputError: naming each host that differs from most, and in what.
    """
    if not several():
        return
    mine = json.dumps({"host": socket.gethostname(), "facts": dict(facts)})
    all_facts = [json.loads(text) for text in _exchange("facts", mine)]
    usual = Counter(json.dumps(one["facts"], sort_keys=True) for one in all_facts).most_common(1)[0][0]
    expected = json.loads(usual)
    differing = []
    for index, one in enumerate(all_facts):
        names = [name for name in {**expected, **one["facts"]} if expected.get(name) != one["facts"].get(name)]
        shown = "; ".join(f"{name} is {one['facts'].get(name)}, elsewhere {expected.get(name)}" for name in names[:3])
        if names:
            differing.append(f"process {index} on {one['host']} differs: {shown}")
    if differing:
        raise InputError(
            f"All {len(all_facts)} processes have to run the same program on the same options, but "
            f"{', and '.join(differing)}. Start all of them alike."
        )


def check_shared(file: Path) -> None:
    """Refuses, on every host, to go on unless all see a file that the first has written.

    Raises:
      InputError: naming the hosts that do not.
    """
    if not several():
        return
    wait("written")
    seen = [json.loads(text) for text in _exchange("seen", json.dumps([socket.gethostname(), Path(file).exists()]))]
    blind = [f"process {index} on {host}" for index, (host, there) in enumerate(seen) if not there]
    if blind:
        raise InputError(
            f"{Path(file).absolute()} is not seen by {', '.join(blind)}: all hosts need the same folder. Give "
            "`runs_dir` (or `work_dir`) one that they share."
        )


def wait(name: str) -> None:
    """Returns when every process has called it."""
    if several():
        _client().wait_at_barrier(f"{name}-{next(_turns)}", timeout_in_ms=1000 * PATIENCE_SECONDS)


def agree(value: Any) -> Any:
    """The first process's value, JSON, on every process."""
    if not several():
        return value
    key = f"agreed-{next(_turns)}"
    if first():
        _client().key_value_set(key, json.dumps(value))
    return json.loads(_client().blocking_key_value_get(key, 1000 * PATIENCE_SECONDS))


def of_first(function: Callable[[], Any]) -> Any:
    """What `function` returns on the first process, JSON, on every process.

    Raises:
      InputError: on every process, if `function` does on the first.
    """
    if not several():
        return function()
    try:
        found = {"value": function()} if first() else None
    except InputError as error:
        found = {"error": str(error)}
    found = agree(found)
    if "error" in found:
        raise InputError(found["error"])
    return found["value"]


def divided(function: Callable[[np.ndarray], np.ndarray], rows: int) -> np.ndarray:
    """`function` of the indices [rows], to an array that leads with rows; each is computed by one process.

    Raises:
      InputError: on every process, if `function` does in one.
    """
    if not several():
        return function(np.arange(rows))
    share = -(-rows // jax.process_count())
    found, problem = None, ""
    try:
        # All shares have one size; the last are filled up by repeating the last row.
        found = function(np.minimum(np.arange(share) + share * jax.process_index(), rows - 1))
    except InputError as error:
        problem = str(error)
    problems = [told for told in _exchange("problem", problem) if told]
    if problems:
        raise InputError(problems[0])
    return multihost_utils.process_allgather(found, tiled=True)[:rows]


@contextlib.contextmanager
def first_then_others() -> Iterator[None]:
    """What is within runs in the first process, and when it is done there, in all others, which find its files."""
    if not first():
        wait("first")
    try:
        yield
    finally:
        if first():
            wait("first")


def fetch(tree: Any) -> Any:
    """The whole arrays of a tree in the memory of every host."""
    return addressable(tree) if several() else jax.device_get(tree)


def addressable(tree: Any) -> Any:
    """Arrays of which every process can read all: as they are where there is one process, otherwise as by `fetch`."""
    if not several():
        return tree

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def explain(error: Exception) -> str | None:
    """The remedy for an error that the end of another process may explain, or None where there is no other process.

    By the error alone, a lost process looks like a program that fails on all of them.
    """
    text = str(error)
    if not several() or not isinstance(error, jax.errors.JaxRuntimeError) or not text.startswith(_OF_OTHERS):
        return None
    return (
        f"A program over all processes failed, most likely because one of them ended ({text.splitlines()[0]}). "
        "The same command on all hosts, or on another number of them, goes on from the last checkpoint. If it ends so "
        "again though all hosts are well, the error is the program's own."
    )


def leave(code: int) -> NoReturn:
    """Ends the process at once: a usual exit would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exchange(name: str, mine: str) -> list[str]:
    """What every process gives, in their order."""
    turn = next(_turns)
    _client().key_value_set(f"{name}-{turn}-{jax.process_index()}", mine)
    return [
        _client().blocking_key_value_get(f"{name}-{turn}-{index}", 1000 * PATIENCE_SECONDS)
        for index in range(jax.process_count())
    ]


def _client() -> Any:
    # jax's public exchange is a program over all devices: it cannot be made where processes differ in their devices,
    # and waits for no host's work.
    return _state().client


def _state() -> Any:
    from jax._src import distributed  # the store of strings behind jax.distributed has no public name

    return distributed.global_state
