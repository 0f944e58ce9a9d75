import gzip
import json

import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.planning import profile
from ctrl_jax.planning.profile import Op
from tests.trained import CommandLine

PROGRAM = """HloModule jit_update, is_scheduled=true

%fused_computation (param_0.1: f32[3]) -> f32[3] {
  %param_0.1 = f32[3]{0} parameter(0)
  ROOT %multiply.1 = f32[3]{0} multiply(%param_0.1, %param_0.1), metadata={op_name="jit(update)/jvp(Decoder.above)/mul" stack_frame_id=1}
}

ENTRY %main.5 (arg: f32[3]) -> f32[3] {
  %arg = f32[3]{0} parameter(0), metadata={op_name="state"}
  %add.7 = f32[3]{0} add(%arg, %arg), metadata={op_name="jit(update)/add" source_file="a.py"}
  %copy.3 = f32[3]{0} copy(%arg)
  %copy.4 = f32[3]{0} copy(%add.7)
  ROOT %multiply_fusion = f32[3]{0} fusion(%add.7, %copy.3), kind=kLoop, calls=%fused_computation
}
"""  # noqa: E501


def test_ops_are_named_by_the_programs_text():
    names = profile.source_names(PROGRAM)
    assert names["jit_update", "add.7"] == "jit(update)/add"
    # It has no name itself: that of what it fuses.
    assert names["jit_update", "multiply_fusion"] == "jit(update)/jvp(Decoder.above)/mul"
    # The compiler's own: by its operand, or, where that is an argument, by what uses it.
    assert names["jit_update", "copy.4"] == "copy after jit(update)/add"
    assert names["jit_update", "copy.3"] == "copy after jit(update)/jvp(Decoder.above)/mul"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(sample)/while/body/Decoder.read_token/layers_0.finish/mul", "decode: layers"),
        ("jit(sample)/while/body/Decoder.unembed/dot_general", "output projection"),
        ("jit(sample)/Decoder.read_prompts/layers_1.project/sin", "prefill"),
        ("jit(sample)/while/body/jit(take_along_axis)/gather", "drawing tokens"),
    ],
)
def test_parts_of_sampling(name, part):
    assert profile.part_of_sampling(name) == part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jit(update)/transpose(jvp(Decoder.above))/Decoder._responses_through/layers_0.finish/mul", "backward"),
        ("jit(update)/jvp(Decoder.above)/Decoder._prompts_through/mul", "reference, policy, loss: forward"),
        ("jit(update)/sqrt", "optimiser, metrics"),
    ],
)
def test_parts_of_the_update(name, part):
    assert profile.part_of_update(name) == part


def test_busy_is_the_union_over_threads():
    ops = [Op("", "a", 0, 10), Op("", "b", 2, 3), Op("", "c", 8, 4), Op("", "d", 20, 5)]
    assert profile.busy(ops) == 12 + 5
    assert profile.busy([]) == 0


def test_a_trace_is_read_without_ops_that_hold_others(tmp_path):
    def event(op, **more):
        return {"ph": "X", "ts": 1.0, "dur": 2.0, "name": op, "args": {"hlo_op": op, "hlo_module": "jit_f"}, **more}

    events = [event("add.1"), event("while.2"), event("call"), event("while_fusion"), {"ph": "M", "name": "thread"}]
    path = tmp_path / "vm.trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [*events, {}]}, file)
    assert profile.read_trace(path) == [Op("jit_f", "add.1", 1.0, 2.0), Op("jit_f", "while_fusion", 1.0, 2.0)]


def test_steps_are_positive():
    with pytest.raises(InputError, match="`steps` is 0"):
        profile.run(None, None, None, steps=0)


def test_a_profile_of_smoke(tmp_path):
    command_line = CommandLine(tmp_path / "runs", tmp_path / "cache")
    code, printed, errors = command_line.run("profile", "--steps", "2")
    assert code == 0, errors
    work_dir = command_line.runs_dir / "smoke"
    # No stage was run, and nothing of a training was written.
    assert [path.name for path in work_dir.iterdir()] == ["profile"]
    assert not (command_line.runs_dir / "stages").exists()
    assert len([*work_dir.glob("profile/plugins/profile/*/*.trace.json.gz")]) == 1

    found = json.loads((work_dir / "profile" / "profile.json").read_text())
    assert found["steps"] == 2
    # 8 prompts × 4 responses × 24 tokens.
    assert found["tokens_per_second"] == pytest.approx(8 * 4 * 24 / found["step_seconds"])
    assert found["model_flops_utilisation"] == pytest.approx(
        found["model_flops"] / found["step_seconds"] / found["peak_flops"]
    )
    assert set(found["program_seconds"]) == set(found["compile_seconds"]) == {"sample", "score", "update"}
    for program, parts in (
        ("sample", {"prefill", "decode: layers", "drawing tokens", "output projection"}),
        ("update", {"reference, policy, loss: forward", "backward", "optimiser, metrics"}),
    ):
        shares = found["shares"][program]
        assert sum(shares.values()) == pytest.approx(1)
        assert parts <= set(shares)
        assert shares.get("unnamed", 0) < 0.3
    assert 0 <= found["idle_share"] < 1
    assert len(found["heaviest"]) == 10
    assert found["heaviest"][0]["share"] >= found["heaviest"][-1]["share"] > 0
    for text in ("random weights", "Where a step's time goes", "The heaviest ops", "model-FLOPs utilisation"):
        assert text in printed
