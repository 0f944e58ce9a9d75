"""Evaluation on held-out prompts: unbiased win rates under each procedure, KL, and what theory allows at that KL.

The reward that the policy was trained on selects, as it does in deployment, and judges what it selected. Where there is
a gold reward or an independent judge (`evaluation.judge`), each judges the same selections beside it: a policy that
exploits its reward wins less by them.
"""

import json
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.data.pipelines import PromptSet
from ctrl_jax.decoding import order
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import (
    ALONG_ARRAYS,
    KL_ARRAY,
    MARGINS_ARRAY,
    RELIABILITY_ARRAYS,
    Estimate,
    Evaluation,
    Floor,
    Ideals,
    Lengths,
    Point,
    RewardQuality,
)
from ctrl_jax.pipeline import along, assembly, data, randomness, results, reward_model, scored
from ctrl_jax.pipeline.rollouts import in_batches, respond, score
from ctrl_jax.pipeline.run import Run
from ctrl_jax.pipeline.stages import timings
from ctrl_jax.pipeline.supervised import training_seconds
from ctrl_jax.pipeline.train import Aligned
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.rewards import gold
from ctrl_jax.rewards.named import named
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime import checksums, hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import DONE, Stage, plain, read_arrays, read_json, write_arrays, write_bytes, write_json
from ctrl_jax.steps import calibration, preference, rank_correlation, sampling, win_rate
from ctrl_jax.theory import procedures, transforms
from ctrl_jax.theory.objective import Objective, optimal
from ctrl_jax.types import Params, Responses, Rollouts

RELIABILITY_BINS = 10


class Judged(NamedTuple):
    """One policy's M responses to each test prompt, with their rewards."""

    responses: Responses
    rewards: np.ndarray
    """[B, M] raw, by the reward that the policy was trained on."""
    gold: np.ndarray | None
    """[B, M] by the gold reward, which only generated data has."""
    judge: np.ndarray | None = None
    """[B, M] by the independent judge, where one is given."""


def stored(workspace: Workspace) -> Evaluation | None:
    """What an earlier run of this experiment, of the same contents, wrote; else None. A damaged one is set aside."""
    whole = hosts.first() and results.set_damaged_aside(workspace.work_dir)
    if not hosts.agree(whole and results.is_of(workspace.work_dir, workspace.claimed_config)):
        return None
    if checksums.about(workspace.work_dir / results.RESULTS)["draws"] != plain(randomness.draws()):
        return None
    path = workspace.work_dir / "evaluation.json"
    return Evaluation.from_json(read_json(path), source=path, remedy="evaluate the run again.")


def read(run: Run) -> Evaluation | None:
    """As `stored`; None also where the reward function answers otherwise than before, or another judge was asked.

    Raises:
      InputError: if the judge cannot be used.
    """
    judge, evaluation = independent_judge(run), stored(run)
    if evaluation is None:
        return None
    if run.experiment.functions:
        # What a function's answers depend on besides its source is seen by asking it again.
        reason = scored.changed(run, reward_model.functions(run), run.work_dir)
        if reason:
            say(f"{reason}. What depends on it is made anew.", style="yellow")
            return None
    if judge is not None and evaluation.judge_fingerprint != judge.fingerprint:
        path = run.work_dir / "evaluation.json"
        say(f"{path} has no win rates by this `evaluation.judge`, and is made anew from the trained policy.")
        return None
    return evaluation


def independent_judge(run: Run) -> Reward | None:
    """The reward that evaluation.judge names, or None where none is given.

    A classifier is read twice, before anything is trained and when it judges: the first finds what is wrong with it
    before hours of work, and its weights take no memory from the training in between.

    Raises:
      InputError: if it cannot be used.
    """
    name = run.experiment.evaluation.judge
    if name is None:
        return None
    return named(name, run.corpus, run.mesh, dtype=run.experiment.model.dtype, field="evaluation.judge")


