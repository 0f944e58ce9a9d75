"""Evaluation on held-out prompts: unbiased win rates under each procedure, KL, and what theory allows at that KL."""

import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.markup import escape

from ctrl_jax import build
from ctrl_jax.config import Policy
from ctrl_jax.data.language import gold_reward
from ctrl_jax.data.pipelines import PromptSet
from ctrl_jax.errors import InputError
from ctrl_jax.jobs import results, reward_model, scored
from ctrl_jax.jobs.reward_model import Reward
from ctrl_jax.jobs.rollouts import in_batches, respond, score
from ctrl_jax.jobs.run import Run
from ctrl_jax.jobs.sft import Trained, training_seconds
from ctrl_jax.jobs.train import Aligned
from ctrl_jax.runtime import checksums, hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import DONE, plain, read_arrays, read_json, write_arrays, write_bytes, write_json
from ctrl_jax.steps import calibration, preference, win_rate
from ctrl_jax.theory import ideal, optimal, procedures, transforms
from ctrl_jax.types import Responses, Rollouts, Transform

RELIABILITY_BINS = 10


class Judged(NamedTuple):
    """One policy's M responses to each test prompt, with their rewards."""

    responses: Responses
    rewards: np.ndarray
    """[B, M] raw, by the reward model."""
    gold: np.ndarray | None
    """[B, M] by the gold reward, which only generated data has."""


def read(run: Run) -> dict[str, Any] | None:
    """What an earlier run of this experiment, of the same contents, wrote; None where it is to be made."""
    whole = hosts.first() and results.set_damaged_aside(run.work_dir)
    if not hosts.agree(whole and results.is_of(run.work_dir, run.claimed_config)):
        return None
    if checksums.about(run.work_dir / results.RESULTS)["draws"] != plain(build.draws()):
        return None
    if run.experiment.reward_model.function is not None:
        # What a function's answers depend on besides its source is seen by asking it again.
        reason = scored.changed(run, reward_model.run(run, Trained({}, "")), run.work_dir)
        if reason:
            say(f"[yellow]{escape(reason)}. What depends on it is made anew.")
            return None
    return read_json(run.work_dir / "evaluation.json")


def run(run: Run, aligned: Aligned) -> dict[str, Any]:
    """Writes `evaluation.npz`, `samples.jsonl`, `evaluation.json` and, last, their seal; returns what is evaluated."""
    config = run.experiment.evaluation
    prompts = run.corpus.prompts("test", config.prompts)
    reference, reference_seconds = _reference(run, aligned, prompts)
    started = time.monotonic()
    rollouts, policy_rewards = respond(
        run, "policy responses", aligned.policy, aligned.reward.score, prompts.prompts, config.responses_per_prompt
    )
    policy = Judged(rollouts.responses, policy_rewards, _gold(run, prompts, rollouts.responses))
    kl_by_prompt = _kl_by_prompt(run, aligned, rollouts)
    kl = _interval(run, "kl", kl_by_prompt)
    reward_quality, reliability = _reward_model(run, aligned.reward)
    rewards, reference_rewards = jnp.asarray(policy.rewards), jnp.asarray(reference.rewards)
    calibrated = np.asarray(calibration.calibrate(rewards, reference_rewards))
    reference_calibrated = np.asarray(calibration.leave_one_out(reference_rewards))

    results.unseal(run.work_dir)
    scored.keep(run, aligned.reward, run.work_dir, prompts.prompts, policy.responses)
    write_arrays(
        run.work_dir / "evaluation.npz",
        policy_rewards=policy.rewards,
        reference_rewards=reference.rewards,
        policy_calibrated=calibrated,
        reference_calibrated=reference_calibrated,
        **_gold_arrays(policy, reference),
        **reliability,
    )
    _write_samples(run, prompts, {"policy": (policy, calibrated), "reference": (reference, reference_calibrated)})
    evaluation = {
        "kl": kl,
        "kl_standard_error": float(np.std(kl_by_prompt, ddof=1) / np.sqrt(len(kl_by_prompt))),
        "kl_budget": run.experiment.policy.kl_budget,
        "win_rates": _win_rates(run, policy.rewards, reference.rewards),
        "gold_win_rates": {}
        if policy.gold is None or reference.gold is None
        else _win_rates(run, policy.gold, reference.gold),
        "ideal": {name: _ideal(run.experiment.policy, name, kl["mean"]) for name in _procedures(run)},
        "reward_model": reward_quality,
        "ties": float(np.mean(win_rate.share_of_ties(rewards, reference_rewards))),
        "timings": {
            "sft": aligned.reference.seconds,
            "reward_model": aligned.reward.seconds,
            "calibrate": aligned.calibration_seconds,
            "reference_evaluation": reference_seconds,
            "train": training_seconds(run.work_dir),
            "evaluate": time.monotonic() - started,
        },
    }
    write_json(run.work_dir / "evaluation.json", evaluation)
    results.seal(run.work_dir, run.claimed_config, draws=build.draws())
    return evaluation


