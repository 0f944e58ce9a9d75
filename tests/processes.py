"""Several processes that run one program together, on one CPU device each."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    code: int
    printed: str
    errors: str


class Job:
    """`program` in `count` processes; process i also has the Python statements `first[i]`, where it is given."""

    def __init__(self, program: str, count: int, *, arguments: tuple[str, ...] = (), options: str = "", **first: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes: list[subprocess.Popen] = []
        self._outputs = []
        for index in range(count):
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": options,
                "COLUMNS": "200",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            # Files, not pipes: nobody reads while all of them are waited for.
            outputs = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
            command = [sys.executable, "-c", f"{first.get(f'process_{index}', '')}\n{program}", *arguments]
            self.processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=outputs[0], stderr=outputs[1])
            )
            self._outputs.append(outputs)

    def wait(self, timeout: float) -> list[Ended]:
        """How all of them ended. Those that have not when the time is up are killed, as by -9, which shows."""
        try:
            for process in self.processes:
                process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        ended = []
        for process, outputs in zip(self.processes, self._outputs, strict=True):
            code = process.wait()
            texts = []
            for file in outputs:
                file.seek(0)
                texts.append(file.read())
                file.close()
            ended.append(Ended(code, *texts))
        return ended

    def kill(self) -> None:
        for process in self.processes:
            # SIGTERM would be taken for a preemption.
            process.send_signal(signal.SIGKILL)


def run(program: str, count: int, *arguments: str, timeout: float = 120, **options: str) -> list[Ended]:
    """What `count` processes print, which all have to end well."""
    ended = Job(program, count, arguments=arguments, **options).wait(timeout)
    assert [one.code for one in ended] == [0] * count, "\n".join(one.errors[-3000:] for one in ended)
    return ended
