"""Whether other processes computed while something was timed, from the kernel's own accounts."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
"""A second has this many in /proc, which thus resolves 10 ms."""


@dataclass(frozen=True)
class Busy:
    """CPU seconds since the start of the machine, and of the processes that are ours."""

    machine: float
    ours: float


def machine_seconds(stat: str) -> float:
    """Busy CPU seconds, from the text of /proc/stat: all but idle and waiting for disks.

    Time that a hypervisor gave to others (steal) is busy: the processor was not ours. Guests are part of user and nice.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_guests = map(int, stat.splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / TICKS


def process_seconds(stat: str) -> float:
    """User and system seconds of a process, its threads and its ended children, from the text of /proc/PID/stat."""
    # The second field is the command in parentheses, which may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def read(processes: Iterable[int]) -> Busy | None:
    """The accounts now, `processes` and this one being ours; None on a system without /proc/stat."""
    try:
        machine = machine_seconds(Path("/proc/stat").read_text(encoding="utf-8"))
        ours = sum(
            process_seconds(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")) for pid in {*processes, os.getpid()}
        )
    except (OSError, ValueError):
        return None
    return Busy(machine, ours)


def foreign_cores(before: Busy, after: Busy, seconds: float) -> float:
    """How many cores' worth of time others had between two readings `seconds` apart."""
    return max(0.0, (after.machine - before.machine) - (after.ours - before.ours)) / seconds