def _reference(run: Run, aligned: Aligned, prompts: PromptSet) -> tuple[Judged, float]:
    """The reference's side and the seconds it took, once for all policies that are compared with it."""
    config = run.experiment.evaluation
    stage = run.stage(
        "reference_evaluation",
        corpus=run.corpus.key("test"),
        reference=aligned.reference.stage,
        reward_model=aligned.reward.stage,
        prompts=config.prompts,
        responses_per_prompt=config.responses_per_prompt,
        temperature=run.experiment.policy.temperature,
        seed=run.experiment.seed,
    )
    path = stage.directory / "responses.npz"
    with stage.exclusive():
        if stage.complete and (reason := scored.changed(run, aligned.reward, stage.directory)):
            place = stage.supersede()
            say(f"[yellow]{escape(reason)}. The reference is evaluated anew; the old one is in {escape(str(place))}.")
        if not stage.complete:
            if path.exists():
                say(f"[yellow]{escape(str(stage.directory))} was left without its {DONE}: it is made anew.")
            started = time.monotonic()
            rollouts, rewards = respond(
                run,
                "reference responses",
                aligned.reference.params,
                aligned.reward.score,
                prompts.prompts,
                config.responses_per_prompt,
            )
            responses = rollouts.responses
            scored.keep(run, aligned.reward, stage.directory, prompts.prompts, responses)
            gold = _gold(run, prompts, responses)
            golden = {} if gold is None else {"gold": gold}
            write_arrays(path, tokens=responses.tokens, lengths=responses.lengths, rewards=rewards, **golden)
            stage.finish({"seconds": time.monotonic() - started})
    arrays = read_arrays(path)
    return (
        Judged(
            Responses(jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["lengths"])),
            arrays["rewards"],
            arrays.get("gold"),
        ),
        stage.summary["seconds"],
    )


def _gold(run: Run, prompts: PromptSet, responses: Responses) -> np.ndarray | None:
    if not run.experiment.data.generated:
        return None
    texts = run.corpus.texts(responses)
    return np.array(
        [[gold_reward(prompt, text) for text in row] for prompt, row in zip(prompts.texts, texts, strict=True)]
    )


def _gold_arrays(policy: Judged, reference: Judged) -> dict[str, np.ndarray]:
    if policy.gold is None or reference.gold is None:
        return {}
    return {"policy_gold": policy.gold, "reference_gold": reference.gold}


def _kl_by_prompt(run: Run, aligned: Aligned, rollouts: Rollouts) -> np.ndarray:
    """Exact KL of each test prompt [B], nats per response, the mean over the policy's own responses."""
    measure = build.kl_of_responses(run.models, run.mesh, temperature=run.experiment.policy.temperature)
    per_response = in_batches(
        run,
        "kl",
        lambda batch: measure(aligned.policy, aligned.reference.params, batch),
        rollouts,
        rows_per_prompt=rollouts.responses.tokens.shape[1],
    )
    return per_response.mean(axis=1)


def _interval(run: Run, label: str, per_prompt: np.ndarray | jax.Array) -> dict[str, float]:
    key = build.stage_key(run.experiment.seed, f"interval of {label}")
    resamples = run.experiment.evaluation.bootstrap_resamples
    interval = win_rate.interval(jnp.asarray(per_prompt), key, resamples=resamples)
    return {name: float(value) for name, value in interval._asdict().items()}


