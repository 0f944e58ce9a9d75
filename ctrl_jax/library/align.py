"""Alignment of a model with a reward, both at hand, from one call to a report."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ctrl_jax import config
from ctrl_jax.commands import report
from ctrl_jax.data import jsonl
from ctrl_jax.data.conversations import Record
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.data.rows import GIVEN
from ctrl_jax.errors import InputError
from ctrl_jax.evaluation import Evaluation
from ctrl_jax.library.model import Model, Prompt, generate, longest_prompt, records
from ctrl_jax.library.rewards import Reward
from ctrl_jax.pipeline import align as pipeline
from ctrl_jax.pipeline import evaluate, export, reward_model, train
from ctrl_jax.pipeline.run import Run, prepare
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.rewards import function
from ctrl_jax.runtime import leftovers
from ctrl_jax.runtime.stages import read_json, write_bytes
from ctrl_jax.theory.objective import Objective, Optimal, Raw
from ctrl_jax.theory.procedures import Procedure

PROMPT_LENGTH = 64
"""Tokens of a prompt that there is always room for, so that test prompts may be longer than those to train on."""
TESTED = "test_prompts.jsonl"
"""The prompts of the last evaluation, in the work directory."""


@dataclass(frozen=True)
class Constraint:
    """A reward that `align` does not climb: the policy's mean rank by it stays at a floor or above.

    E_{y ~ π} [C(y)] ≥ floor, where C is a response's rank in [0, 1] among the reference's, kept by a multiplier that
    follows what is measured (steps/multipliers.py; Moskovitz et al. 2023, arXiv 2310.04373).

    Attributes:
      reward: any function (prompts, responses) → a float each.
      floor: the mean rank to keep, in (0, 1); .5 is the reference's own.
      name: a word that names a reward without a source, or one of two of the same name; by default its own name. In
        `evaluation.floors` it stands behind the module, as `__main__:brevity`.
    """

    reward: Reward
    floor: float = 0.5
    name: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.floor, int | float) and 0 < self.floor < 1):
            raise InputError(
                f"Constraint.floor is {self.floor!r}",
                field="floor",
                value=self.floor,
                remedy="give a mean rank between 0 and 1; .5 is the reference's own.",
            )
        if self.name is not None and not self.name.isidentifier():
            raise InputError(
                f"Constraint.name is {self.name!r}", field="name", value=self.name, remedy="give a word: polite."
            )


@dataclass(frozen=True, eq=False)
class Aligned:
    """A policy that `align` trained, with the reference that it started from.

    Attributes:
      policy: the trained model, for `generate`.
      reference: the model before.
      objective: what it was trained for.
      work_dir: the folder of the run, with its metrics and checkpoints.
    """

    policy: Model
    reference: Model
    objective: Objective
    _run: Run
    _trained: train.Aligned

    @property
    def work_dir(self) -> Path:
        return self._run.work_dir

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[list[str]]:
        """Texts of the policy: `generate(aligned.policy, prompts, **options)`."""
        return generate(self.policy, prompts, **options)

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        *,
        responses_per_prompt: int = 64,
        procedures: Sequence[Procedure] | None = None,
        resamples: int = 1000,
    ) -> Evaluation:
        """Unbiased win rates of the policy against the reference, and its KL, on prompts that it was not trained on.

        Calling it again with the same prompts reads what is there; with others it evaluates anew, and sets aside what
        was there.

        Args:
          prompts: B texts or message lists; the intervals are over these.
          responses_per_prompt: M, of the policy and of the reference each.
          procedures: to decode both with, beside one sample and the objective's own; by default best and worst of 2 to
            16, as far as M allows.
          resamples: of the prompts, behind the intervals.

        Returns:
          `.win_rates[name]`, `.kl` (nats per response) with mean, low and high of a 95 % interval, and `.ideal[name]`:
          the win rates of ideal policies at the measured KL. low and high are None for fewer than 5 prompts.
          `.floors[name]` has the mean rank by each reward that was constrained, with its interval and its floor.

        Raises:
          InputError: if a prompt or an option cannot be used.
        """
        run = _current(self._run)
        assert run.given is not None, "align gives one"
        found = _distinct(run.given, records(prompts, "prompts", run.given.format))
        asked = config.Evaluation(
            prompts=len(found),
            responses_per_prompt=responses_per_prompt,
            procedures=_names(procedures, responses_per_prompt),
            bootstrap_resamples=resamples,
        )
        asked_run = prepare(
            replace(
                run,
                experiment=replace(run.experiment, evaluation=asked),
                given=replace(run.given, records={**run.given.records, "test": found}),
            )
        )
        with run.claimed():
            evaluation = evaluate.read(asked_run)
            if evaluation is None:
                asked_run.renew(self._trained.depends)
                _write_rows(self.work_dir / TESTED, found)
                rewarded = reward_model.run(asked_run, self._trained.reference)
                trained = self._trained._replace(
                    reward=rewarded.reward, alone=rewarded.alone, constraints=rewarded.constraints
                )
                if rewarded.combine_seconds is not None:  # with the test prompts' part
                    trained = trained._replace(seconds={**trained.seconds, "combine": rewarded.combine_seconds})
                evaluation = evaluate.run(asked_run, trained)
        return evaluation

    def report(self) -> Path:
        """Writes `report/` below the work directory: a page with every figure, and each as PNG, SVG, PDF and CSV.

        Returns:
          The path of its index.html.

        Raises:
          InputError: before `evaluate`.
        """
        if not (self.work_dir / "evaluation.json").exists():
            raise InputError(
                f"{self.work_dir} has no evaluation.json yet",
                field="work_dir",
                value=str(self.work_dir),
                remedy="call evaluate(test_prompts) first.",
            )
        return report.write(self.work_dir)

    def export(self, path: str | os.PathLike[str], *, form: Literal["merged", "adapter"] = "merged") -> Path:
        """Writes the policy as a Hugging Face directory that transformers, vLLM and others load.

        Args:
          path: the directory to write; it must not exist, or be empty.
          form: `merged` weights, or the LoRA `adapter` alone, as PEFT reads it.

        Raises:
          InputError: if the path is taken, or there is no adapter.
        """
        output = Path(path).expanduser()
        export.check(self._run.experiment, output, form)
        export.run(self._run, self._trained, output, form)
        return output

    def __repr__(self) -> str:
        return f"<Aligned {self.work_dir}: {self.objective.transform}, {self.objective.procedure}>"


def align(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    reward: Reward,
    objective: Objective,
    constraints: Sequence[Constraint] = (),
    work_dir: str | os.PathLike[str],
    reward_name: str | None = None,
    steps: int = 150,
    prompts_per_step: int | None = None,
    samples_per_prompt: int = 16,
    references_per_prompt: int = 128,
    max_length: int = 64,
    prompt_length: int | None = None,
    learning_rate: float = 2e-4,
    warmup_steps: int = 10,
    lora_rank: int = 16,
    lora_alpha: float = 32.0,
    lora_last_layers: int | None = None,
    temperature: float = 1.0,
    beta: float | None = None,
    seed: int = 0,
    checkpoint_every: int = 25,
    micro_batches: int | None = None,
    rematerialize: bool = False,
    stages_dir: str | os.PathLike[str] | None = None,
) -> Aligned:
    """Trains a policy with the calibrated, transformed reward at the objective's KL budget (InfAlign-CTRL).

    The reference policy is the model as it is. It answers every prompt `references_per_prompt` times, which calibrates
    the reward; then each step samples, scores and updates. The same call goes on where an earlier one was stopped, and
    reads a finished policy. Where prompts or the reward's source have changed, what depends on them is made anew, and
    what was there is set aside.

    Args:
      model: from `load_model`.
      prompts: texts, or lists of messages {role, content}; equal ones count once.
      reward: any function (prompts, responses) → a float each. It gets the prompts as they were given.
      objective: transform, procedure and KL budget.
      constraints: other rewards, and the mean rank by each that the policy keeps. For these the reference answers every
        prompt `references_per_prompt` times more.
      work_dir: the folder of this run, which no other run shares.
      reward_name: names a reward that has no source, such as a built-in; otherwise its own name.
      steps: updates of the policy.
      prompts_per_step: by default 32, or as many as there are.
      samples_per_prompt: N rollouts a prompt and step, at least 2.
      references_per_prompt: K reference responses a prompt. exponential(10) needs some 100.
      max_length: T, tokens of a response; longer ones are cut.
      prompt_length: P, the most tokens that a prompt to train on or to test with may have; by default those of the
        longest here, and at least 64.
      learning_rate: of the adapters; a tenth of it suits `lora_rank=0`.
      warmup_steps: fewer than `steps`; at most a tenth of them is taken.
      lora_rank: of the adapters; 0 trains all weights.
      lora_alpha: the adapters' scale is alpha / rank.
      lora_last_layers: how many of the last layers have adapters, for a shorter update; by default all.
      temperature: of the law that is sampled and scored.
      beta: a fixed weight of the KL; by default it follows from the KL budget.
      seed: of every random draw.
      checkpoint_every: steps.
      micro_batches: parts of a batch to take the gradient of in turn, for less memory; by default as memory asks.
      rematerialize: compute activations again in the backward pass, for less memory.
      stages_dir: what runs share: the reference's rewards; by default `stages` beside the work directory.

    Raises:
      InputError: if an argument cannot be used, or the work directory is another run's.
    """
    _check(model, objective)
    corpus = _corpus(model, prompts, prompt_length, max_length)
    count, length = len(corpus.records["train"]), corpus.prompt_length
    functions, place = _functions(function.given(reward, reward_name), constraints), Path(work_dir).expanduser()
    climbed, *others = functions
    policy = _policy(
        objective,
        constraints,
        beta=beta,
        steps=steps,
        prompts_per_step=_prompts_per_step(prompts_per_step, count),
        samples_per_prompt=samples_per_prompt,
        micro_batches=micro_batches,
        learning_rate=learning_rate,
        warmup_steps=min(warmup_steps, steps // 10),
        temperature=temperature,
        checkpoint_every=checkpoint_every,
    )
    experiment = config.Experiment(
        name=place.name,
        data=config.Data(source=GIVEN, format=model.format, prompt_length=length, response_length=max_length),
        model=_model(model, config.Lora(lora_rank, lora_alpha, last_layers=lora_last_layers), rematerialize),
        sft=config.Supervised(steps=0),
        reward_model=config.RewardModel(function=climbed),
        combine=config.Combine(rewards=tuple(others)),
        calibration=config.Calibration(prompts=count, samples_per_prompt=references_per_prompt),
        policy=policy,
        evaluation=_evaluation(objective.procedure, prompts=1),
        seed=seed,
    )
    workspace = Workspace(experiment, place, _stages(place, stages_dir), model.mesh, functions=functions, given=corpus)
    return _trained(workspace, model, objective)


def _stages(place: Path, given: str | os.PathLike[str] | None) -> Path:
    return place.parent / "stages" if given is None else Path(given).expanduser()


def _trained(workspace: Workspace, model: Model, objective: Objective) -> Aligned:
    assert workspace.given is not None, "align gives it"
    with leftovers.removed_on_failure(workspace.work_dir, workspace.stages_dir):
        for one in workspace.functions.values():
            function.check(one, workspace.given)
        workspace = _current(workspace)
        with workspace.claimed():
            run = prepare(workspace)
            trained = pipeline.policy(run)
    policy = replace(model, lora=run.experiment.model.lora, load=lambda: trained.policy)
    reference = replace(model, load=lambda: trained.reference.params)
    return Aligned(policy, reference, objective, run, trained)


def _check(model: Any, objective: Any) -> None:
    if not isinstance(model, Model):
        raise InputError(f"model is {model!r:.80}", field="model", value=model, remedy="give what load_model returns.")
    if not isinstance(objective, Objective):
        raise InputError(
            f"objective is {objective!r:.80}",
            field="objective",
            value=objective,
            remedy="give one such as Objective(exponential(10), best_of(4), kl_budget=0.6).",
        )


def _functions(climbed: function.Function, constraints: Any) -> dict[str, function.Function]:
    """The reward that is climbed and those of the constraints, each by a name of its own."""
    if not isinstance(constraints, list | tuple):
        raise InputError(
            f"constraints is {constraints!r:.80}",
            field="constraints",
            value=constraints,
            remedy="give a list, such as [Constraint(reward, floor=0.5)].",
        )
    found = {climbed.name: climbed}
    for place, one in enumerate(constraints):
        field = f"constraints[{place}]"
        if not isinstance(one, Constraint):
            raise InputError(
                f"{field} is {one!r:.80}",
                field=field,
                value=one,
                remedy="give one such as Constraint(reward, floor=0.5).",
            )
        made = function.given(one.reward, one.name)
        if made.name in found:
            raise InputError(
                f"{field} is named {made.name!r}, as another reward is",
                field=field,
                value=made.name,
                remedy="give it a name of its own: Constraint(reward, name=...).",
            )
        found[made.name] = made
    return found


def _empty() -> InputError:
    return InputError(
        "prompts is empty", field="prompts", value=[], remedy="give at least one, and better some dozens."
    )


def _corpus(model: Model, prompts: Sequence[Prompt], prompt_length: int | None, max_length: int) -> Corpus:
    """The distinct prompts to train on."""
    found = records(prompts, "prompts", model.format)
    if not found:
        raise _empty()
    length = _prompt_length(model, found, prompt_length, max_length)
    splits: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    corpus = Corpus(splits, model.tokenizer, length, max_length, format=model.format, source=GIVEN)
    corpus.records["train"] = _distinct(corpus, found)
    return corpus


def _prompt_length(model: Model, found: Sequence[Record], given: int | None, max_length: int) -> int:
    """P, tokens: room for the longest of the prompts, and for test prompts that are somewhat longer."""
    longest, room = longest_prompt(model, found, "prompts", max_length=max_length)
    if given is not None and not longest <= given <= room:
        raise InputError(
            f"prompt_length is {given}, and the longest of the prompts has {longest} tokens",
            field="prompt_length",
            value=given,
            remedy=f"give {longest} to {room}, for which {model.path} has room beside max_length {max_length}.",
        )
    return min(max(PROMPT_LENGTH, longest), room) if given is None else given


def _distinct(corpus: Corpus, found: Sequence[Record]) -> list[Record]:
    """The first record of each prompt.

    Raises:
      InputError: if there is none, or one is longer than the policy's prompts may be.
    """
    if not found:
        raise _empty()
    for i, record in enumerate(found):
        length = len(corpus.tokenizer.encode_prompt(record.prompt))
        if length > corpus.prompt_length:
            raise InputError(
                f"prompts[{i}] has {length} tokens, and the policy's prompts have at most {corpus.prompt_length}",
                field=f"prompts[{i}]",
                value=length,
                remedy=f"shorten it, or train with prompt_length={length}.",
            )
    return [*{record.prompt: record for record in reversed(found)}.values()][::-1]


def _model(model: Model, lora: config.Lora, rematerialize: bool) -> config.Model:
    adapter = None if model.adapter is None else str(model.adapter)
    return config.Model(
        path=str(model.path), adapter=adapter, dtype=model.dtype, lora=lora, rematerialize=rematerialize
    )


def _prompts_per_step(given: int | None, count: int) -> int:
    """By default 32; fewer where there are fewer prompts."""
    if given is not None and given > count:
        raise InputError(
            f"prompts_per_step is {given}, and there are {count} prompts",
            field="prompts_per_step",
            value=given,
            remedy=f"make it at most {count}.",
        )
    return min(32, count) if given is None else given


def _policy(objective: Objective, constraints: Sequence[Constraint], **options: Any) -> config.Policy:
    """CTRL for the objective, under the constraints where there are any."""
    named = {"transform": _transform(objective), "procedure": objective.procedure.name}
    options |= {**named, "kl_budget": objective.kl_budget}
    return config.Policy(floors=tuple(one.floor for one in constraints), **options)


def _transform(objective: Objective) -> str:
    """Φ in a configuration: by its name, or as the function that it is."""
    transform = objective.transform
    if isinstance(transform, Raw | Optimal):
        return str(transform)
    try:
        parsed = Objective.parse(str(transform), objective.procedure.name, objective.kl_budget)
    except InputError:
        return config.TransformName.of(objective)
    return str(transform) if parsed.transform == transform else config.TransformName.of(objective)


def _evaluation(procedure: Procedure, *, prompts: int) -> config.Evaluation:
    count = max(64, procedure.num_samples)
    return config.Evaluation(prompts=prompts, responses_per_prompt=count, procedures=_names(None, count))


Place = TypeVar("Place", bound=Workspace)


def _current(run: Place) -> Place:
    """The run with the evaluation that its work directory has: it decides nothing that is trained."""
    assert run.given is not None, "align gives one"
    try:
        before = read_json(run.work_dir / "config.json")["evaluation"]
        evaluation = config.Evaluation(**{**before, "procedures": tuple(before["procedures"])})
        rows = [row for _, row in jsonl.rows(run.work_dir / TESTED)]
    except (InputError, OSError, KeyError, TypeError):
        return run
    tested = records([row["prompt"] for row in rows], TESTED, run.given.format)
    return replace(
        run,
        experiment=replace(run.experiment, evaluation=evaluation),
        given=replace(run.given, records={**run.given.records, "test": tested}),
    )


def _write_rows(path: Path, found: Sequence[Record]) -> None:
    lines = "".join(json.dumps({"prompt": record.asked}, ensure_ascii=False) + "\n" for record in found)
    write_bytes(path, lines.encode(errors="backslashreplace"))


def _names(procedures: Sequence[Procedure] | None, most: int) -> tuple[str, ...]:
    if procedures is not None:
        return tuple(procedure.name for procedure in procedures)
    counts = [2**power for power in range(1, 1 + int(math.log2(min(16, max(most, 1)))))]
    return ("sampling", *(f"{side}_of_{n}" for side in ("best", "worst") for n in counts))
