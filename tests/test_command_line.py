"""Bad input on the command line: exit code 2 and one paragraph with the value and the fix, before any work is done."""

import dataclasses
import errno
import os
import shlex
import socket
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import ctrl_jax
from ctrl_jax import __main__ as command_line
from ctrl_jax import config
from ctrl_jax.commands import export, ideal, options, runs, sweep
from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.errors import InputError
from ctrl_jax.runtime import hosts, platform, stages
from ctrl_jax.runtime.preemption import Preempted


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls the command line with bad input, and returns what it says on standard error."""
    monkeypatch.chdir(Path(__file__).parents[1])
    # It would serve the tests that come after, too.
    monkeypatch.setattr(platform, "setup_compilation_cache", lambda directory: directory)

    def folders() -> set[Path]:
        return {path for path in (tmp_path / "runs").rglob("*") if path.is_dir() and not path.name.startswith(".")}

    def call(*arguments: str, places: bool = True) -> str:
        before = folders()
        if places:
            arguments = (*arguments, "--runs-dir", str(tmp_path / "runs"))
        try:
            code = command_line.main(list(arguments))
        except SystemExit as exit:  # tyro's own way out
            code = exit.code
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        # Generated data may be left, and serves the next command; a work directory or another stage may not.
        left = [path for path in folders() - before if path.relative_to(tmp_path / "runs").parts[0] != "stages"]
        assert left == []
        assert [path.name for path in tmp_path.glob("runs/stages/*") if not path.name.startswith("data-")] == []
        assert before or not (tmp_path / "runs").exists() or list(tmp_path.glob("runs/stages/data-*/tfds"))
        if "--debug" not in arguments:
            assert "Traceback" not in printed.err
            assert len(printed.err.strip().split("\n\n")) == 1
        # A box is drawn around what tyro says, with its lines broken anywhere.
        return " ".join(printed.err.replace("│", " ").split())

    return call


def test_an_unknown_job(refused):
    told = refused("trian", "smoke", places=False)
    assert "'trian'" in told
    assert "Did you mean train?" in told


def test_a_missing_experiment(refused):
    assert "'train' needs the name of an experiment" in refused("train", places=False)
    assert "'train' needs the name of an experiment" in refused("train", "--policy.kl-budget", "1", places=False)


def test_an_unknown_experiment_is_told_the_nearest(refused):
    told = refused("train", "bon_helpfull", places=False)
    assert "'bon_helpfull'" in told
    assert "Did you mean bon_helpful" in told


@pytest.mark.parametrize("name", ["", ".", "/", "x" * 5000, "a\0b", "*", "experiments", "no/such/run"])
def test_what_names_neither_an_experiment_nor_a_run(refused, name):
    told = refused("train", name, places=False)
    assert "There is no experiment" in told or "is a folder without config.json" in told


def test_a_folder_without_experiments(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = refused("train", "smoke", places=False)
    assert "no folder experiments/" in told
    assert str(tmp_path) in told


def test_a_file_that_is_no_experiment(refused, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    told = refused("train", str(path), places=False)
    assert f"{path} has no experiment()" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--policy.kl-budgt", "0.5"], ["--policy.kl-budgt", "Perhaps you meant: --policy.kl-budget"]),
        (["--policy.kl-budget", "much"], ["--policy.kl-budget", "'much'", "nats per response"]),
        (["--sft.steps", "1.5"], ["--sft.steps", "'1.5'"]),
        (["--data.source", "hopeful"], ["'hopeful'", "dialogues/helpful", "hh_rlhf/harmless-base"]),
        (["--policy.kl-budget", "-1"], ["Policy.kl_budget is -1.0", "above 0"]),
        (["--policy.procedure", "best_of_33"], ["'best_of_33'", "needs 33", "is 32", "raise it to at least 33"]),
        (["--evaluation.responses-per-prompt", "3"], ["responses_per_prompt is 3", "raise it to at least 4"]),
        (["--calibration.samples-per-prompt", "1"], ["samples_per_prompt is 1", "at least 2"]),
        (["--policy.samples-per-prompt", "1"], ["samples_per_prompt is 1", "at least 2"]),
        (["--policy.transform", "identiti"], ["'identiti'", "Did you mean identity"]),
        (["--devices", "9"], ["9 devices asked for, but there are 8", "xla_force_host_platform_device_count=9"]),
        (["--devices", "0"], ["0 devices asked for", "Ask for 1 to 8"]),
        (["--fsdp", "3"], ["--fsdp is 3", "8 devices do not divide", "a divisor of 8"]),
        (["--model-parallel", "8", "--model.mlp-width", "60"], ["kernel", "axis mlp of 60", "such as 4"]),
        (["--policy.prompts-per-step", "12"], ["--policy.prompts-per-step is 12", "8 devices", "8 or 16"]),
        (["--sft.batch-size", "4"], ["--sft.batch-size is 4", "8 devices", "Make it 8"]),
        (["--reward-model.batch-size", "31"], ["--reward-model.batch-size is 31", "24 or 32"]),
        (["--data.source", "jsonl", "--data.path", "no[x]where.jsonl"], ["no[x]where.jsonl"]),
        (["--calibration.prompts", "9999"], ["9999 train prompts are asked for", "Ask for fewer"]),
        (["--evaluation.prompts", "9999"], ["9999 test prompts are asked for", "Ask for fewer"]),
        (["--data.prompt-length", "3"], ["0 of at most 3 tokens", "let them in (--data.prompt-length)"]),
        (["--data.vocabulary-size", "20"], ["A vocabulary of 20", "more than"]),
        (["--policy.kl-budget", "3", "--policy.transform", "exponential(-50)"], ["KL of 1.381 nats at most", "than 3"]),
    ],
)
def test_a_bad_option(refused, options, told):
    message = refused("train", "smoke", *options)
    for part in told:
        assert part in message


def test_a_bad_option_of_a_sweep_comes_before_its_points(refused):
    assert "Policy.kl_budget" in refused("sweep", "bon_helpful", "--policy.kl-budget", "0")
    assert "has no sweep(); add one" in refused("sweep", "smoke")
    assert "--jobs is 0" in refused("sweep", "bon_helpful", "--jobs", "0")
    assert "no point 'identity'; it has identity_kl0.6" in refused("sweep", "bon_helpful", "--point", "identity")


def test_batch_jobs_of_a_sweep_run_its_points_on_the_same_options(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    runs, jobs = tmp_path / "runs", tmp_path / "jobs"
    options = ["--seed", "3", "--runs-dir", str(runs)]
    written = ["--jobs", "2", f"--write-jobs={jobs}"]
    assert command_line.main(["sweep", "bon_helpful", *options[:2], *written, *options[2:]]) == 0
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(script.stat().st_mode) for script in jobs.iterdir()} == {0o777 & ~umask}
    scripts = {script.stem: script.read_text().splitlines()[-1] for script in jobs.iterdir()}
    points = load_experiment("bon_helpful").sweep()
    assert scripts.keys() == {point.name for point in points}
    for name, line in scripts.items():
        _, command = line.split(" && exec ")
        job = ["-m", "ctrl_jax", "sweep", "experiments/bon_helpful.py", "--point", name, *options]
        assert shlex.split(command) == [sys.executable, *job]
    assert not (runs / "stages").exists()


def test_an_empty_prompt(refused):
    told = refused("sample", "smoke", "--prompt", " ")
    assert "The prompt is empty" in told


def test_a_prompt_longer_than_the_context(refused):
    told = refused("sample", "smoke", "--prompt", "How do I bake bread? " * 20)
    assert "the context holds 40" in told
    assert "shorten it" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--num-samples", "0"], "num_samples is 0"),
        (["--num-samples", "3"], "best_of_4 looks at 4 responses, but there are 3; ask for at least 4"),
        (["--procedure", "bset_of_2"], "'bset_of_2'. Did you mean"),
        (["--max-length", "0"], "max_length is 0; a response has at least 1 token"),
        (
            ["--temperature", "0"],
            "temperature is 0.0; it must be greater than 0. For the likeliest token alone set",
        ),
        (["--temperature", "inf"], "temperature is inf"),
        (["--top-k", "0"], "top_k is 0; draw from at least 1 token"),
        (["--top-p", "1.5"], "top_p is 1.5; it is a probability above 0, up to 1"),
        (["--untrained"], "this experiment starts from scratch. Give a Hugging Face directory, --model.path"),
    ],
)
def test_bad_options_of_sample(refused, options, told):
    assert told in refused("sample", "smoke", *options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--device-kind", "v9"], "--device-kind is 'v9'; it is one of v4, v5e"),
        (["--device-kind", "v5e", "--devices", "256"], "which do not divide by the 256 devices. Give --sft.batch-size"),
        (["--device-kind", "v5e", "--efficiency.matmul", "1.5"], "Efficiency.matmul is 1.5; it is a share"),
    ],
)
def test_bad_options_of_plan(refused, options, told):
    assert told in refused("plan", "smoke", *options, places=False)


def test_bad_options_of_profile(refused):
    assert "--steps is 0" in refused("profile", "smoke", "--steps", "0")


def test_the_work_directory_of_another_experiment(refused, tmp_path):
    claimed = tmp_path / "runs" / "smoke" / "config.json"
    claimed.parent.mkdir(parents=True)
    claimed.write_text('{"name": "other"}')
    told = refused("train", "smoke")
    assert 'name: "other" → "smoke"' in told
    assert "Choose another --work-dir" in told
    assert claimed.read_text() == '{"name": "other"}'


def test_a_report_of_nothing(refused):
    assert "smoke is not a directory" in refused("report", "smoke")


def test_debug_adds_the_traceback(refused):
    told = refused("train", "smoke", "--devices", "9", "--debug")
    assert "Traceback" in told
    assert "9 devices asked for" in told


@pytest.mark.parametrize("argument", ["--prompt=\udcff", "runs/\udce9t\udce9", "\ud800"])
def test_an_argument_that_is_no_text_is_refused(refused, argument):
    told = refused("sample", "smoke", argument)
    assert f"The argument {argument!r} has at character" in told and "no text in UTF-8" in told


def test_a_home_folder_is_expanded_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    kinds = [options.Places, export.Options, sweep.Options, ideal.Options, runs.Options]
    kinds += [config.Data, config.Model, config.RewardModel]
    experiment = config.Experiment("any")
    found = 0
    for kind in kinds:
        needed = {"experiment": experiment} if issubclass(kind, options.Options) else {}
        needed |= {"source": "jsonl"} if kind is config.Data else {"path": "x"} if kind is config.Model else {}
        for field in dataclasses.fields(kind):
            if "Path" in str(field.type) or field.name in ("path", "adapter"):
                made = kind(**{**needed, field.name: "~/x" if "str" in str(field.type) else Path("~/x")})
                assert str(getattr(made, field.name)) == f"{tmp_path}/x"
                found += 1
    assert found == 11
    assert config.Data(source="jsonl", path="a/~/b").path == "a/~/b"


def test_its_version_is_the_packages(capsys):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ctrl_jax {ctrl_jax.__version__}\n"


def test_help_lists_every_job(capsys):
    assert command_line.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {job} " in printed for job in command_line.COMMANDS)


def test_a_work_directory_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    told = refused("train", "smoke", "--work-dir", str(tmp_path / "file" / "work"))
    assert f"{tmp_path}/file/work: Not a directory" in told
    assert "another place: --runs-dir, --work-dir" in told


def test_a_bucket_is_no_work_directory(refused):
    told = refused("train", "smoke", "--work-dir", "gs://bucket/runs/smoke")
    assert "--work-dir is gs://bucket/runs/smoke, an object store" in told
    assert "gcloud storage rsync --recursive FOLDER gs://bucket/runs/smoke" in told


def test_a_work_directory_in_use(refused, tmp_path):
    with stages.exclusive(tmp_path / "work"):
        told = refused("train", "smoke", "--work-dir", str(tmp_path / "work"))
    assert f"{tmp_path}/work is in use by process {os.getpid()} on {socket.gethostname()}" in told


def raising(error):
    def run(arguments):
        raise error

    return run


def test_a_full_disk_is_one_paragraph(refused, monkeypatch):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/smoke/metrics.jsonl")
    monkeypatch.setattr(command_line, "_run", raising(error))
    told = refused("train", "smoke")
    assert "/runs/smoke/metrics.jsonl could not be written: No space left on device" in told
    monkeypatch.setattr(command_line, "_run", raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        command_line.main(["train", "smoke"])


def test_an_error_that_quotes_a_file_does_not_reach_the_terminal_as_it_is(refused, monkeypatch):
    monkeypatch.setattr(command_line, "_run", raising(InputError("row 3 has \x1b]0;owned\x07; mend it")))
    assert r"error: row 3 has \x1b]0;owned\x07; mend it" in refused("train", "smoke")


def test_an_error_that_a_lost_process_may_explain_is_shown_whole(monkeypatch, capsys):
    def leave(code):
        raise SystemExit(code)

    error = jax.errors.JaxRuntimeError("INTERNAL: a program that no device can run\nits second line")
    monkeypatch.setattr(command_line, "_run", raising(error))
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "leave", leave)
    with pytest.raises(SystemExit) as left:
        command_line.main(["train", "smoke"])
    told = capsys.readouterr().err
    assert left.value.code == 75
    assert "Traceback" in told and "its second line" in told
    assert "error: A program over all processes failed" in told and "goes on from the last checkpoint" in told


def test_sigterm_has_an_exit_code_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_run", raising(Preempted("Stopped by SIGTERM.")))
    assert command_line.main(["train", "smoke"]) == 75
    assert "Stopped by SIGTERM. The same command goes on" in capsys.readouterr().err


def test_a_mistyped_option_waits_for_no_library_of_seconds():
    program = """
import sys
from ctrl_jax.__main__ import COMMANDS, main
for command in COMMANDS.keys() - {"plan"}:  # whose options are still with what computes
    experiment = [] if command in ("ideal", "runs") else ["smoke"]
    try:
        code = main([command, *experiment, "--mistyped", "1"])
    except SystemExit as exit:
        code = exit.code
    slow = {"orbax", "tensorflow_datasets", "flax", "optax"} & sys.modules.keys()
    assert code == 2 and not slow, (command, code, slow)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
