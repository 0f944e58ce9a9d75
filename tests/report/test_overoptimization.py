"""Overoptimisation: laws through points that lie on them, peaks by a grid, best-of-n by all subsets."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from ctrl_jax.report import overoptimization, sweep_page
from ctrl_jax.report.overoptimization import BestOf, Gains, Law, Method, fit
from ctrl_jax.report.panels import overoptimization as drawn
from tests.report import drawing
from tests.report.pages import visible

KLS = np.array([0.25, 0.5, 1.0, 2.0, 4.0, 8.0])


def on_law(alpha, beta, kl=KLS):
    distance = np.sqrt(kl)
    return distance * (alpha - beta * np.log(distance))


def test_a_fit_through_points_of_the_law_finds_it_without_error():
    law = fit(KLS, on_law(1.3, 0.7))
    assert law == pytest.approx(Law(1.3, 0.7, 0.0, 0.0), abs=1e-9)
    assert law.gain(np.array([3.0])) == pytest.approx(on_law(1.3, 0.7, np.array([3.0])))


def test_standard_errors_are_how_fits_to_noisy_points_differ():
    rng = np.random.default_rng(0)
    fits = [fit(KLS, on_law(1.3, 0.7) + 0.1 * rng.normal(size=len(KLS))) for _ in range(4000)]
    for name in ("alpha", "beta"):
        found = np.array([getattr(law, name) for law in fits])
        error = np.sqrt(np.mean([getattr(law, f"{name}_error") ** 2 for law in fits]))
        assert error == pytest.approx(found.std(), rel=0.05)


def test_two_points_have_no_error():
    with pytest.raises(ValueError, match="needs 3"):
        fit(KLS[:2], KLS[:2])


def test_the_peak_is_where_a_grid_finds_it():
    kl = np.linspace(0.01, 20, 200_000)
    for alpha, beta in ((1.3, 0.7), (0.4, 0.9)):
        law = fit(KLS, on_law(alpha, beta))
        assert law.peak(0.01, 20) == pytest.approx(kl[np.argmax(law.gain(kl))], abs=2e-4)
        assert law.slope(2.0) == pytest.approx(np.diff(law.gain(np.array([1.41, 1.42]) ** 2))[0] / 0.01, abs=5e-3)


BEST_OF = BestOf(np.array([0.0]), {"gold": np.zeros(1), "proxy": np.zeros(1)})


def gains(seed, alpha, beta):
    return Gains(seed, KLS, {"gold": on_law(alpha, beta), "proxy": on_law(2.0, -0.2)}, BEST_OF)


def method(*seeds):
    return Method("raw", "", seeds)


def test_a_peak_over_seeds_is_their_geometric_mean_with_students_interval():
    seeds = [gains(seed, alpha, 0.7) for seed, alpha in enumerate((0.9, 1.0, 1.2))]
    logs = [2 * (alpha / 0.7 - 1) for alpha in (0.9, 1.0, 1.2)]
    half = 4.302653 * np.std(logs, ddof=1) / np.sqrt(3)
    found = method(*seeds).peak("gold")
    expected = [np.exp(np.mean(logs) + shift) for shift in (0, -half, half)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert method(*seeds).peak("proxy") is None
    alone = method(seeds[0]).peak("gold")
    assert alone.mean == pytest.approx(np.exp(logs[0])) and alone.low is None
    tree = method(*seeds).as_json()
    assert tree["peak_kl"] == {"proxy": None, "gold": found._asdict()}
    assert [seed["gold"]["peak_kl"] for seed in tree["seeds"]] == pytest.approx(np.exp(logs))
    assert tree["seeds"][2]["gold"]["alpha"] == pytest.approx(1.2) and tree["seeds"][2]["seed"] == 2


@pytest.mark.parametrize(
    ("alpha", "beta", "told"),
    [
        (1.5, 0.7, "grows"),  # its peak is at 9.8 nats
        (1.0, -0.1, "grows"),
        (1.0, 1e-6, "grows"),  # at more nats than a float holds
        (-1.0, -0.2, "falls"),
        (-1.0, 0.0, "falls"),
        (-0.4, 0.5, "falls"),  # its peak is at .03 nats
        (-0.79, 0.01, "falls"),
        (0.9, 0.7, f"{np.exp(2 * (0.9 / 0.7 - 1)):.2f}"),
    ],
)
def test_there_is_no_peak_outside_of_what_was_measured(alpha, beta, told):
    one = gains(0, alpha, beta)
    assert one.told("gold") == told
    assert (one.peak("gold") is None) == (told in ("grows", "falls"))
    assert (method(gains(1, 0.9, 0.7), one).peak("gold") is None) == (one.peak("gold") is None)


def run(transform, kl, *, seed=0, gold=True, members=None, ensemble=None):
    rng = np.random.default_rng([seed, int(100 * kl)])
    of_seed = np.random.default_rng(seed)
    arrays = {
        "policy_rewards": rng.normal(kl, size=(5, 8)), "reference_rewards": of_seed.normal(size=(5, 8)),
        "policy_gold": rng.normal(kl / 2, size=(5, 8)), "reference_gold": of_seed.normal(size=(5, 8)),
    }  # fmt: skip
    config = {
        "name": f"{transform}{kl}", "seed": seed, "data": {"source": "dialogues/helpful", "seed": seed},
        "policy": {"transform": transform, "kl_budget": kl, "procedure": "sampling"}, "reward_model": {},
    }  # fmt: skip
    config |= {} if ensemble is None else {"combine": {"ensemble": ensemble}}
    config["reward_model"] |= {} if members is None else {"members": members}
    kept = {name: array for name, array in arrays.items() if gold or "gold" not in name}
    return SimpleNamespace(config=config, arrays=kept, evaluation=SimpleNamespace(kl=SimpleNamespace(mean=kl)))


def named(runs):
    return [(run.config["policy"]["transform"], run) for run in runs]


def test_runs_are_gathered_by_method_and_seed_in_the_order_of_their_kl():
    runs = [run("raw", kl, seed=seed) for seed in (1, 0) for kl in (2.0, 0.5, 1.0, 4.0)]
    runs += [run("raw", kl, members=3, ensemble="min") for kl in KLS]
    runs += [run("identity", kl) for kl in (*KLS[:3], 0.0)]  # too few: at 0 there is no law
    runs += [run("logit", kl, gold=False) for kl in KLS]
    raw, ensemble = overoptimization.methods(named(runs))
    assert (raw.name, ensemble.name) == ("raw", "raw, min of 3")
    assert [seed.seed for seed in raw.seeds] == [1, 0] and [seed.seed for seed in ensemble.seeds] == [0]
    for seed in raw.seeds:
        assert seed.kl.tolist() == [0.5, 1.0, 2.0, 4.0]
        for index, kl in enumerate(seed.kl):
            arrays = run("raw", kl, seed=seed.seed).arrays
            for judge, of in (("proxy", "rewards"), ("gold", "gold")):
                gain = arrays[f"policy_{of}"].mean() - arrays[f"reference_{of}"].mean()
                assert seed.gains[judge][index] == pytest.approx(gain)


@pytest.mark.parametrize(
    "change",
    [{"data": {"corrupted": 0.3}}, {"reward_model": {"linear": True}}, {"policy": {"procedure": "best_of_4"}}],
)
def test_runs_of_unlike_rewards_or_data_make_no_law_together(change):
    runs = [run("raw", kl) for kl in KLS]
    for one in runs[:3]:
        for section, options in change.items():
            one.config[section] |= options
    assert overoptimization.methods(named(runs)) == []
    several = [(f"method {i % 2}", one) for i, one in enumerate(run("raw", kl) for kl in KLS)]
    assert overoptimization.methods(several) == []


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, ""),
        ({"reward_model": {"members": 4}}, "mean of 4"),
        ({"reward_model": {"members": 4}, "combine": {"ensemble": "min"}}, "min of 4"),
        ({"reward_model": {"members": 2}, "combine": {"by": "smallest_calibrated"}}, "mean of 2"),
        ({"combine": {"by": "log_sigmoids(0.85)", "rewards": []}}, "log_sigmoids(0.85)"),
        ({"combine": {"by": "smallest_calibrated", "rewards": ["a:b"]}}, "smallest_calibrated"),
    ],
)
def test_rewards_that_differ_have_names_that_differ(config, name):
    assert overoptimization.made_by({"reward_model": {}} | config) == name


def test_best_of_n_is_the_mean_over_all_subsets():
    one = run("raw", 1.0)
    rewards, gold = one.arrays["reference_rewards"], one.arrays["reference_gold"]
    found = overoptimization.best_of(one)
    for index, n in enumerate((1, 2, 4, 8)):
        subsets = [list(subset) for subset in itertools.combinations(range(8), n)]
        for judge, values in (("proxy", rewards), ("gold", gold)):
            picks = [
                [row[subset][np.argmax(by[subset])] for subset in subsets]
                for row, by in zip(values, rewards, strict=True)
            ]
            assert found.gains[judge][index] == pytest.approx(np.mean(picks) - values.mean(), abs=1e-6)
        assert found.kl[index] == pytest.approx(np.log(n) - (n - 1) / n)


def panels(runs):
    return drawn.panels(overoptimization.methods(named(runs)))


def test_panels_have_the_points_and_laws_of_each_seed():
    runs = [run("raw", kl, seed=seed) for seed in (0, 1) for kl in KLS]
    runs += [run("raw", kl, members=3) for kl in KLS]
    found = panels(runs)
    assert [panel.title for panel in found] == ["raw", "raw, mean of 3", "best-of-n", "best-of-n by mean of 3"]
    rows = drawing.rows(found)
    gain = runs[0].arrays["policy_gold"].mean() - runs[0].arrays["reference_gold"].mean()
    first = next(row for row in rows if row["series"] == "gold reward, seed 0")
    assert first["x"] == "0.25" and float(first["y"]) == pytest.approx(gain, rel=1e-4)
    assert {"reward trained on, seed 1", "law of gold reward, seed 1"} <= {row["series"] for row in rows}
    best = overoptimization.best_of(run("raw", 1.0, seed=1))
    for text, judge in (("gold reward", "gold"), ("reward trained on", "proxy")):
        shown = [row for row in rows if row["panel"] == "best-of-n" and row["series"] == f"{text}, seed 1"]
        assert [float(row["x"]) for row in shown] == pytest.approx(best.kl, abs=1e-3)
        assert [float(row["y"]) for row in shown] == pytest.approx(best.gains[judge], abs=1e-4)
    assert panels(runs[:3]) == []


def test_the_page_of_a_sweep_has_them():
    runs = [run("raw", kl, seed=seed) for seed in (0, 1) for kl in KLS]
    laws = [method(gains(0, 0.9, 0.7), gains(1, 1.0, 0.7))]
    words = visible(sweep_page.render("hacking", [], gains=panels(runs), laws=laws))
    assert "Overoptimisation" in words
    peaks = [np.exp(2 * (alpha / 0.7 - 1)) for alpha in (0.9, 1.0)]
    assert f"raw gold 0.90 (0.00) 1.00 (0.00) 0.70 (0.00) 0.70 (0.00) {peaks[0]:.2f} {peaks[1]:.2f}" in words
    assert "raw the reward trained on 2.00 (0.00) 2.00 (0.00) -0.20 (0.00) -0.20 (0.00) grows grows –" in words
    alone = visible(sweep_page.render("hacking", [], gains=panels(runs), laws=[method(gains(0, 0.9, 0.7))]))
    assert f"{peaks[0]:.2f} –" in alone, "of one seed there is nothing over seeds"
    assert "Overoptimisation" not in visible(sweep_page.render("hacking", []))
