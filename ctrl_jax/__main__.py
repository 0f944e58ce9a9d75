"""The command line: `ctrl-jax train bon_helpful --policy.kl-budget 0.5`, or `python -m ctrl_jax` for `ctrl-jax`."""

import importlib
import os
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import TextIO

if __name__ == "__main__":
    # Until the libraries are imported, nothing is begun; `preemption.run` takes over from there.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))

# Before jax is imported: XLA logs an error for every program that it takes from the compilation cache, about
# instruction-set preferences that are not instructions.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from ctrl_jax.errors import InputError
from ctrl_jax.runtime.console import printable

COMMANDS = {
    "train": "run whatever stages are missing, train the policy, evaluate, report",
    "sft": "only the reference policy",
    "reward-model": "only the reward model, and what it needs",
    "calibrate": "only the calibration table, and what it needs",
    "evaluate": "win rates and KL of the policy, with intervals",
    "export": "write the policy as a Hugging Face directory, merged or as an adapter, or the reward model",
    "report": "write report/index.html from an evaluated work directory",
    "sample": "a local page to ask the policy and the reference something (--terminal: a table)",
    "replay": "take the step again at which a training stopped as not finite, and show what went wrong first",
    "runs": "the runs below runs/, with their state and main numbers",
    "compare": "two finished runs on the same prompts: differences with paired intervals",
    "judge": "win rates of responses that any engine sampled and scored, from two files",
    "choose-n": "from such files: what best-of-N wins over N, where it turns down, and what N responses risk",
    "decode": "a policy under any decoders: win rates, tokens spent, and the procedure to train for",
    "sweep": "every point of the experiment's sweep(), ending in the Pareto figure",
    "plan": "what an experiment would cost on devices that need not be here: time and memory by phase",
    "profile": "a trace of a few policy steps, and where their time went",
    "ideal": "the theory alone: win rates of ideal policies",
    "explore": "the theory in a page, with sliders for procedure, N, KL and transform",
}
"""Each is the module of its name in commands/, with `main(arguments) -> exit code`."""


def main(arguments: list[str] | None = None) -> int:
    from ctrl_jax.commands.flags import spelled
    from ctrl_jax.runtime import console, disk, hosts, preemption

    arguments = sys.argv[1:] if arguments is None else arguments
    console.print_anything()
    try:
        with console.spelling_fields(spelled), preemption.raising():
            return _run(arguments)
    except InputError as error:
        return _fail(error, str(error), arguments)
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint.", file=sys.stderr)
        return preemption.INTERRUPTED
    except preemption.Preempted as preempted:
        print(f"{printable(str(preempted))} The same command goes on from there.", file=sys.stderr)
        return preemption.EXIT_CODE
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more
        code = 128 + signal.SIGPIPE
        if hosts.several():
            hosts.leave(code)
        return code
    except hosts.NotJoined as error:
        print(f"error: {error}", file=sys.stderr)
        hosts.leave(preemption.EXIT_CODE)
    except Exception as error:  # Orbax and tensorstore have types of their own for a full disk
        reason = disk.explain(error)
        if reason is not None:
            return _fail(error, reason, arguments)
        reason = hosts.explain(error)
        if reason is None:
            raise
        traceback.print_exception(error)  # a guess alone would hide an error of the program's own
        print(f"error: {reason}", file=sys.stderr)
        hosts.leave(preemption.EXIT_CODE)


def _is_unread(stream: TextIO) -> bool:
    """Whether it is a pipe whose reader has gone, as that of `ctrl-jax train bon_helpful --help | head` does."""
    ends = select.poll()
    ends.register(stream, 0)
    return any(event & select.POLLERR for _, event in ends.poll(0))


def _fail(error: Exception, paragraph: str, arguments: list[str]) -> int:
    from ctrl_jax.commands.flags import spelled

    if "--debug" in arguments:
        traceback.print_exception(error)
    else:
        # It may quote a prompt, or a file's name.
        print(f"error: {printable(spelled(paragraph))}", file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> int:
    from ctrl_jax.commands.experiments import nearest
    from ctrl_jax.runtime import platform, shipped

    platform.check_jaxlib()
    platform.pin_jax()
    _check_letters(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        print(f"ctrl_jax {importlib.import_module('ctrl_jax').__version__}")
        return 0
    if arguments[0] == "--completion":
        print(importlib.import_module("ctrl_jax.commands.completion").script(COMMANDS))
        return 0
    shipped.make_importable()
    command, *rest = arguments
    if command not in COMMANDS:
        near = nearest(command, COMMANDS)
        raise InputError(f"There is no job {command!r}.{near} The jobs are {', '.join(COMMANDS)}.")
    # Imported only now, as each imports its libraries when its options are read: a mistyped one should not wait.
    module = importlib.import_module(f"ctrl_jax.commands.{command.replace('-', '_')}")
    code: int = module.main(rest)
    return code


def _check_letters(arguments: list[str]) -> None:
    """Refuses bytes that are no UTF-8, which Python reads as lone surrogates: no file could be written of them."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The argument {argument!r} has at character {error.start + 1} what is no text in UTF-8. Type it "
                "again; if it is the name of a file, rename that."
            ) from None


def _usage() -> str:
    width = max(map(len, COMMANDS))
    jobs = "\n".join(f"  {job:{width}}  {text}" for job, text in COMMANDS.items())
    return (
        f"python -m ctrl_jax JOB EXPERIMENT [options]\n\n{jobs}\n\n"
        "EXPERIMENT names a file of experiments/, here or shipped. Options are the fields of its configuration, such\n"
        "as --policy.kl-budget 0.5; `python -m ctrl_jax train bon_helpful --help` lists them. The folder of a run,\n"
        "such as runs/bon_helpful, serves in its place: it has its options, and takes no others. --version says which\n"
        "version this is, and --completion prints what a shell needs to complete all this."
    )


def entry() -> None:
    """The command `ctrl-jax`, which finds modules of the current folder as `python -m ctrl_jax` does."""
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    from ctrl_jax.runtime import preemption

    preemption.run(main)


if __name__ == "__main__":
    entry()