def run(run: Run, aligned: Aligned) -> Evaluation:
    """Writes `evaluation.npz`, `samples.jsonl`, `evaluation.json` and, last, their seal; returns what is evaluated."""
    config = run.experiment.evaluation
    judge = independent_judge(run)
    prompts = run.corpus.prompts("test", config.prompts)
    reference, stage = reference_side(run, aligned, prompts)
    seconds = {"reference_evaluation": stage.summary["seconds"]}
    if judge is not None:
        values, seconds["reference_judge"] = _reference_judge(run, judge, stage, prompts, reference.responses)
        reference = reference._replace(judge=values)
    started = time.monotonic()
    rollouts, rewards = respond(
        run, "policy responses", aligned.policy, aligned.reward.score, prompts.prompts, config.responses_per_prompt
    )
    responses = rollouts.responses
    judged = None if judge is None else score(run, judge.score, prompts.prompts, responses)
    policy = Judged(responses, rewards, _gold(run, prompts, responses), judged)
    kl_by_prompt = _kl_by_prompt(run, aligned, rollouts)
    reward_quality, figures = _reward_quality(run, aligned.alone)
    curves = {**figures, **aligned.validation}
    ranks = _ranks(policy, reference)

    results.unseal(run.work_dir)
    scored.keep(run, aligned.asked, run.work_dir, prompts.prompts, policy.responses)
    before = _along(run, aligned, prompts, reference)
    arrays = {**_arrays(policy, reference), **ranks, **curves, KL_ARRAY: kl_by_prompt, **before}
    write_arrays(run.work_dir / "evaluation.npz", **arrays)
    _write_samples(run, prompts, {"policy": policy, "reference": reference}, ranks)
    evaluation = Evaluation(
        **_kl(run, kl_by_prompt),
        **_win_rates(run, policy, reference),
        along=_points(run, before, reference),
        judge=config.judge,
        judge_fingerprint=None if judge is None else judge.fingerprint,
        ideal={
            name: _ideal(run.experiment.policy.objective, name, float(kl_by_prompt.mean())) for name in _procedures(run)
        },
        reward_model=reward_quality,
        reward_training=aligned.reward_training,
        reward_signal=aligned.reward_signal,
        floors=_floors(run, aligned, prompts, responses),
        ties=float(np.mean(win_rate.share_of_ties(jnp.asarray(policy.rewards), jnp.asarray(reference.rewards)))),
        **_lengths(run, {"policy": policy.responses, "reference": reference.responses}),
        timings=timings(
            {
                **aligned.seconds,
                **seconds,
                "policy": training_seconds(run.work_dir),
                "evaluation": time.monotonic() - started,
            }
        ),
    )
    write_json(run.work_dir / "evaluation.json", evaluation.as_json())
    results.seal(run.work_dir, run.claimed_config, draws=randomness.draws())
    return evaluation


def reference_side(run: Run, aligned: Aligned, prompts: PromptSet) -> tuple[Judged, Stage]:
    """The reference's side and its stage, once for all policies that are compared with it."""
    config = run.experiment.evaluation
    stage = run.stage(
        "reference_evaluation",
        corpus=data.key(run.corpus, "test"),
        reference=aligned.reference.stage,
        reward_model=aligned.reward.fingerprint,
    )
    path = stage.directory / "responses.npz"
    with stage.exclusive():
        if stage.complete and (reason := scored.changed(run, aligned.reward.asked, stage.directory)):
            place = stage.supersede()
            say(f"{reason}. The reference is evaluated anew; the old one is in {place}.", style="yellow")
        if not stage.complete:
            if path.exists():
                say(f"{stage.directory} was left without its {DONE}: it is made anew.", style="yellow")
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
            scored.keep(run, aligned.reward.asked, stage.directory, prompts.prompts, responses)
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
        stage,
    )


def _reference_judge(
    run: Run, judge: Reward, reference: Stage, prompts: PromptSet, responses: Responses
) -> tuple[np.ndarray, float]:
    """[B, M] what the judge gives the reference's responses, and the seconds it took: a stage of each judge."""
    stage = run.stage("reference_judge", reference_evaluation=reference.directory.name, judge=judge.fingerprint)
    path = stage.directory / "judge.npz"
    with stage.exclusive():
        if not stage.complete:
            started = time.monotonic()
            write_arrays(path, judge=score(run, judge.score, prompts.prompts, responses))
            stage.finish({"seconds": time.monotonic() - started})
    return read_arrays(path)["judge"], stage.summary["seconds"]