def _win_rates(run: Run, policy: np.ndarray, reference: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        name: _interval(
            run, name, win_rate.win_rate(jnp.asarray(policy), jnp.asarray(reference), procedures.parse(name))
        )
        for name in _procedures(run)
    }


def _procedures(run: Run) -> list[str]:
    """Those asked for, and the two of every summary: sampling, and the one that the policy was trained for."""
    experiment = run.experiment
    return list(dict.fromkeys([*experiment.evaluation.procedures, "sampling", experiment.policy.procedure]))


def _ideal(policy: Policy, name: str, kl: float) -> dict[str, float]:
    """What ideal policies at this KL win under a procedure: trained with the identity, with Φ, and with its own Φ*.

    What the KL cannot reach, and Φ of a raw reward, which no theory of ranks describes, is left out.
    """
    procedure = procedures.parse(name)
    candidates: dict[str, Callable[[], Transform]] = {
        "identity": transforms.identity,
        "optimal": lambda: optimal.optimal_transform(procedure, kl=kl),
    }
    if policy.transform == "optimal":
        candidates["transform"] = lambda: optimal.optimal_transform(procedures.parse(policy.procedure), kl=kl)
    elif policy.transform != "raw":
        candidates["transform"] = lambda: transforms.parse(policy.transform)
    values = {}
    for label, transform in candidates.items():
        try:
            values[label] = ideal.at_kl(transform(), kl).win_rate(procedure)
        except InputError:
            continue
    return values


def _reward_model(run: Run, reward: Reward) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Accuracy and calibration of the reward on held-out pairs, and its reliability diagram; nothing without pairs.

    Each pair counts in both orders: in the order (chosen, rejected) alone all have the same outcome.
    """
    if not run.corpus.has_pairs("test"):
        return {}, {}
    pairs = run.corpus.pairs("test")
    rewards = score(run, reward.score, pairs.prompts, pairs.responses)
    chosen, rejected = jnp.asarray(rewards[:, 0]), jnp.asarray(rewards[:, 1])
    probabilities = jax.nn.sigmoid(jnp.concatenate([chosen - rejected, rejected - chosen]))
    outcomes = jnp.concatenate([jnp.ones_like(chosen), jnp.zeros_like(rejected)])
    reliability = preference.reliability(probabilities, outcomes, bins=RELIABILITY_BINS)
    quality = {
        "accuracy": float(preference.accuracy(chosen, rejected).value),
        "ece": float(preference.expected_calibration_error(reliability)),
    }
    arrays = {
        "reliability_predicted": np.asarray(reliability.predicted.value),
        "reliability_observed": np.asarray(reliability.observed.value),
        "reliability_count": np.asarray(reliability.predicted.weight),
    }
    return quality, arrays


def _write_samples(run: Run, prompts: PromptSet, sides: dict[str, tuple[Judged, np.ndarray]]) -> None:
    """The procedure's pick among each side's first responses to every test prompt."""
    procedure = procedures.parse(run.experiment.policy.procedure)
    key = build.stage_key(run.experiment.seed, "samples")
    rows: list[dict[str, Any]] = [{"prompt": text} for text in prompts.texts]
    for name, (judged, calibrated) in sides.items():
        picks = np.asarray(procedure.select(jnp.asarray(judged.rewards[:, : procedure.num_samples]), key))
        at_pick = (np.arange(len(rows)), picks)
        picked = Responses(judged.responses.tokens[at_pick][:, None], judged.responses.lengths[at_pick][:, None])
        for i, (row, (text,)) in enumerate(zip(rows, run.corpus.texts(picked), strict=True)):
            row[name] = {
                "text": text,
                "reward": float(judged.rewards[i, picks[i]]),
                "calibrated": float(calibrated[i, picks[i]]),
                **({} if judged.gold is None else {"gold": float(judged.gold[i, picks[i]])}),
            }
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(run.work_dir / "samples.jsonl", lines.encode())
