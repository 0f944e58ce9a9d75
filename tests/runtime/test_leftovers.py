"""What a job that fails leaves: nothing where it made nothing, all of what it made."""

import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.runtime import leftovers
from ctrl_jax.runtime.stages import Stage, claim, exclusive


@pytest.fixture(params=[InputError, KeyboardInterrupt, SystemExit])
def fails(request, tmp_path):
    """Runs a job in runs/work and runs/stages that does `work` and fails, and returns the files that are left."""

    def run(work):
        work_dir, stages_dir = tmp_path / "runs" / "work", tmp_path / "runs" / "stages"
        with pytest.raises(request.param), leftovers.removed_on_failure(work_dir, stages_dir):
            work(work_dir, stages_dir)
            raise request.param("failed")
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}

    return run


def claimed(work_dir, stages_dir):
    stages_dir.mkdir(parents=True, exist_ok=True)
    with exclusive(work_dir):
        claim(work_dir, {"name": "x"})


def opened(name):
    def work(work_dir, stages_dir):
        claimed(work_dir, stages_dir)
        stage = Stage.open(stages_dir, name, {"of": "this"})
        with stage.exclusive():
            (stage.directory / "checkpoints").mkdir()
            (stage.directory / "metrics.jsonl").touch()

    return work


@pytest.mark.parametrize("work", [lambda *_: None, claimed, opened("data"), opened("sft")])
def test_nothing_is_left_of_nothing(fails, work):
    assert fails(work) == set()


def test_a_folder_that_was_there_stays_empty(fails, tmp_path):
    (tmp_path / "runs" / "work").mkdir(parents=True)
    assert fails(opened("sft")) == {"runs", "runs/work"}


def test_what_was_made_stays_with_its_claim(fails):
    def work(work_dir, stages_dir):
        opened("sft")(work_dir, stages_dir)
        (path,) = stages_dir.glob("sft-*")
        (path / "checkpoints" / "5").write_text("a policy")

    left = fails(work)
    assert "runs/work/config.json" in left and any(name.endswith("checkpoints/5") for name in left)


def test_data_stays_but_claims_nothing(fails):
    def work(work_dir, stages_dir):
        opened("data")(work_dir, stages_dir)
        (path,) = stages_dir.glob("data-*")
        (path / "done.json").write_text("{}")

    left = fails(work)
    assert "runs/work" not in left and any(name.endswith("done.json") for name in left)


def test_what_belongs_to_others_stays(fails, tmp_path):
    def work(work_dir, stages_dir):
        # Another process came after this one looked.
        claimed(work_dir, stages_dir)
        Stage.open(stages_dir, "sft", {})
        stack.append(exclusive(work_dir))
        stack[-1].__enter__()

    stack = []
    left = fails(work)
    assert {"runs/work/config.json", "runs/work/lock"} <= left
    stack[-1].__exit__(None, None, None)


def test_a_claim_from_before_stays(fails, tmp_path):
    claimed(tmp_path / "runs" / "work", tmp_path / "runs" / "stages")
    before = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert fails(opened("sft")) == before


def test_success_leaves_all(tmp_path):
    with leftovers.removed_on_failure(tmp_path / "work", tmp_path / "stages"):
        claimed(tmp_path / "work", tmp_path / "stages")
    assert (tmp_path / "work" / "config.json").exists()