def _gold(run: Run, prompts: PromptSet, responses: Responses) -> np.ndarray | None:
    """Gold rewards [B, M], which generated data alone has."""
    return gold.reward(run.corpus).score(prompts.prompts, responses) if run.experiment.data.generated else None


def _judges(policy: Judged, reference: Judged) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What judges both sides beside the training reward: gold and judge, where they exist."""
    sides = {"gold": (policy.gold, reference.gold), "judge": (policy.judge, reference.judge)}
    return {name: (ours, theirs) for name, (ours, theirs) in sides.items() if ours is not None and theirs is not None}


def _arrays(policy: Judged, reference: Judged) -> dict[str, Any]:
    arrays: dict[str, Any] = {"policy_rewards": policy.rewards, "reference_rewards": reference.rewards}
    for name, sides in _judges(policy, reference).items():
        arrays |= {f"{side}_{name}": values for side, values in zip(("policy", "reference"), sides, strict=True)}
    lengths = {"policy_lengths": policy.responses.lengths, "reference_lengths": reference.responses.lengths}
    return arrays | lengths


def _ranks(policy: Judged, reference: Judged) -> dict[str, np.ndarray]:
    """Calibrated rewards [B, M] of both sides among the reference's, whose own are left out of their comparison."""
    rewards, reference_rewards = jnp.asarray(policy.rewards), jnp.asarray(reference.rewards)
    return {
        "policy_calibrated": np.asarray(calibration.calibrate(rewards, reference_rewards)),
        "reference_calibrated": np.asarray(calibration.leave_one_out(reference_rewards)),
    }


def _lengths(run: Run, sides: dict[str, Responses]) -> dict[str, Any]:
    """How long responses are, in tokens, and the share that has not ended within `data.response_length`."""
    lengths, unfinished = {}, {}
    for side, responses in sides.items():
        counts = np.asarray(responses.lengths)
        quantiles = np.quantile(counts, (0.1, 0.5, 0.9))
        lengths[side] = Lengths(float(counts.mean()), *map(float, quantiles))
        ended = sampling.ended(jax.tree.map(jnp.asarray, responses), run.corpus.tokenizer.eos_ids)
        unfinished[side] = float(1 - np.asarray(ended).mean())
    return {"response_length": lengths, "unfinished": unfinished}


def _kl_by_prompt(run: Run, aligned: Aligned, rollouts: Rollouts) -> np.ndarray:
    """Exact KL of each test prompt [B], nats per response, the mean over the policy's own responses."""
    measure = assembly.kl_of_responses(run.models, run.mesh, temperature=run.experiment.policy.temperature)
    per_response = in_batches(
        run,
        "kl",
        lambda batch: measure(aligned.policy, aligned.reference.params, batch),
        rollouts,
        rows_per_prompt=rollouts.responses.tokens.shape[1],
    )
    return per_response.mean(axis=1)


def _kl(run: Run, by_prompt: np.ndarray) -> dict[str, Any]:
    """The KL with its interval and, of two or more prompts, its standard error."""
    # Of equal laws it may be below 0 by rounding.
    least = min(0.0, float(np.mean(by_prompt)))
    measured: dict[str, Any] = {"kl": _interval(run, "kl", by_prompt, bounds=(least, math.inf))}
    if len(by_prompt) > 1:
        measured["kl_standard_error"] = float(np.std(by_prompt, ddof=1) / np.sqrt(len(by_prompt)))
    return {**measured, "kl_budget": run.experiment.policy.kl_budget}


def _along(run: Run, aligned: Aligned, prompts: PromptSet, reference: Judged) -> dict[str, np.ndarray]:
    """The arrays of the policies along the training, as they are in evaluation.npz."""
    config = run.experiment.evaluation
    count = config.along_responses or config.responses_per_prompt

    def measure(label: str, params: Params) -> tuple[np.ndarray, np.ndarray]:
        rollouts, rewards = respond(run, label, params, aligned.reward.score, prompts.prompts, count)
        return rewards, _kl_by_prompt(run, aligned._replace(policy=params), rollouts)

    return along.measured(run, aligned.policy, measure, beside=reference.rewards)


