"""What can be known of the data before anything is trained: whether it has enough for what an experiment asks of it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from ctrl_jax.config import Experiment, Pairs, RewardModel
from ctrl_jax.data.conversations import transcript
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.data.pipelines import Demonstrations
from ctrl_jax.data.rows import listed
from ctrl_jax.errors import InputError
from ctrl_jax.rewards import function
from ctrl_jax.steps import linear_reward

LONGEST_PROMPT = 512
"""Tokens, up to which a longer context is proposed rather than a cut."""
FEW = 8
"""Test prompts, below which intervals over them say little."""


class Problem(NamedTuple):
    text: str
    options: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)
    """What would mend it: a value for each of these fields."""


def check(
    experiment: Experiment,
    corpus: Corpus,
    *,
    parts: int,
    at_hand: Mapping[str, function.Function] = MappingProxyType({}),
) -> None:
    """Refuses data that the experiment cannot be run on; batches are split into `parts`.

    Args:
      at_hand: the rewards' functions that are not to be imported, by name.

    Raises:
      InputError: with every problem, and the options that mend them all.
    """
    problems = [*_vocabulary(corpus), *_prompts(experiment, corpus, parts)]
    if any({"data.prompt_length", "data.long_prompts"} & problem.options.keys() for problem in problems):
        # What else there is to say, is said of the data with its long prompts let in.
        corpus = replace(corpus, long_prompts="truncate")
    problems += [*_demonstrations(experiment, corpus, parts), *_reward(experiment, corpus, parts, at_hand)]
    problems += _pairs(experiment, corpus, parts)
    if not problems:
        return
    where = f" at {experiment.data.path}" if experiment.data.path else ""
    options: dict[str, Any] = {}
    for problem in problems:
        # The longest of the lengths lets in all prompts, and the smallest of the batches can be filled by all.
        for option, value in problem.options.items():
            of_both = {"data.prompt_length": max, "policy.prompts_per_step": min}.get(option)
            options[option] = of_both(value, options[option]) if of_both and option in options else value
    numbered = "".join(f"\n  {i}. {problem.text}" for i, problem in enumerate(problems, 1))
    mended = " ".join(f"`{option}={value}`" for option, value in options.items())
    count = "One problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise InputError(
        f"{count} with the data{where} and what is asked of it; nothing was trained. {corpus.origin}{numbered}"
        + (f"\nAll options together, behind the same command:\n  {mended}" if mended else "")
    )


def _vocabulary(corpus: Corpus) -> Iterator[Problem]:
    if corpus.vocabulary is not None:
        yield Problem(corpus.vocabulary, {"data.vocabulary_size": corpus.tokenizer.vocabulary_size})


def _prompts(experiment: Experiment, corpus: Corpus, parts: int) -> Iterator[Problem]:
    calibrated, step = experiment.calibration.prompts, experiment.policy.prompts_per_step
    found, problems = _few_prompts(experiment, corpus, "train", calibrated, "calibration.prompts")
    yield from problems
    if min(found, calibrated) < step:
        fitting = _multiple(min(found, calibrated), parts)
        yield Problem(
            f"A step takes {step} of the {found} train prompts (`policy.prompts_per_step`); make it a smaller number"
            + (f" that {parts} devices divide, or choose `devices`." if parts > 1 else "."),
            {"policy.prompts_per_step": fitting} if fitting else {"devices": 1},
        )
    found, problems = _few_prompts(experiment, corpus, "test", experiment.evaluation.prompts, "evaluation.prompts")
    yield from problems


def _few_prompts(
    experiment: Experiment, corpus: Corpus, split: str, wanted: int, option: str
) -> tuple[int, list[Problem]]:
    """How many distinct prompts of a split fit, or will with what is proposed; and what is wrong with that."""
    data = experiment.data
    try:
        if len(corpus.prompts(split, wanted).texts) >= wanted:
            return wanted, []
    except InputError:
        pass  # said here, with all the others
    distinct = {transcript(record.prompt): record.prompt for record in corpus.records[split]}
    lengths = [len(corpus.tokenizer.encode_prompt(prompt)) for prompt in distinct.values()]
    fitting = sum(length <= data.prompt_length or data.long_prompts == "truncate" for length in lengths)
    longer = len(lengths) - fitting
    text = f"{wanted} {split} prompts are asked for (`{option}`), and there are {fitting}"
    options: dict[str, Any] = {}
    if longer:
        text += (
            f" of at most {data.prompt_length} tokens; {longer} are longer, up to {max(lengths)}: let them in "
            "(`data.prompt_length`), or cut them (`data.long_prompts=truncate`)"
        )
        fits = max(lengths) <= LONGEST_PROMPT
        options |= {"data.prompt_length": max(lengths)} if fits else {"data.long_prompts": "truncate"}
    proposed = min(wanted, len(lengths))
    if proposed:
        options |= {option: proposed} if proposed < wanted else {}
    text += "." if longer and not options.get(option) else ". Ask for fewer, or give more rows."
    if split == "test" and proposed < FEW:
        text += f" {proposed} test prompts say little: better choose them yourself, as a folder's test.jsonl."
    return proposed, [Problem(text, options)]


def _demonstrations(experiment: Experiment, corpus: Corpus, parts: int) -> Iterator[Problem]:
    sft, data = experiment.sft, experiment.data
    if not sft.steps or not corpus.records["train"]:
        return
    field = data.demonstrations
    found, pairs = _usable(corpus, field, sft.batch_size), _usable(corpus, "pairs", sft.batch_size)
    options: dict[str, Any] = {}
    if not found:
        text = (
            f"There is no demonstration to fine-tune the reference policy on: no row has a {field!r}{_columns(corpus)}."
        )
        if field == "response" and pairs:
            text += " The chosen replies of the pairs may serve: `data.demonstrations=chosen`."
            options["data.demonstrations"], found = "chosen", pairs
        if experiment.model.path is not None:
            text += " Or leave the fine-tuning out: `sft.steps=0`."
            options = options or {"sft.steps": 0}
        else:
            text += " A model from scratch needs some; a pretrained one (`model.path`) can do without (`sft.steps=0`)."
        yield Problem(text, options)
    if found:
        yield from _batch("demonstrations", found, sft.batch_size, "sft.batch_size", parts)


def _reward(
    experiment: Experiment, corpus: Corpus, parts: int, at_hand: Mapping[str, function.Function]
) -> Iterator[Problem]:
    config = experiment.reward_model
    for name, field in experiment.functions.items() if corpus.records["train"] else ():
        try:
            function.check(function.found(name, at_hand, field=field), corpus)
        except InputError as error:
            yield Problem(str(error))
    if config.trained and corpus.records["train"]:
        long_prompts = config.long_prompts or corpus.long_prompts
        found = _usable(replace(corpus, long_prompts=long_prompts), "pairs", config.batch_size)
        if found:
            yield from _batch("preference pairs", found, config.batch_size, "reward_model.batch_size", parts)
            if config.linear and (prompts := _prompts_of(corpus, config)) < linear_reward.LEAST:
                yield Problem(
                    f"The first {config.steps * config.batch_size} preference pairs have {prompts} prompts, and a "
                    f"linear reward (`reward_model.linear`) needs pairs of {linear_reward.LEAST} to choose its penalty "
                    "by. Give it more (`reward_model.steps`), or leave it out and train the network.",
                )
            if config.validation.every and not corpus.has_pairs("validation", long_prompts=long_prompts):
                yield Problem(
                    "There are no pairs in the validation split, by which the reward model's training is stopped. Give "
                    "the data some, or make all steps: `reward_model.validation.every=0`.",
                    {"reward_model.validation.every": 0},
                )
        else:
            yield Problem(
                f"There are no preference pairs to train the reward model on{_columns(corpus)}. Give rows with "
                "'chosen' and 'rejected', or a reward that needs none: `reward_model.path` or `reward_model.function`."
            )


def _pairs(experiment: Experiment, corpus: Corpus, parts: int) -> Iterator[Problem]:
    """Of those that a policy learns from itself."""
    policy = experiment.policy
    if not isinstance(policy, Pairs) or not corpus.records["train"]:
        return
    if found := _usable(corpus, "pairs", policy.prompts_per_step):
        yield from _batch("preference pairs", found, policy.prompts_per_step, "policy.prompts_per_step", parts)
    else:
        yield Problem(
            f"There are no preference pairs, which {type(policy).__name__} learns from{_columns(corpus)}. Give rows "
            "with 'chosen' and 'rejected', or choose an algorithm that samples, such as policy=Policy()."
        )


def _prompts_of(corpus: Corpus, config: RewardModel) -> int:
    """The distinct prompts of the pairs that a linear reward is fitted to, or of the first where these are enough."""
    every, found = config.steps * config.batch_size, 0
    for count in (min(every, 8 * linear_reward.LEAST), every):
        if found < linear_reward.LEAST:
            pairs = corpus.pairs("train", count=count, long_prompts=config.long_prompts)
            found = len(np.unique(pairs.examples.prompts.ids))
    return found


def _batch(what: str, found: int, batch: int, option: str, parts: int) -> Iterator[Problem]:
    if found < batch:
        fitting = _multiple(found, parts)
        yield Problem(
            f"A batch has {batch} {what} (`{option}`), and there are {found}; make it a smaller number"
            + (f" that {parts} devices divide, or choose `devices`." if parts > 1 else "."),
            {option: fitting} if fitting else {"devices": 1},
        )


def _usable(corpus: Corpus, field: Demonstrations | Literal["pairs"], most: int) -> int:
    """How many demonstrations or pairs of the train split can be learned from, counted up to `most`."""
    try:
        found = (
            corpus.pairs("train", count=most) if field == "pairs"
            else corpus.demonstrations(field, count=most)
        )  # fmt: skip
    except InputError:
        return 0
    return len(found.examples.prompts.ids)


def _multiple(count: int, parts: int) -> int:
    return count // parts * parts


def _columns(corpus: Corpus) -> str:
    columns = listed(corpus.columns)
    return f" (columns that are not read: {columns}; `data.columns` maps them)" if corpus.columns else ""
