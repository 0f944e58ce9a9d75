"""What a work directory holds is one experiment's, of one content of its files: how that is known, and kept so.

`config.json` says what experiment and contents the rest was made of, `policy.json` what the policy that is trained here
depends on, and `results.json`, the seal of the evaluation, comes last.
"""

import shutil
from pathlib import Path
from typing import Any

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import checksums, hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import differences, fingerprint, plain, read_json, set_aside, write_json

RESULTS = "results.json"
POLICY = "policy.json"
SEALED = ("evaluation.json", "evaluation.npz", "samples.jsonl", "scored.npz", "metrics.jsonl")
"""What `results.json` covers."""
_OF_EVALUATION = (
    RESULTS, "evaluation.json", "evaluation.npz", "samples.jsonl", "scored.npz", "report", "measured_along",
)  # fmt: skip
_OF_POLICY = (
    *_OF_EVALUATION, "config.json", "environment.json", POLICY, "checkpoints", "kept_along", "metrics.jsonl",
    "tensorboard", "failed", "export", "export-adapter", "export-reward",
)  # fmt: skip

PATHS = {
    "data.path": "contents.data",
    "model.path": "contents.model",
    "model.adapter": "contents.adapter",
    "reward_model.path": "contents.reward_model",
    "combine.rewards": "contents.combined_rewards",
}
"""Options that name places of files. Fingerprints have their contents, and a result depends on those alone."""
# These change when an update is saved, how it is computed, or what else is kept, but for rounding not what it is.
_OF_NO_RESULT = ("checkpoint_every", "micro_batches", "rematerialize", "keep_responses")


def without_neutral(options: Any) -> Any:
    """A configuration without the options that change no result."""
    match plain(options):
        case dict() as fields:
            return {name: without_neutral(value) for name, value in fields.items() if name not in _OF_NO_RESULT}
        case value:
            return value


def may_differ(names: set[str]) -> set[str]:
    """Of the fields in which a `config.json` differs from the command's, those that leave the directory the same one's:
    contents of files, of which what depends on them is made anew; places of files of equal contents; and options that
    change no result."""
    contents = {name for name in names if name.startswith("contents.")}
    changed = {".".join(name.split(".")[:2]) for name in contents}
    moved = {path for path, content in PATHS.items() if content not in changed}
    neutral = {name for name in names if name.rpartition(".")[2] in _OF_NO_RESULT}
    return contents | (names & moved) | neutral


def identity(config: dict[str, Any]) -> str:
    """The fingerprint of all in a `config.json` that a result depends on."""
    flat = {name: new for name, (_, new) in differences({}, without_neutral(config)).items()}
    return fingerprint({name: value for name, value in flat.items() if name not in PATHS})


def is_of(work_dir: Path, config: dict[str, Any]) -> bool:
    """Whether a work directory holds the whole results of this configuration."""
    seal = work_dir / RESULTS
    return not checksums.broken(seal) and checksums.about(seal)["run"] == identity(config)


def restore_config(work_dir: Path, config: dict[str, Any]) -> None:
    """Writes `config.json` again where it says another configuration than the results, which are this one's."""
    path = work_dir / "config.json"
    if not (path.exists() and (work_dir / RESULTS).exists() and is_of(work_dir, config)):
        return
    try:
        same = identity(read_json(path)) == identity(config)
    except InputError:
        same = False
    if not same:
        place = set_aside(work_dir, "damaged", [path.name])
        write_json(path, config)
        say(f"{path} is not what was written. It is set aside in {place.name}, and written again.", style="yellow")


def check(work_dir: Path) -> None:
    """Refuses a work directory whose results are damaged, or of several runs.

    Raises:
      InputError: naming the file and the fix.
    """
    seal, again = work_dir / RESULTS, "The same `train` command makes the evaluation anew; the trained policy is kept."
    if not (work_dir / "evaluation.json").exists() and not seal.exists():
        return  # not evaluated yet, which its reader says
    broken = checksums.broken(seal)
    if broken:
        raise InputError(f"{work_dir / broken[0]} is missing or not what was written with {seal.name}. {again}")
    config = work_dir / "config.json"
    if config.exists() and checksums.about(seal)["run"] != identity(read_json(config)):
        raise InputError(f"{config} is not the configuration that evaluation.json beside it is the result of. {again}")


def seal(work_dir: Path, config: dict[str, Any], **about: Any) -> None:
    """Says that the evaluation is whole, and of this configuration."""
    if hosts.first():
        names = [name for name in SEALED if (work_dir / name).exists()]
        write_json(work_dir / RESULTS, checksums.sealed(work_dir, names, {"run": identity(config), **about}))


def unseal(work_dir: Path) -> None:
    """Takes back that the evaluation is whole, before it is written anew."""
    if hosts.first():
        (work_dir / RESULTS).unlink(missing_ok=True)


def set_damaged_aside(work_dir: Path) -> bool:
    """Whether the evaluation is whole; what is damaged is set aside and said, so that it is made anew."""
    seal = work_dir / RESULTS
    if not seal.exists():
        if (work_dir / "evaluation.json").exists():
            say(f"{work_dir} has no {RESULTS}: its evaluation was not finished, and is made anew.", style="yellow")
        return False
    broken = checksums.broken(seal)
    if not broken:
        return True
    place = set_aside(work_dir, "damaged", [RESULTS, *broken])
    say(
        f"{work_dir}: {', '.join(broken)} is missing or not what was written. The "
        f"evaluation is made anew; what was there is in {place}.",
        style="yellow",
    )
    return False


def renew(work_dir: Path, config: dict[str, Any], policy: dict[str, Any]) -> None:
    """Makes the work directory that of this configuration, before its policy is trained or read.

    What is there of other contents is set aside, nothing is deleted: all of it where the policy depends on what
    changed, otherwise the evaluation.

    Args:
      policy: what the policy depends on besides the options, in clear.
    """
    if not hosts.first():
        return
    described = work_dir / POLICY
    # A seal of no file but itself. Where it is damaged, the checkpoints know whether they are of this policy.
    before = None if checksums.broken(described) else checksums.about(described)
    changed = {} if before is None else differences(before, policy)
    stale = (work_dir / RESULTS).exists() and not is_of(work_dir, config)
    if changed:
        place = set_aside(work_dir, "superseded", _OF_POLICY)
        say(
            f"{work_dir}: what its policy was made of has changed ({', '.join(changed)}). The "
            f"policy and its evaluation are made anew; what was there is in {place}.",
            style="yellow",
        )
    elif stale:
        place = set_aside(work_dir, "superseded", _OF_EVALUATION)
        for name in ("config.json", "metrics.jsonl"):  # which a report of it reads
            if (work_dir / name).exists():
                shutil.copy(work_dir / name, place / name)
        say(
            f"{work_dir}: what its evaluation was made of has changed. It is made anew, of the "
            f"same policy; what was there is in {place}.",
            style="yellow",
        )
    write_json(work_dir / "config.json", config)
    write_json(described, checksums.sealed(work_dir, (), plain(policy)))