def _points(run: Run, arrays: dict[str, np.ndarray], reference: Judged) -> tuple[Point, ...]:
    """KL and win rates of each policy along the training, with their intervals."""
    found = []
    rivals = jnp.asarray(reference.rewards)
    for step, rewards, kl in zip(*(arrays.get(name, ()) for name in ALONG_ARRAYS), strict=True):
        win_rates = {
            name: _interval(
                run, name, win_rate.win_rate(jnp.asarray(rewards), rivals, procedures.parse(name)), bounds=(0, 1)
            )
            for name in _procedures(run)
        }
        found.append(Point(int(step), _kl(run, kl)["kl"], win_rates))
    return tuple(found)


def _interval(run: Run, label: str, per_prompt: np.ndarray | jax.Array, *, bounds: tuple[float, float]) -> Estimate:
    key = randomness.stage_key(run.experiment.seed, f"interval of {label}")
    resamples = run.experiment.evaluation.bootstrap_resamples
    return Estimate.of(*win_rate.interval(jnp.asarray(per_prompt), key, resamples=resamples, bounds=bounds))


def _win_rates(run: Run, policy: Judged, reference: Judged) -> dict[str, Any]:
    """Win rates by procedure: what the training reward picks, as it judges it itself, and as gold and judge do."""
    rewards, reference_rewards = jnp.asarray(policy.rewards), jnp.asarray(reference.rewards)
    tables: dict[str, Any] = {"judged_by": _training_reward(run), "win_rates": {}}
    tables |= {"gold_win_rates": {}, "judge_win_rates": {}}
    for name in _procedures(run):
        procedure = procedures.parse(name)
        tables["win_rates"][name] = _interval(
            run, name, win_rate.win_rate(rewards, reference_rewards, procedure), bounds=(0, 1)
        )
        for judge, (ours, theirs) in _judges(policy, reference).items():
            per_prompt = win_rate.judged_win_rate(
                rewards, reference_rewards, jnp.asarray(ours), jnp.asarray(theirs), procedure
            )
            tables[f"{judge}_win_rates"][name] = _interval(run, name, per_prompt, bounds=(0, 1))
    return tables


def _floors(run: Run, aligned: Aligned, prompts: PromptSet, responses: Responses) -> dict[str, Floor]:
    """The mean rank of the policy's responses by each reward that is constrained."""
    policy = run.experiment.policy
    if aligned.constraints is None or not policy.floors:
        return {}
    names, rank = aligned.constraints.names, aligned.constraints.rank
    by_prompt = score(run, rank, prompts.prompts, responses).mean(axis=1)
    return {
        name: Floor(_interval(run, f"rank by {name}", by_prompt[:, place], bounds=(0, 1)), policy.floors[place])
        for place, name in enumerate(names)
    }


def _training_reward(run: Run) -> str:
    """Who judges `win_rates`, in words."""
    config = run.experiment.reward_model
    name = (
        f"the classifier {config.path}" if config.path is not None
        else f"the function {config.function}" if config.function is not None
        else "the reward model"
    )  # fmt: skip
    combine = run.experiment.combine
    if run.experiment.combines:
        name = f"{combine.by} of {' and '.join([name, *combine.rewards])},"
    return f"{name} that the policy was trained on"


def _procedures(run: Run) -> list[str]:
    """Those asked for, and the two of every summary: sampling, and the one that the policy was trained for."""
    experiment = run.experiment
    asked = [*experiment.evaluation.procedures, "sampling", experiment.policy.procedure]
    return list(dict.fromkeys(procedures.parse(name).name for name in asked))


def _ideal(objective: Objective, name: str, kl: float) -> Ideals:
    """What ideal policies at this KL win under a procedure: trained with the identity, with Φ, and with its own Φ*.

    None where the KL is out of reach, and for the Φ of a raw reward, which no theory of ranks describes.
    """
    procedure = procedures.parse(name)
    candidates = {
        "identity": Objective(transforms.identity(), procedure, objective.kl_budget),
        "optimal": Objective(optimal(), procedure, objective.kl_budget),
        "transform": objective,
    }
    values: dict[str, float | None] = {}
    for label, candidate in candidates.items():
        try:
            ideal = candidate.ideal(kl)
        except InputError:
            ideal = None
        values[label] = None if ideal is None else ideal.win_rate(procedure)
    return Ideals(**values)


