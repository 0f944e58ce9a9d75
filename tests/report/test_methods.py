"""Methods at equal KL, beside straight lines that NumPy draws between the means of their runs."""

import numpy as np
import pytest

from ctrl_jax.report import methods
from ctrl_jax.report.measurements import Run, read_run
from tests.report import synthetic

PROCEDURE = "best_of_4"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[Run]]:
    """A baseline at three strengths, methods that reach as far and less far, and one with a single run."""
    folder = tmp_path_factory.mktemp("methods")

    def run(name: str, transform: str, kl: float, seed: int = 0) -> Run:
        synthetic.write_work_dir(
            folder / name, transform=transform, procedure=PROCEDURE, kl=kl, seed=seed,
            names=("sampling", PROCEDURE), along=(), samples=1,
        )  # fmt: skip
        return read_run(folder / name)

    return {
        "exponential(10)": [run(f"exponential_{kl}", "exponential(10)", kl) for kl in (0.9, 0.3, 0.6)],
        "GRPO": [run(f"grpo_{kl}", "identity", kl) for kl in (0.2, 0.7)],
        "DPO": [run(f"dpo_{kl}", "identity", kl) for kl in (0.35, 0.5)],
        "far": [run(f"far_{kl}", "identity", kl) for kl in (1.5, 2.0)],
        "single": [run("single", "identity", 0.6)],
        "another": [run("another", "identity", 0.2, seed=1), run("another_2", "identity", 0.7, seed=1)],
    }


def means(runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    ordered = sorted(runs, key=lambda run: run.arrays["kl"].mean())
    return (
        np.array([run.arrays["kl"].mean() for run in ordered]),
        np.array([run.evaluation.win_rates[PROCEDURE].mean for run in ordered]),
    )


def test_each_method_is_on_its_line_at_the_kls_of_the_baselines_runs(runs):
    found, notes = methods.at_equal_kl(runs, "exponential(10)", PROCEDURE)
    kls, theirs = means(runs["exponential(10)"])
    assert {(one.method, round(one.kl, 6)) for one in found} == {
        ("GRPO", round(kls[0], 6)),
        ("GRPO", round(kls[1], 6)),
        ("DPO", round(means(runs["DPO"])[0][-1], 6)),  # it spans none of the baseline's: at its own last
    }
    for one in found:
        ours = np.interp(one.kl, *means(runs[one.method]))
        assert one.difference.run == pytest.approx(ours, abs=1e-6)
        assert one.difference.baseline == pytest.approx(np.interp(one.kl, kls, theirs), abs=1e-6)
        estimate = one.difference.difference
        assert estimate.mean == pytest.approx(one.difference.run - one.difference.baseline, abs=1e-6)
        assert estimate.low is not None and estimate.low < estimate.mean < estimate.high
    assert methods.at_equal_kl(runs, "nobody", PROCEDURE) == ([], [])
    assert [note.split(" ")[0] for note in notes] == ["far", "single"], notes
    assert "have no KL in common" in notes[0] and "no two runs of unlike KL" in notes[1]


def test_the_order_of_the_runs_does_not_matter(runs):
    backwards = {name: found[::-1] for name, found in runs.items()}
    assert methods.at_equal_kl(backwards, "GRPO", PROCEDURE) == methods.at_equal_kl(runs, "GRPO", PROCEDURE)


def test_runs_beside_other_responses_of_the_reference_are_apart(runs):
    """Also those of the baseline, and whatever comes first."""
    both = {"exponential(10)": [*runs["another"], *runs["exponential(10)"]], "GRPO": runs["GRPO"]}
    alone = {"exponential(10)": runs["exponential(10)"], "GRPO": runs["GRPO"]}
    expected = methods.at_equal_kl(alone, "exponential(10)", PROCEDURE)
    assert methods.at_equal_kl(both, "exponential(10)", PROCEDURE) == expected
    backwards = {"GRPO": runs["GRPO"], "exponential(10)": both["exponential(10)"][::-1]}
    assert methods.at_equal_kl(backwards, "exponential(10)", PROCEDURE) == expected
    assert expected.found


def test_a_run_whose_kl_is_that_of_the_next_is_left_out_with_a_word(runs):
    twice = {**runs, "DPO": [*runs["DPO"], runs["DPO"][1]]}
    assert any(
        "1 of the 3 runs of DPO are left out" in note for note in methods.at_equal_kl(twice, "GRPO", PROCEDURE).notes
    )
