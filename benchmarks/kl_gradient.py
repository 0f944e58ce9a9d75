"""How much the gradient estimate varies with the KL exact or sampled, at the policy that bon_helpful trains.

    make bench-kl        or        python -m benchmarks.kl_gradient [--repeats 40]

Prints the total variance of the gradient over repeated batches for `policy_gradient.exact_kl_loss`, which training
uses, and for `sampled_kl_loss`, on the same rollouts; and the same without a reward, where the KL is all there is.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from ctrl_jax.commands.experiments import load_experiment
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.pipeline import align, assembly, calibrate
from ctrl_jax.pipeline.run import prepare
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.runtime.console import table
from ctrl_jax.runtime.platform import setup_compilation_cache
from ctrl_jax.steps import calibration, logprobs, policy_gradient, sampling
from ctrl_jax.types import Params


def main(repeats: int = 40, experiment: str = "bon_helpful", runs_dir: Path = Path("runs")) -> None:
    setup_compilation_cache(Path(".cache/compiled"))
    config = load_experiment(experiment).experiment()
    run = prepare(Workspace(config, runs_dir / experiment, runs_dir / "stages", make_mesh(1)))
    aligned = align.policy(run)
    rewards = calibrate.run(run, aligned.reference, aligned.reward).table.rewards
    objective = config.policy.objective
    beta = config.policy.beta or objective.beta(rewards.shape[1], rewards)
    batch = config.policy.prompts_per_step
    prompts = jax.tree.map(lambda x: jnp.asarray(x[:batch]), run.corpus.prompts("train", batch).prompts)
    parts, reference = run.models, aligned.reference.params

    @jax.jit
    def gradients(key: jax.Array) -> dict[str, Params]:
        rollouts = sampling.sample(
            parts.policy, aligned.policy, prompts, key,
            num_samples=config.policy.samples_per_prompt, max_length=config.data.response_length,
            eos_ids=run.corpus.tokenizer.eos_ids, temperature=config.policy.temperature,
        )  # fmt: skip
        responses = rollouts.responses
        raw = aligned.reward.score(prompts, responses)
        calibrated = calibration.calibrate(raw, rewards[:batch])
        transformed = objective.transformed(rewards.shape[1])(raw, calibrated)

        def loss(params: Params, rewards: jax.Array, exact: bool) -> jax.Array:
            c = logprobs.compare_policies(
                parts.policy, params, reference, prompts, responses,
                temperature=config.policy.temperature, chunk_size=assembly.chunk_size(parts, run.mesh),
            )  # fmt: skip
            function = policy_gradient.exact_kl_loss if exact else policy_gradient.sampled_kl_loss
            other = c.kl if exact else c.reference_log_probs
            return function(c.log_probs, other, rewards, responses.lengths, beta=beta).value

        return {
            f"{'exact' if exact else 'sampled'} KL, {label}": jax.grad(loss)(aligned.policy, values, exact)
            for exact in (True, False)
            for label, values in (("with the reward", transformed), ("without", jnp.zeros_like(transformed)))
        }

    samples = [gradients(key) for key in jax.random.split(jax.random.key(0), repeats)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *samples)
    variance = {
        name: sum(float(jnp.var(leaf, axis=0, ddof=1).sum()) for leaf in jax.tree.leaves(tree))
        for name, tree in stacked.items()
    }
    table(f"{experiment}: variance of the gradient over {repeats} batches", ["", "variance"], list(variance.items()))


if __name__ == "__main__":
    tyro.cli(main)
