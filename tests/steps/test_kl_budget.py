import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ctrl_jax.steps import kl_budget
from ctrl_jax.steps.masked import masked_mean


def run(beta, kls, *, budget, held=False, **options):
    state = kl_budget.init(beta, budget=budget, held=held)
    betas = []
    for kl in kls:
        state = kl_budget.update(state, jnp.float32(kl), **options)
        betas.append(float(state.beta))
    return np.array(betas)


def ideal_kl(beta):
    """KL of the ideal policy of the identity transform, p(u) ∝ e^{u/β} on [0, 1]."""
    e = np.exp(1 / beta)
    return ((1 / beta - 1) * e + 1) / (e - 1) - np.log(beta) - np.log(e - 1)


def test_the_budget_is_a_fixed_point():
    np.testing.assert_array_equal(run(0.125, [0.5] * 20, budget=0.5), 0.125)


def test_a_held_beta_stays_whatever_the_kl():
    np.testing.assert_array_equal(run(0.125, [9.0, 0.0, 0.3], budget=0.5, held=True, patience=1), 0.125)


def test_beta_rises_over_the_budget_and_falls_under_it():
    assert run(1.0, [0.6] * 5, budget=0.5)[-1] > 1
    assert run(1.0, [0.5] * 5 + [0.4] * 5, budget=0.5)[-1] < 1


def test_formula():
    # 20 % over: each step adds integral · .2 to log base, and the proportional term stands on top of it.
    betas = run(1.0, [0.6] * 4, budget=0.5, proportional=0.7, integral=0.05)
    np.testing.assert_allclose(betas, np.exp(0.05 * 0.2 * np.arange(1, 5) + 0.7 * 0.2), rtol=1e-5)


def test_the_way_up_to_the_budget_is_no_error():
    betas = run(1.0, [0.0, 0.1, 0.2, 0.3, 0.4], budget=0.5)
    np.testing.assert_array_equal(betas, 1)