def _reward_quality(run: Run, reward: Reward) -> tuple[RewardQuality, dict[str, np.ndarray]]:
    """How a reward ranks held-out pairs, and the arrays of its figures; nothing without pairs.

    Of a model of preferences: accuracy with its 95 % interval (Wilson), the margins, and how far they follow length. Of
    one that was trained here expected calibration error and Brier score, too, for its margins are log-odds of the
    Bradley-Terry model; whether those of a classifier from a directory are is not known. A function is no model of
    preferences: how many pairs it ranks as their labels do, and how many it does not tell apart.

    Probabilities and the correlation take both orders of a pair: in the order (chosen, rejected) every outcome would be
    1. Margins are of that order.
    """
    config = run.experiment.reward_model
    if not run.corpus.has_pairs("test", long_prompts=config.long_prompts):
        return RewardQuality(), {}
    pairs = data.pairs(run.corpus, "test", long_prompts=config.long_prompts).examples
    rewards = score(run, reward.score, pairs.prompts, pairs.responses)
    count = len(rewards)
    if config.function is not None:
        agreements, ties = rewards[:, 0] > rewards[:, 1], rewards[:, 0] == rewards[:, 1]
        return RewardQuality(pairs=count, agreements=int(agreements.sum()), equal=int(ties.sum())), {}
    chosen, rejected = jnp.asarray(rewards[:, 0]), jnp.asarray(rewards[:, 1])
    accuracy = float(preference.accuracy(chosen, rejected).value)
    low, high = map(float, preference.wilson(accuracy, count))
    margins, lengths = chosen - rejected, jnp.asarray(pairs.responses.lengths)
    longer = lengths[:, 0] - lengths[:, 1]
    both = [jnp.concatenate([difference, -difference])[None] for difference in (margins, longer)]
    follows = float(rank_correlation.spearman(*both)[0])
    quality = RewardQuality(
        count, accuracy, low, high, margin_length_correlation=None if math.isnan(follows) else follows
    )
    arrays = {MARGINS_ARRAY: np.asarray(margins)}
    if not config.trained:
        return quality, arrays
    probabilities = jax.nn.sigmoid(both[0][0])
    outcomes = jnp.concatenate([jnp.ones_like(margins), jnp.zeros_like(margins)])
    reliability = preference.reliability(probabilities, outcomes, bins=RELIABILITY_BINS)
    columns = (reliability.predicted.value, reliability.observed.value, reliability.predicted.weight)
    arrays |= dict(zip(RELIABILITY_ARRAYS, map(np.asarray, columns), strict=True))
    ece = float(preference.expected_calibration_error(reliability))
    return quality._replace(ece=ece, brier=float(preference.brier(probabilities, outcomes).value)), arrays


def _write_samples(run: Run, prompts: PromptSet, sides: dict[str, Judged], ranks: dict[str, np.ndarray]) -> None:
    """The procedure's pick among each side's first responses to every test prompt."""
    procedure = run.experiment.policy.objective.procedure
    key = randomness.stage_key(run.experiment.seed, "samples")
    rows: list[dict[str, Any]] = [{"prompt": text} for text in prompts.texts]
    for name, judged in sides.items():
        picks = np.asarray(procedure.select(jnp.asarray(judged.rewards[:, : procedure.num_samples]), key))
        picked = order.take(judged.responses, jnp.asarray(picks))
        values = {"reward": judged.rewards, "calibrated": ranks[f"{name}_calibrated"]}
        values |= {other: found for other in ("gold", "judge") if (found := getattr(judged, other)) is not None}
        for i, (row, (text,)) in enumerate(zip(rows, run.corpus.texts(picked), strict=True)):
            row[name] = {"text": text, **{word: float(of_all[i, picks[i]]) for word, of_all in values.items()}}
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # A byte-level tokenizer decodes to lone surrogates at worst, which UTF-8 cannot hold.
    write_bytes(run.work_dir / "samples.jsonl", lines.encode(errors="backslashreplace"))
