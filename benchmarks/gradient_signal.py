"""How much of a step's gradient is signal at the reference, without a critic and with one, by the same responses.

    python -m benchmarks.gradient_signal bon_helpful
    python -m benchmarks.gradient_signal bon_helpful_hh_cpu --data-path ... --test-prompts 192

Makes the experiment's stages up to its calibration table, teaches the critic of actor_critic.py on batches of the
reference's responses, and takes the gradients of new batches. Of gradients g_i of independent batches, the mean of
g_i·g_j (i ≠ j) estimates |E g|² without bias, and the mean of |g_i|² has the noise too. Printed are

    signal    the first over the second: as many times more batches hold as much signal
    along     the squared cosine of a batch's gradient and CTRL's expected one, (E g_i·c_j)² / (E c_i·c_j  E |g_i|²)

where c are CTRL's gradients. Where the critic is wrong, `along` is what counts: signal may be of another direction.
"""

import functools
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ctrl_jax import config
from ctrl_jax.algorithms.actor_critic import ActorCritic, Extra
from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.devices import parameters
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.models import lora
from ctrl_jax.pipeline import calibrate, randomness, reward_model, sft, train
from ctrl_jax.pipeline.rollouts import respond
from ctrl_jax.pipeline.run import Run, prepare
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.runtime.console import table
from ctrl_jax.runtime.platform import setup_compilation_cache
from ctrl_jax.types import Experience, Params, Prompts, Score

Gradients = dict[str, np.ndarray]
"""Of each estimator, [batches, parameters]."""


def signal(gradients: Gradients, ctrl: str) -> list[list[str]]:
    """Rows of the table: estimator, signal, along."""
    count = len(gradients[ctrl])
    pairs = count * (count - 1)

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        """The mean of a_i·b_j, i ≠ j."""
        return float((a.sum(0) @ b.sum(0) - np.sum(a * b)) / pairs)

    rows, expected = [], apart(gradients[ctrl], gradients[ctrl])
    for name, found in gradients.items():
        size = float(np.mean(np.sum(found**2, axis=1)))
        along = apart(found, gradients[ctrl]) ** 2 / (expected * size) if expected > 0 else float("nan")
        rows.append([name, f"{apart(found, found) / size:.3f}", f"{along:.3f}"])
    return rows


def experiences(
    run: Run, count: int, reference: Params, score: Score, references: np.ndarray, prompts: Prompts
) -> Iterator[Experience]:
    """Batches of the reference's own responses to training prompts, with their rewards."""
    size, samples = run.experiment.policy.prompts_per_step, run.experiment.policy.samples_per_prompt
    for batch in range(count):
        rows = np.arange(batch * size, (batch + 1) * size) % len(prompts.ids)
        some = jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], prompts)
        rollouts, raw = respond(run, f"gradient signal {batch + 1}/{count}", reference, score, some, samples)
        yield Experience(rollouts, raw, references[rows])


def main(
    experiment: tyro.conf.Positional[str],
    traces: tuple[float, ...] = (1.0, 0.7, 0.0),
    taught: int = 8,
    batches: int = 8,
    data_path: str | None = None,
    test_prompts: int | None = None,
    runs_dir: Path = Path("runs"),
) -> None:
    """Prints the share of signal in the gradient of CTRL, and of CTRL with a critic.

    Args:
      experiment: its name; its policy samples its own responses.
      traces: λ of the critics.
      taught: batches that the critic learns from.
      batches: whose gradients are compared.
      data_path: as `data.path`.
      test_prompts: as `evaluation.prompts`.
      runs_dir: where the experiment's stages are.
    """
    base = load_experiment(experiment).experiment()
    options = {field.name: getattr(base.policy, field.name) for field in fields(config.Policy)}
    base = replace(base, policy=config.ActorCritic(**options))
    base = base if data_path is None else replace(base, data=replace(base.data, path=data_path))
    if test_prompts is not None:
        base = replace(base, evaluation=replace(base.evaluation, prompts=test_prompts))
    setup_compilation_cache(Path(".cache/compiled"))
    run = prepare(Workspace(base, runs_dir / "gradient_signal", runs_dir / "stages", make_mesh(1)))
    reference = sft.run(run)
    reward = reward_model.run(run, reference).reward
    calibrated = calibrate.run(run, reference, reward)
    prompts = run.corpus.prompts("train", base.calibration.prompts).prompts
    algorithm = train.algorithm_of(run, base.policy, calibrated)
    assert isinstance(algorithm, ActorCritic)
    key = randomness.stage_key(base.seed, "adapter")
    trained = parameters.adapt_decoder(run.models, run.mesh, key, reference.params)

    @jax.jit
    def learn(reference: Params, extra: Extra, batch: Experience) -> Extra:
        targets = algorithm.targets(batch)
        _, auxiliary = algorithm.loss(reference, reference, batch, targets, extra)
        measured = algorithm.measure(batch, targets, auxiliary)
        return algorithm.after(extra, {name: found.value for name, found in measured.items()})[0]

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(trace: float, reference: Params, trained: Params, extra: Extra, batch: Experience) -> jax.Array:
        one = replace(algorithm, trace=trace)

        def loss(trained: Params) -> jax.Array:
            return one.loss(lora.overlay(reference, trained), reference, batch, one.targets(batch), extra)[0].value

        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(loss)(trained))])

    start = extra = algorithm.start()
    found: dict[str, list[np.ndarray]] = {}
    made = experiences(run, taught + batches, reference.params, reward.score, calibrated.table.rewards, prompts)
    for index, batch in enumerate(made):
        if index < taught:
            extra = learn(reference.params, extra, batch)
            continue
        estimators = [("CTRL", 1.0, start), *((f"critic, λ = {trace:g}", trace, extra) for trace in traces)]
        for name, trace, state in estimators:
            of_batch = gradient(trace, reference.params, trained, state, batch)
            found.setdefault(name, []).append(np.asarray(of_batch))
    rows = signal({name: np.stack(each).astype(np.float64) for name, each in found.items()}, "CTRL")
    table(f"Signal in the gradient of {experiment}", ["gradient", "signal", "along"], rows)


if __name__ == "__main__":
    tyro.cli(main)