def test_a_kl_that_rests_below_the_budget_brings_beta_nearer():
    """By √(KL / budget), and again for every further rest of `patience` steps."""
    betas = run(1.0, [0.18] * 32, budget=0.5, patience=10)
    np.testing.assert_allclose(betas, 0.6 ** (np.arange(32) // 10), rtol=1e-5)


def test_a_rest_halves_beta_at_most():
    np.testing.assert_allclose(run(1.0, [0.001] * 11, budget=0.5, patience=10)[-1], 0.5, rtol=1e-6)


def test_beta_after_a_rest_is_the_ideal_one_of_a_policy_that_learns_a_part():
    """A log-ratio with a correlation r with the ideal one: KL = r² KL*(β), about 1 / β². One rest is all it takes."""
    r, state, betas = 0.6, kl_budget.init(1.0, budget=0.02), []
    for _ in range(120):
        state = kl_budget.update(state, jnp.float32(r**2 * ideal_kl(float(state.beta))))
        betas.append(float(state.beta))
    wanted = next(beta for beta in np.linspace(0.3, 3, 5001) if r**2 * ideal_kl(beta) < 0.02)
    assert betas[9] == 1
    np.testing.assert_allclose(betas[10], wanted, rtol=0.02)
    np.testing.assert_allclose(betas[-1], wanted, rtol=0.02)


def test_a_kl_that_still_rises_is_none_however_long():
    """A rise by .151 in 8 steps; of half of that in as many, none comes within 10 steps."""
    steps = np.arange(60)
    np.testing.assert_array_equal(run(1.0, 0.1 * 1.151 ** (steps / 8), budget=0.5), 1)
    assert run(1.0, 0.1 * 1.075 ** (steps / 8), budget=0.5)[-1] < 1


def test_a_kl_that_rises_and_falls_by_noise_rests():
    noise = 0.2 * np.random.default_rng(0).normal(size=60)
    assert run(1.0, 0.25 * (1 + noise), budget=0.5)[-1] < 0.8


def test_the_error_is_clipped():
    np.testing.assert_allclose(run(1.0, [1e6], budget=0.5)[-1], np.exp(0.5 * (0.4 + 0.03)), rtol=1e-5)
    np.testing.assert_allclose(run(1.0, [1e6], budget=0.5, clip=0.1)[-1], np.exp(0.1 * (0.4 + 0.03)), rtol=1e-5)
    low = run(1.0, [0.5] * 5 + [0.0] * 5, budget=0.5, integral=0.0)
    np.testing.assert_allclose(low[-1], np.exp(-0.5 * 0.4), rtol=1e-5)


def test_only_the_last_measurements_count():
    # By step 10 the window of 5 has forgotten the first five; without the integral nothing else remembers them.
    kls = [0.5, 0.9, 0.1, 0.6, 0.4, 0.4, 0.6, 0.7, 0.3, 0.45]
    betas = run(1.0, kls, budget=0.5, proportional=0.7, integral=0.0)
    np.testing.assert_allclose(betas[4], 1, rtol=1e-6)
    np.testing.assert_allclose(betas[9], np.exp(0.7 * (0.49 / 0.5 - 1)), rtol=1e-5)


def test_a_window_that_is_not_full_averages_what_there_is():
    betas = run(1.0, [0.8, 0.6, 0.55], budget=0.5, proportional=0.7, integral=0.0, clip=9.0)
    np.testing.assert_allclose(betas, np.exp(0.7 * (np.array([0.8, 0.7, 0.65]) / 0.5 - 1)), rtol=1e-5)


def test_a_lost_kl_shows():
    assert np.isnan(run(1.0, [0.5, np.nan, 0.5, 0.5, 0.5], budget=0.5)[-1])


def shares(kls, *, budget=1.0, errors=None, **options):
    state, found = kl_budget.init(1.0, budget=budget, **options), []
    for kl, error in zip(kls, errors or [0.0] * len(kls), strict=True):
        state = kl_budget.update(state, jnp.float32(kl), jnp.float32(error))
        found.append(float(state.share))
    return np.array(found)


def test_a_part_of_an_update_is_made_where_three_like_the_last_would_run_past_the_limit():
    """√KL rises by .1, by .3, and by .3 with a part of an update: by more with a whole one."""
    room = np.sqrt(1.15) - np.array([0.1, 0.4, 0.7])
    second = room[1] / (3 * 0.3)
    np.testing.assert_allclose(shares([0.01, 0.16, 0.49]), [1, second, room[2] / (3 * 0.3 / second)], rtol=1e-5)


def test_slow_learning_has_whole_updates():
    np.testing.assert_array_equal(shares(np.linspace(0, 0.94, 40) ** 2), 1)


def test_what_two_measurements_of_one_policy_differ_by_is_no_speed():
    """Up to a standard error of the KL over √KL, here .1."""
    np.testing.assert_array_equal(shares([0.25, 0.36, 0.25], errors=[1.0, 0.0601, 0.05]), 1)
    assert shares([0.9], errors=[0.05])[0] < 1


def test_what_a_start_has_come_to_is_no_speed():
    """The first measurement of a training that goes on from a start is how far that came, not a step's."""
    np.testing.assert_array_equal(shares([0.3] * 3, budget=0.6, goes_on=True), 1)
    moved = shares([0.3, 0.36], budget=0.6, goes_on=True)
    speed = np.sqrt(0.36) - np.sqrt(0.3)
    np.testing.assert_allclose(moved[1], min(1, (np.sqrt(1.15 * 0.6) - 0.6) / (3 * speed)), rtol=1e-5)


def test_above_the_budget_there_is_room_for_the_way_back():
    """To √budget, where that is farther than the limit; and from far above, a whole update."""
    speed = np.sqrt(1.44)
    np.testing.assert_allclose(shares([1.44])[-1], 0.2 / (3 * speed), rtol=1e-5)
    assert shares([0.16, 36.0])[-1] == pytest.approx(5 / (3 * 5.6 / ((np.sqrt(1.15) - 0.4) / 1.2)), rel=1e-5)


def test_a_share_is_never_0_and_a_speed_is_forgotten():
    assert shares([1.0, 100.0, 1.0])[-1] == pytest.approx(0.02)
    later = shares([0.09, 0.81] + [0.81] * 400)
    assert later[1] < 0.1 and (np.diff(later[1:]) >= 0).all() and later[-1] == 1


def test_beta_that_is_held_has_no_brake():
    np.testing.assert_array_equal(shares([0.5, 4.0], held=True), 1)


@pytest.mark.parametrize("start", [0.05, 0.3, 2.0])
def test_it_settles_on_the_budget_of_a_policy_that_follows(start):
    state = kl_budget.init(start, budget=0.5)
    for _ in range(300):
        state = kl_budget.update(state, jnp.float32(ideal_kl(float(state.beta))))
    assert abs(ideal_kl(float(state.beta)) / 0.5 - 1) < 0.01


def test_it_does_not_swing_around_the_budget_of_a_policy_that_lags():
    """From the reference on, with two lags of 8 steps; an eager integral alone is the counter-example."""

    def worst_miss(**options):
        state, wanted, log_beta, misses = kl_budget.init(0.2, budget=0.5), np.log(10.0), np.log(10.0), []
        for step in range(150):
            wanted += (np.log(float(state.beta)) - wanted) / 8
            log_beta += (wanted - log_beta) / 8
            kl = ideal_kl(np.exp(log_beta))
            misses.append(abs(kl / 0.5 - 1) if step >= 100 else 0)
            state = kl_budget.update(state, jnp.float32(kl), **options)
        return max(misses)

    assert worst_miss() < 0.1 < worst_miss(proportional=0.0, integral=0.2)


def test_noise_leaves_the_mean_kl_at_the_budget():
    def step(carry, noise):
        state = carry
        e = jnp.exp(1 / state.beta)
        kl = ((1 / state.beta - 1) * e + 1) / (e - 1) - jnp.log(state.beta) - jnp.log(e - 1)
        return kl_budget.update(state, kl * (1 + noise)), kl

    noise = 0.3 * np.random.default_rng(0).normal(size=5000).astype(np.float32)
    _, kls = jax.lax.scan(step, kl_budget.init(0.2, budget=0.5), noise)
    # 1000 windows of relative noise .3/√5 = .13: the mean is known to some .005.
    np.testing.assert_allclose(np.mean(kls[500:]), 0.5, rtol=0.02)


def test_jitted_and_scanned_equal_plain():
    kls = np.random.default_rng(0).uniform(0.1, 1.5, 23).astype(np.float32)
    plain = run(0.3, kls, budget=0.5)

    @jax.jit
    def scanned(kls):
        def step(state, kl):
            state = kl_budget.update(state, kl)
            return state, state.beta

        return jax.lax.scan(step, kl_budget.init(0.3, budget=0.5), kls)[1]

    np.testing.assert_allclose(scanned(kls), plain, rtol=1e-6)


def test_every_device_takes_the_same_step_as_one(mesh):
    per_prompt = jnp.arange(16) / 16

    def step(state, per_prompt, axis_name=None):
        return kl_budget.update(state, masked_mean(per_prompt, None).across(axis_name).value)

    sharded = jax.shard_map(lambda *a: step(*a, "data"), mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    state = kl_budget.init(0.3, budget=0.3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        jax.jit(sharded)(state, per_prompt),
        step(state, per_prompt),
    )
