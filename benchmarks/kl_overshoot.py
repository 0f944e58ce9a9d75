"""How far a training's KL runs past its budget, at the experiment's learning rate and at multiples of it.

    python -m benchmarks.kl_overshoot bon_helpful won_harmless --factors 1 10

Trains the policy of each experiment at each rate, its stages once, and prints the largest mean of five steps' KL as a
share of the budget, and how much of the optimiser's updates the brake (steps/kl_budget.py) let through. Trainings that
are there are read, not made again.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import tyro

from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.config import Experiment
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.pipeline import align, assembly
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.report.statistics import highest_mean
from ctrl_jax.runtime.console import say, table
from ctrl_jax.runtime.metrics import RECENT, read_metrics
from ctrl_jax.runtime.platform import setup_compilation_cache


def overshoot(kl: np.ndarray, budget: float) -> float:
    """The largest mean of five steps' KL over the budget; of fewer steps, their mean."""
    highest = highest_mean(kl, RECENT)
    return math.nan if highest is None else highest / budget


def trained(experiment: Experiment, work_dir: Path, stages_dir: Path) -> dict[str, np.ndarray]:
    """The metrics of the policy's training, up to where it ended if the KL ran away."""
    metrics = work_dir / "metrics.jsonl"
    try:
        align.policy(prepare(Workspace(experiment, work_dir, stages_dir, make_mesh(1))))
    except InputError as error:
        if not metrics.exists():
            raise
        say(str(error), style="yellow")
    return read_metrics(metrics)


def on_policy(name: str) -> Experiment:
    """The experiment, if it samples from its policy."""
    experiment = load_experiment(name).experiment()
    if not assembly.is_on_policy(experiment.policy):
        raise SystemExit(f"{name} learns from given responses, so its KL has no budget on the way; leave it out.")
    return experiment


def main(
    experiments: tyro.conf.Positional[tuple[str, ...]],
    factors: tuple[float, ...] = (1.0, 10.0),
    runs_dir: Path = Path("runs"),
) -> None:
    """Prints the overshoot of experiments that sample from their policy.

    Args:
      experiments: their names.
      factors: what their learning rates are multiplied by.
      runs_dir: where their stages are, and the folder kl_overshoot with these trainings.
    """
    bases = {name: on_policy(name) for name in experiments}
    setup_compilation_cache(Path(".cache/compiled"))
    rows: list[list[object]] = []
    for name, base in bases.items():
        for factor in factors:
            policy = replace(base.policy, learning_rate=factor * base.policy.learning_rate)
            work_dir = runs_dir / "kl_overshoot" / f"{name.replace('/', '_')}_x{factor:g}"
            metrics = trained(replace(base, policy=policy), work_dir, runs_dir / "stages")
            steps, share = len(metrics["step"]), metrics["update_share"].mean()
            rate, end = f"{policy.learning_rate:.3g}", metrics["kl"][-RECENT:].mean() / policy.kl_budget
            largest = f"{overshoot(metrics['kl'], policy.kl_budget):.3f}"
            rows.append([name, rate, f"{steps}/{policy.steps}", largest, f"{end:.3f}", f"{share:.0%}"])
    table(
        f"KL over its budget, means of {RECENT} steps",
        ["experiment", "learning rate", "steps", "largest", "last", "updates made"],
        rows,
    )


if __name__ == "__main__":
    tyro.cli(main)
