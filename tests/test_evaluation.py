import json
import math
from typing import Any

import numpy as np
import pytest

from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Estimate, Evaluation
from tests.report import synthetic

NAMES = ("sampling", "best_of_4", "worst_of_4")


POINT = {"step": 10, "kl": {"mean": 0.1, "low": 0.05, "high": 0.15},
         "win_rates": {"best_of_4": {"mean": 0.6, "low": 0.5, "high": 0.7}}}  # fmt: skip


FLOORS = {"a:b": {"mean_rank": {"mean": 0.5, "low": 0.4, "high": 0.6}, "floor": 0.5}}


def written(**changes: Any) -> dict[str, Any]:
    """What an evaluation.json may hold."""
    arrays = synthetic.rewards(np.random.default_rng(0), "exponential(10)", "best_of_4", 0.7, 40, 8)
    tree = synthetic.evaluation(arrays, "exponential(10)", 0.7, NAMES)
    return json.loads(json.dumps(tree | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kl_standard_error": 0.01},
        {"kl": {"mean": 0.5, "low": None, "high": None}},
        {"judge": None, "judge_win_rates": {}, "gold_win_rates": {}},
        {"reward_model": {}},
        {"reward_training": {"pairs": 8, "cut": 3, "dropped": 1}},
        {"reward_signal": {"length_correlation": {"mean": -0.2, "low": -0.4, "high": 0.1}}},
        {"reward_signal": {"learnability": {"mean": 0.2, "low": None, "high": None}}},
        {"reward_training": {"pairs": 8, "cut": 0, "dropped": 0, "steps": 6, "used_step": 4, "validation_pairs": 2}},
        {"reward_model": {"pairs": 8, "agreements": 5, "equal": 1}},
        {"reward_model": {"accuracy": 0.6, "brier": 0.2, "margin_length_correlation": -0.4}},
        {"ideal": {"sampling": {"identity": 0.6, "optimal": 0.6}, "best_of_4": {}}},
        {"along": [POINT, {**POINT, "step": 20, "win_rates": {}}]},
        {"floors": FLOORS},
    ],
)
def test_a_file_that_is_read_and_written_again_is_the_same(changes: dict[str, Any]) -> None:
    tree = written(**changes)
    evaluation = Evaluation.from_json(tree, source="x", remedy="")
    assert evaluation.as_json() == tree
    assert Evaluation.from_json(evaluation.as_json(), source="x", remedy="") == evaluation


@pytest.mark.parametrize(
    ("place", "point"),
    [
        ("along.1", 3),
        ("along.1.step", {**POINT, "step": 0}),
        ("along.1.step", {**POINT, "step": 2.5}),
        ("along.1.kl.mean", {**POINT, "kl": {"mean": -1.0, "low": None, "high": None}}),
        ("along.1.win_rates.sampling.mean", {**POINT, "win_rates": {"sampling": {"mean": 1.5}}}),
    ],
)
def test_a_bad_point_along_the_training_is_named_with_its_place(place: str, point: object) -> None:
    with pytest.raises(InputError, match=rf"x has \S+ at {place}, where"):
        Evaluation.from_json(written(along=[POINT, point]), source="x", remedy="")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("kl", "mean"), math.nan),
        (("win_rates", "best_of_4", "high"), "0.9"),
        (("floors", "a:b", "mean_rank", "mean"), 1.2),
        (("floors", "a:b", "floor"), None),
        (("reward_model", "accuracy"), None),
        (("reward_model", "pairs"), 2.5),
        (("reward_model", "brier"), 1.5),
        (("reward_model", "margin_length_correlation"), -1.1),
        (("reward_training", "cut"), -1),
        (("reward_training", "dropped"), None),
        (("reward_training", "used_step"), 2.5),
        (("reward_signal", "learnability", "high"), 1.2),
        (("reward_signal", "length_correlation", "low"), 0.15),
        (("win_rates", "best_of_4", "mean"), 7.5),
        (("win_rates", "sampling", "low"), 0.99),
        (("gold_win_rates", "sampling", "low"), None),
        (("judge_win_rates", "sampling", "high"), -0.2),
        (("judge",), "rewards:x"),
        (("judged_by",), 3),
        (("kl", "mean"), -5),
        (("kl", "low"), 10**400),
        (("ideal", "sampling", "optimal"), 1.5),
        (("unfinished", "policy"), 1.5),
        (("response_length", "policy", "median"), "long"),
        (("ties",), -0.5),
        (("along",), 3),
        (("ideal", "sampling", "identity"), math.inf),
        (("ties",), True),
        (("win_rates",), [0.5]),
        (("gold_win_rates", "sampling"), 0.5),
    ],
)
def test_a_bad_entry_is_named_with_its_place(path: tuple[str, ...], value: object) -> None:
    tree = written(floors=FLOORS)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(InputError) as caught:
        Evaluation.from_json(tree, source="here.json", remedy="make it again.")
    assert "here.json" in str(caught.value)
    assert repr(value)[:100] in str(caught.value)
    assert path[-1] in str(caught.value) or path[-2] in str(caught.value)


@pytest.mark.parametrize("table", ["win_rates", "gold_win_rates", "judge_win_rates", "ideal"])
@pytest.mark.parametrize("name", ["<script>", "best_of_0", "$x$", ""])
def test_a_name_that_is_no_procedure_is_refused(table: str, name: str) -> None:
    tree = written()
    tree[table][name] = tree[table]["sampling"]
    with pytest.raises(InputError, match=rf"^here\.json, {table}: "):
        Evaluation.from_json(tree, source="here.json", remedy="make it again.")


def test_an_evaluation_of_an_older_version_is_read() -> None:
    tree = written()
    for name in ("judged_by", "judge", "judge_win_rates", "response_length", "unfinished"):
        del tree[name]
    tree["reward_model"] = {"accuracy": 0.7, "ece": 0.02}
    evaluation = Evaluation.from_json(tree, source="x", remedy="")
    assert (evaluation.judge, evaluation.unfinished, evaluation.reward_model.pairs) == (None, {}, None)
    assert Evaluation.from_json({**tree, "reward_model": {}}, source="x", remedy="").reward_model.accuracy is None


def test_no_interval_is_null() -> None:
    tree = written()
    tree["kl"] = {"mean": 0.5, "low": None, "high": None}
    assert Evaluation.from_json(tree, source="x", remedy="").kl == Estimate(0.5, None, None)
