"""An experiment, as nested frozen dataclasses that check themselves on construction.

Every field is an option of the command line: `policy.kl_budget` is `--policy.kl-budget`.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ctrl_jax.data.forms import Format
from ctrl_jax.data.rows import FIELDS, GIVEN
from ctrl_jax.errors import InputError
from ctrl_jax.models.architecture import Architecture, from_scratch
from ctrl_jax.models.lora import Lora as Lora
from ctrl_jax.steps import combination, ensemble
from ctrl_jax.theory import procedures
from ctrl_jax.theory.objective import Objective, Raw
from ctrl_jax.theory.transforms import Transform

SOURCES = (
    "dialogues/helpful",
    "dialogues/harmless",
    "hh_rlhf/helpful-base",
    "hh_rlhf/helpful-online",
    "hh_rlhf/helpful-rejection-sampled",
    "hh_rlhf/harmless-base",
    "chitchat",
    "tldr",
    "files",
    "jsonl",
)
VOCABULARY = 512
"""Pieces of the trained tokenizer by default, where the data holds so many."""

_SECTIONS = {
    "Data": "data", "Model": "model", "Supervised": "sft", "RewardModel": "reward_model", "Combine": "combine",
    "Calibration": "calibration", "Validation": "reward_model.validation", "Policy": "policy",
    "Evaluation": "evaluation",
}  # fmt: skip
"""Where an experiment has a dataclass. Fields of others have no section before their name."""


def _require(condition: bool, field: str, value: Any, problem: str, remedy: str) -> None:
    if not condition:
        raise InputError(problem, field=field, value=value, remedy=remedy)


def _field(config: Any, name: str) -> str:
    """The field's name in an experiment, such as policy.kl_budget."""
    section = next((_SECTIONS[kind.__name__] for kind in type(config).__mro__ if kind.__name__ in _SECTIONS), None)
    return name if section is None else f"{section}.{name}"


def _set(config: Any, **values: Any) -> None:
    """Replaces fields while the dataclass checks itself: a name by its canonical form, a path by its whole."""
    for name, value in values.items():
        object.__setattr__(config, name, value)


def expand_user(config: Any, *names: str) -> None:
    """Replaces `~` at the start of paths, which a shell does not do in `--data.path=~/x`, nor in a Python file."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _set(config, **{name: type(value)(os.path.expanduser(value))})


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        problem = f"{type(config).__name__}.{name} is {value!r}"
        right = value > 0 and math.isfinite(value)
        _require(right, _field(config, name), value, problem, "it must be greater than 0.")


def _between(config: Any, low: float, high: float, why: str, *names: str) -> None:
    """Refuses what float32 cannot carry, or what changes nothing; `why` says which."""
    for name in names:
        value = getattr(config, name)
        problem = f"{type(config).__name__}.{name} is {value!r}"
        remedy = f"it must be between {low:g} and {high:g}: {why}."
        _require(low <= value <= high, _field(config, name), value, problem, remedy)


_SMALL_UPDATES = "smaller updates are lost in the last digit of parameters in float32, larger ones overflow"


def _seed(config: Any) -> None:
    problem = f"{type(config).__name__}.seed is {config.seed}"
    remedy = f"a seed is a whole number from 0 to {2**32 - 1}."
    _require(0 <= config.seed < 2**32, _field(config, "seed"), config.seed, problem, remedy)


def _warmup(config: Any) -> None:
    name = type(config).__name__
    problem = f"{name}.warmup_steps is {config.warmup_steps} and {name}.steps {config.steps}"
    remedy = "the warmup must be shorter than the training, and at least 0."
    right = 0 <= config.warmup_steps < config.steps
    _require(right, _field(config, "warmup_steps"), config.warmup_steps, problem, remedy)


@dataclass(frozen=True)
class Data:
    """Prompts, demonstrations and preference pairs, and how they become tokens."""

    source: str = "dialogues/helpful"
    """`dialogues/helpful`, `dialogues/harmless` (generated here); `hh_rlhf/` with `helpful-base`, `helpful-online`,
    `helpful-rejection-sampled` or `harmless-base`; `chitchat`, chats of two people that come with the package
    chitchat-dataset; `tldr` (summaries); or `files`, rows of yours: JSON lines, CSV, Parquet, or a folder that
    `datasets` saved (docs/data.md). `jsonl` is another name for `files`."""
    path: str | None = None
    """A local copy of hh_rlhf or tldr, instead of a download, or of chitchat's dataset.json; for `files` the file, or a
    folder of train.jsonl, validation.jsonl and test.jsonl (or .csv, .parquet)."""
    columns: tuple[str, ...] = ()
    """Where `files` call a column otherwise: `prompt=instruction+input response=output` reads the prompt from two
    columns, a blank line between them. `label=label` keeps a column for the reward function alone."""
    format: Format = "chat"
    """`chat`: a prompt is a conversation, which the model reads by its chat template, or as Human and Assistant where
    it has none. `plain`, for base models: a prompt is a text that the model continues, and a response goes on where
    the prompt ends, both exactly as the rows write them; for `files` and `tldr`."""
    demonstrations: Literal["response", "chosen"] = "response"
    """What the reference policy is fine-tuned on: the rows' responses, or the chosen replies of their pairs."""
    seed: int = 0
    """Seed of the generated dialogues, and of the choice of the pairs that are corrupted."""
    dialogues: int = 12_000
    """Dialogues to generate for fine-tuning; as many preference pairs are drawn for the reward model."""
    vocabulary_size: int | None = None
    """Pieces of the SentencePiece model that is trained where the model brings no tokenizer; by default 512, or all
    that the data holds where that is less."""
    prompt_length: int = 20
    """P: the longest prompt, in tokens."""
    long_prompts: Literal["drop", "truncate"] = "drop"
    """What becomes of longer prompts: dropped and counted, or cut on the left."""
    response_length: int = 36
    """T: the longest response, in tokens with its EOS; longer ones are cut there, in training and in sampling."""
    corrupted: float = 0.0
    """The share of the preference pairs that a wrong preference puts in order, to see what a policy makes of a reward
    model that learned from them. The pairs of the test split stay as they are. (`demonstrations=chosen` takes the
    replies that are chosen then.)"""
    corrupted_prefers: str = "length"
    """What it prefers: `length`, the longer reply, or a word, the reply that has it."""

    def __post_init__(self) -> None:
        expand_user(self, "path")
        _positive(self, "dialogues", "prompt_length", "response_length")
        if self.vocabulary_size is not None:
            _positive(self, "vocabulary_size")
        _require(
            self.source in (*SOURCES, GIVEN),
            "data.source",
            self.source,
            f"Data.source is {self.source!r}",
            f"it is one of {', '.join(SOURCES)}.",
        )
        _require(
            not self.own or self.path is not None,
            "data.source",
            self.source,
            f"Data.source is {self.source!r} and Data.path is missing",
            "give `data.path` the file.",
        )
        _require(
            self.path is None or not self.generated,
            "data.path",
            self.path,
            f"Data.path is {self.path!r}, but the source {self.source!r} is generated, not read",
            "for rows of your own give `data.source=files`, or leave the path out.",
        )
        _require(
            self.response_length >= 2,
            "data.response_length",
            self.response_length,
            f"Data.response_length is {self.response_length}",
            "a response has at least 2 tokens, a word and its end.",
        )
        _seed(self)
        self._check_columns()
        self._check_corruption()

    def _check_corruption(self) -> None:
        """What becomes of preference pairs."""
        _between(self, 0.0, 1.0, "it is a share of the pairs", "corrupted")
        _set(self, corrupted_prefers=self.corrupted_prefers.strip())
        _require(
            bool(self.corrupted_prefers),
            "data.corrupted_prefers",
            self.corrupted_prefers,
            "Data.corrupted_prefers is empty",
            "give `length`, or a word.",
        )
        _require(
            self.corrupted > 0 or self.corrupted_prefers == Data.corrupted_prefers,
            "data.corrupted_prefers",
            self.corrupted_prefers,
            f"Data.corrupted_prefers is {self.corrupted_prefers!r}, and no pair is corrupted",
            "give the share of the pairs (`data.corrupted`), or leave it out.",
        )

    def _check_columns(self) -> None:
        """What is read of a row, and how."""
        _require(
            self.own or not self.columns,
            "data.columns",
            self.columns,
            f"Data.columns is {' '.join(self.columns)!r}, and the source {self.source!r} has columns of its own",
            "leave them out, or give `data.source=files`.",
        )
        _require(
            self.format == "chat" or self.own or self.source in ("tldr", GIVEN),
            "data.format",
            self.format,
            f"Data.format is {self.format!r}, and the prompts of {self.source!r} are conversations",
            "give `data.format=chat`, or texts: `data.source=files` or `data.source=tldr`.",
        )
        names = [name for name, _ in map(_mapping, self.columns)]
        _require(
            len(set(names)) == len(names),
            "data.columns",
            self.columns,
            f"Data.columns is {' '.join(self.columns)!r}, which says twice where a name is read from",
            "say it once.",
        )

    @property
    def generated(self) -> bool:
        return self.source.startswith("dialogues/")

    @property
    def own(self) -> bool:
        return self.source in ("files", "jsonl")

    @property
    def mapping(self) -> dict[str, tuple[str, ...]]:
        """The names that are read here, with the columns of a file that they are read from."""
        return dict(map(_mapping, self.columns))


def _mapping(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, source = text.partition("=")
    columns = tuple(source.split("+"))
    _require(
        bool(name) and all(columns),
        "data.columns",
        text,
        f"Data.columns has {text!r}",
        f"write NAME=COLUMN, such as prompt=instruction, where NAME is one of {', '.join(FIELDS)}, or what a reward "
        "function calls the column.",
    )
    _require(
        len(columns) == 1 or name in ("prompt", "response", "chosen", "rejected"),
        "data.columns",
        text,
        f"Data.columns has {text!r}",
        "texts alone are joined: prompt, response, chosen and rejected.",
    )
    return name, columns


@dataclass(frozen=True)
class Model:
    """A Hugging Face directory, or a decoder from scratch: RMSNorm, rotary positions, grouped-query attention."""

    path: str | None = None
    """A Hugging Face directory (config.json, *.safetensors, tokenizer): the model to align. It replaces the sizes
    below, and its tokenizer the trained one."""
    adapter: str | None = None
    """A PEFT adapter of that model, merged into it before anything else."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in, and held in where it is not trained; bfloat16 is for accelerators."""
    lora: Lora = field(default_factory=Lora)
    rematerialize: bool = False
    """Compute each layer again in the backward pass instead of keeping what it needs: more work for less memory."""
    width: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    """Heads of keys and values; each serves heads / kv_heads query heads."""
    mlp_width: int = 192
    tied_embeddings: bool = True
    """Whether the token embedding is also the output projection."""
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        expand_user(self, "path", "adapter")
        _positive(self, "width", "layers", "heads", "kv_heads", "mlp_width", "rope_theta", "norm_epsilon")
        _between(self, 1, 1e12, "of a larger base the positions are all alike in float32", "rope_theta")
        _between(self, 1e-20, 1, "it is added to mean squares in float32, which are near 1", "norm_epsilon")
        _require(
            self.lora.rank == 0 or self.path is not None,
            "model.lora.rank",
            self.lora.rank,
            f"Model.lora.rank is {self.lora.rank} and Model.path is missing: adapters of random weights learn nothing.",
            "Give `model.path` a Hugging Face directory, or leave the rank at 0.",
        )
        _require(
            self.adapter is None or self.path is not None,
            "model.adapter",
            self.adapter,
            f"Model.adapter is {self.adapter!r} and Model.path is missing",
            "give `model.path` the model that it adapts.",
        )
        _require(
            self.width % (2 * self.heads) == 0,
            "model.width",
            self.width,
            f"Model.width is {self.width} and Model.heads {self.heads}",
            "the width must be a multiple of 2 × heads.",
        )
        _require(
            self.heads % self.kv_heads == 0,
            "model.heads",
            self.heads,
            f"Model.heads is {self.heads} and Model.kv_heads {self.kv_heads}",
            "heads must be a multiple of kv_heads.",
        )

    @property
    def adapter_path(self) -> Path | None:
        return None if self.adapter is None else Path(self.adapter)

    def architecture(self, vocabulary_size: int) -> Architecture:
        """The decoder from scratch; a model with a path has its own (models/huggingface.py)."""
        return from_scratch(
            vocabulary_size=vocabulary_size,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            mlp_width=self.mlp_width,
            tied_embeddings=self.tied_embeddings,
            rope_theta=self.rope_theta,
            norm_epsilon=self.norm_epsilon,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class Supervised:
    """Fine-tuning on examples: the reference policy on dialogues, the reward model on preference pairs."""

    steps: int = 400
    """0 leaves out the fine-tuning of a model that has a path."""
    batch_size: int = 64
    micro_batches: int | None = None
    """Slices of a batch that a device works on one after the other, for less memory; the update is the same. By default
    as many as the size of a slice's activations asks for."""
    learning_rate: float = 2e-3
    warmup_steps: int = 40
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "learning_rate", "checkpoint_every")
        _between(self, 1e-12, 1e30, _SMALL_UPDATES, "learning_rate")
        if self.micro_batches is not None:
            _positive(self, "micro_batches")
        if self.steps:
            _positive(self, "steps")
            _warmup(self)


@dataclass(frozen=True)
class Validation:
    """Early stopping: pairs that are not trained on decide which step's reward model is used, and when to stop."""

    every: int = 0
    """Steps between validations, each with a checkpoint; the last step has one too. 0 leaves them out: all steps are
    made, and the last is used."""
    pairs: int = 256
    """Pairs of the validation split that are looked at, or all where there are fewer."""
    patience: int = 3
    """Validations, one after the other, that are no better than the best before them, after which the training stops.
    The reward model of the best validation likelihood is the one that is used."""

    def __post_init__(self) -> None:
        remedy = "it is a number of steps, or 0 for no validation."
        _require(self.every >= 0, _field(self, "every"), self.every, f"Validation.every is {self.every}", remedy)
        _positive(self, "pairs", "patience")


@dataclass(frozen=True)
class RewardModel(Supervised):
    """What scores a response: trained on preference pairs, read from a directory, or your own function."""

    path: str | None = None
    """A Hugging Face directory of a sequence classifier with one label, with its own tokenizer; nothing is trained."""
    function: str | None = None
    """`module:name` of a Python function (prompts, responses) -> floats; nothing is trained."""
    long_prompts: Literal["drop", "truncate"] | None = None
    """What becomes of the pairs of longer prompts: dropped, or their prompts cut on the left. By default as
    `data.long_prompts`, which keeps its word for the prompts of policies."""
    validation: Validation = Validation()
    linear: bool = False
    """Fit a linear function of what the reference itself makes of a response, the mean of its last features, instead of
    training its network: to the first `steps` × `batch_size` pairs, with the penalty that predicts held-out ones best.
    What the reference sees, a policy can climb. The options of the training besides these change nothing."""
    members: int = 1
    """Heads on the reward model's trunk, each trained on a bootstrap sample of the pairs: several are an ensemble."""

    def __post_init__(self) -> None:
        super().__post_init__()
        expand_user(self, "path")
        _positive(self, "members")
        _require(
            self.trained or not self.linear,
            "reward_model.linear",
            self.linear,
            f"RewardModel.linear is True, and the reward is given: {self.path or self.function}",
            "leave one of the two out: a linear reward is fitted here.",
        )
        _require(
            not self.linear or self.validation.every == 0,
            "reward_model.validation.every",
            self.validation.every,
            f"RewardModel.linear is True, and RewardModel.validation.every is {self.validation.every}",
            "make it 0: a linear reward is fitted at once, and all training pairs validate it in turn.",
        )
        _require(
            self.members == 1 or self.trained,
            "reward_model.members",
            self.members,
            f"RewardModel.members is {self.members}, and the reward is given: {self.path or self.function}",
            "leave one of the two out: an ensemble is trained here.",
        )
        _require(
            self.path is None or self.function is None,
            "reward_model.path",
            self.path,
            f"RewardModel.path is {self.path!r} and RewardModel.function {self.function!r}",
            "give one of them.",
        )
        _require(
            self.function is None or self.function.count(":") == 1,
            "reward_model.function",
            self.function,
            f"RewardModel.function is {self.function!r}",
            "write it as module:name, such as rewards:brevity.",
        )
        _require(
            self.steps > 0 or not self.trained,
            "reward_model.steps",
            self.steps,
            "RewardModel.steps is 0",
            "a reward model has to be trained, or given by `reward_model.path` or `reward_model.function`.",
        )

    @property
    def trained(self) -> bool:
        return self.path is None and self.function is None


@dataclass(frozen=True)
class Combine:
    """How several rewards make the one that is trained on and judges: those of an ensemble, and others beside it.

    With `policy.floors` the others are not made one with it: the policy's mean rank by each stays at its floor."""

    ensemble: str = "mean"
    """What makes one reward of an ensemble's members (`reward_model.members`): `mean`, `median`, `min`, or
    `penalized(1)`, the mean less the members' variance times that number."""
    rewards: tuple[str, ...] = ()
    """More rewards beside the reward model's, each `module:name` of a Python function (prompts, responses) -> floats,
    or a Hugging Face directory of a sequence classifier with one label."""
    by: str = "smallest_calibrated"
    """`smallest_calibrated`, the lowest of their ranks among the reference's responses; `log_sigmoids(0.85)`, the sum
    of log σ(reward − its quantile of that level among the reference's), of the reward model's alone, too; or
    `weighted_sum`. For the first two, `calibration.samples_per_prompt` responses more are drawn for each prompt."""
    weights: tuple[float, ...] = ()
    """Of `weighted_sum`: the reward model's, and that of each of `rewards`."""

    def __post_init__(self) -> None:
        _set(self, ensemble=ensemble.parse(self.ensemble)[0], rewards=tuple(map(os.path.expanduser, self.rewards)))
        _set(self, weights=tuple(self.weights), by=str(self.combination))
        _require(
            bool(self.rewards) or (not self.weights and self.by != "weighted_sum"),
            "combine.rewards",
            self.rewards,
            f"combine.by is {self.by!r} and combine.weights {self.weights}, but combine.rewards names no reward beside "
            "the reward model's",
            "name some, such as rewards:brevity, or leave both out.",
        )
        for name in self.rewards:
            _require(
                _is_directory(name) or name.count(":") == 1,
                "combine.rewards",
                name,
                f"combine.rewards has {name!r}, which is neither module:name nor a directory",
                "give a Python function such as rewards:brevity, or a path with a / in it of a sequence classifier.",
            )
        _require(
            len(set(self.rewards)) == len(self.rewards),
            "combine.rewards",
            self.rewards,
            f"combine.rewards names one reward twice: {self.rewards}",
            "name it once; `combine.weights` give it more weight.",
        )
        count = 1 + len(self.rewards)
        _require(
            not self.rewards
            or self.by != "weighted_sum"
            or (len(self.weights) == count and all(map(math.isfinite, self.weights)) and any(self.weights)),
            "combine.weights",
            self.weights,
            f"combine.weights are {self.weights}, and there are {count} rewards: the reward model's and those of "
            "combine.rewards",
            f"give {count} finite numbers, not all 0.",
        )

    @property
    def functions(self) -> list[str]:
        """The Python functions among `rewards`."""
        return [name for name in self.rewards if not _is_directory(name)]

    @property
    def directories(self) -> list[str]:
        return [name for name in self.rewards if _is_directory(name)]

    @property
    def changes(self) -> bool:
        """Whether anything is asked for. The rank of one reward alone is what calibration makes of it anyway."""
        return bool(self.rewards) or self.by != Combine.by

    @property
    def compares(self) -> bool:
        """Whether responses are compared with the reference's."""
        return self.changes and self.combination.compares

    @property
    def combination(self) -> combination.Combination:
        return combination.parse(self.by, self.weights)


def _is_directory(name: str) -> bool:
    """By its looks: a run is read where the directory is gone, too."""
    return os.sep in name


@dataclass(frozen=True)
class Calibration:
    """The reference rewards that a raw reward is ranked against."""

    prompts: int = 256
    """Training prompts in the table; the policy is trained on these."""
    samples_per_prompt: int = 128
    """K: reference responses a prompt. exp(10u) lives in the top tenth: K = 16 biases it by 27 %, 100 by 4 %"""
    quantiles: int | None = None
    """Q: keep so many quantiles of a prompt's K rewards instead of all, for a smaller table. A calibrated reward is
    then off by at most 1 / (2Q)."""
    keep_responses: bool = False
    """Also keep the K responses themselves, with their log-probs and raw rewards, for algorithms that learn from them.
    `plan` shows the bytes; a token takes 2 of them, or 4 where the vocabulary is larger than 65,536."""

    def __post_init__(self) -> None:
        _positive(self, "prompts")
        _require(
            self.samples_per_prompt >= 2,
            "calibration.samples_per_prompt",
            self.samples_per_prompt,
            f"Calibration.samples_per_prompt is {self.samples_per_prompt}",
            "a rank needs at least 2 reference responses, and a transform that lives in the tail some 100.",
        )
        _require(
            self.quantiles is None or 2 <= self.quantiles <= self.samples_per_prompt,
            "calibration.quantiles",
            self.quantiles,
            f"Calibration.quantiles is {self.quantiles} and Calibration.samples_per_prompt {self.samples_per_prompt}",
            "of K rewards 2 to K quantiles can be kept. Lower the first, raise the second, or leave quantiles out to "
            "keep all rewards.",
        )

    @property
    def rewards_per_prompt(self) -> int:
        """The columns of the table."""
        return self.samples_per_prompt if self.quantiles is None else self.quantiles


class TransformName(str):
    """A transform's name in a configuration, with the function that it stands for, which no text says."""

    transform: Transform

    @classmethod
    def of(cls, objective: Objective) -> "TransformName":
        name = cls(objective.fingerprint["transform"])
        assert callable(objective.transform), "raw and optimal are names"
        name.transform = objective.transform
        return name


@dataclass(frozen=True)
class Policy:
    """KL-regularised RL on the transformed calibrated reward.

    A subclass is the options of another algorithm, and its type chooses the algorithm.
    """

    algorithm: ClassVar[str] = "ctrl:Ctrl"
    """A file of algorithms/, and the class in it. Its fields get their values from the options of the same names, or
    from those that a training offers (pipeline/assembly.py)."""
    label: ClassVar[str | None] = "{transform}"
    """What figures call it, of its fields. A subclass without one of its own is called by its class."""

    transform: str = "exponential(10)"
    """Φ: `identity` (online IPO), `logarithm` (best-of-N distillation), `logit`, `exponential(t)`, `optimal` (Φ* of the
    procedure at the budget), or `raw` (RLHF on the uncalibrated reward: RLOO, arXiv 2402.14740, with an exact KL)."""
    procedure: str = "best_of_4"
    """How the policy will be decoded: `sampling`, `best_of_N`, `worst_of_N`, ..."""
    kl_budget: float = 0.75
    """KL(policy || reference) to end at, in nats per response."""
    beta: float | None = None
    """Weight of the KL against Φ on its range [0, 1]. Given, it is held, and the budget only reported against; else it
    follows from the budget by the ideal policy, and a controller trims it."""
    beta_share: float | None = None
    """β starts at this share of the ideal policy's, in (0, 1]. A policy whose log-ratio has the correlation r with the
    ideal one's has r² of its KL at the same β, and so meets the budget at the share r. By default the root of the
    learnability probe's correlation, or .5 for a linear reward: of that the probe says nothing, for it reads the same
    features."""
    kl_limit: float | None = None
    """Stop where the KL, a mean of 5 steps, exceeds so many times the budget. By default 10, or no limit where β is
    given and where the KL is an estimate from stored responses."""
    floors: tuple[float, ...] = ()
    """One for each of `combine.rewards`, which then are not mixed into the reward that is climbed: the policy's mean
    rank by each, of a single response among the reference's, stays there or above (algorithms/constrained.py). .5 is
    what the reference itself has."""
    steps: int = 150
    prompts_per_step: int = 32
    samples_per_prompt: int = 16
    """N: rollouts a prompt; the others of its prompt are a rollout's baseline, so at least 2."""
    micro_batches: int | None = None
    """Slices of a step's prompts that a device takes the gradient of one after the other, for less memory; the update
    is the same. Their number divides prompts_per_step / devices; by default it is as many as the size of a slice's
    activations asks for."""
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    max_gradient_norm: float = 1.0
    temperature: float = 1.0
    """Of the law that is sampled and scored, for policy and reference alike."""
    checkpoint_every: int = 25

    def __post_init__(self) -> None:
        _positive(self, "steps", "prompts_per_step", "learning_rate", "max_gradient_norm")
        if self.micro_batches is not None:
            _positive(self, "micro_batches")
        _positive(self, "temperature", "checkpoint_every")
        _between(self, 1e-12, 1e30, _SMALL_UPDATES, "learning_rate")
        _between(self, 1e-12, 1e30, "gradients are scaled to this norm, and Adam squares them", "max_gradient_norm")
        _between(self, 1e-3, 1e3, "logits in float32 are divided by it", "temperature")
        _warmup(self)
        _require(
            self.kl_budget > 0 and math.isfinite(self.kl_budget),
            "policy.kl_budget",
            self.kl_budget,
            f"Policy.kl_budget is {self.kl_budget}",
            "a KL budget is a number of nats per response above 0, such as 0.6.",
        )
        _between(self, 1e-6, 1e4, "a smaller KL cannot be measured in float32", "kl_budget")
        _require(
            self.beta is None or (self.beta > 0 and math.isfinite(self.beta)),
            "policy.beta",
            self.beta,
            f"Policy.beta is {self.beta}",
            "it must be greater than 0, or left out.",
        )
        if self.beta_share is not None:
            _between(self, 1e-3, 1.0, "it is a share of the ideal policy's β", "beta_share")
        _require(
            self.beta is None or self.beta_share is None,
            "policy.beta_share",
            self.beta_share,
            f"Policy.beta_share is {self.beta_share}, and Policy.beta is {self.beta}",
            "leave one of the two out: a β that is given is not the ideal policy's.",
        )
        objective = self.objective
        if self.beta is not None and isinstance(objective.transform, Raw):
            _between(self, 1e-30, 1e30, "raw rewards in float32 are divided by it", "beta")
        elif self.beta is not None:
            # Of Φ on [0, 1], the ideal policy has a KL of at most 1 / (8 β²) nats.
            unseen = "below, float32 loses the KL beside the reward; above, the KL stays below 1e-7 nats"
            _between(self, 1e-6, 1e3, unseen, "beta")
        _require(
            self.kl_limit is None or self.kl_limit > 1,
            "policy.kl_limit",
            self.kl_limit,
            f"Policy.kl_limit is {self.kl_limit}",
            "it is a multiple of the budget, greater than 1, or inf for no limit.",
        )
        _require(
            self.samples_per_prompt >= 2,
            "policy.samples_per_prompt",
            self.samples_per_prompt,
            f"Policy.samples_per_prompt is {self.samples_per_prompt}",
            "the leave-one-out baseline needs at least 2.",
        )
        _check_floors(self.floors)
        _set(self, procedure=objective.procedure.name, floors=tuple(map(float, self.floors)))
        if not isinstance(self.transform, TransformName):
            _set(self, transform=str(objective.transform))

    def check_floors(self) -> None:
        """Refuses a floor above the mean rank of the identity's ideal policy, which is the highest at the KL budget.

        Not a part of what is checked when it is made: the theory computes on a device.
        """
        if not self.floors or not self.aims:
            return
        ideal = Objective.parse("identity", "sampling", self.kl_budget).ideal(self.kl_budget)
        highest = 1.0 if ideal is None else ideal.win_rate(procedures.Sampling())
        _require(
            max(self.floors) < highest,
            "policy.floors",
            self.floors,
            f"Policy.floors is {self.floors}, and at a KL of {self.kl_budget:g} no policy has a mean rank above "
            f"{highest:.3f} by any reward",
            "lower it, or raise `policy.kl_budget`.",
        )

    @property
    def least_references(self) -> int:
        """The reference rewards of a prompt that the algorithm needs: a rank is one among two."""
        return 2

    @property
    def reads_order_alone(self) -> bool:
        """Whether an increasing function of one reward would train the same policy."""
        return not isinstance(self.objective.transform, Raw)

    @property
    def named_algorithm(self) -> dict[str, str]:
        """The entry of files that names the algorithm. CTRL has none: it was the first."""
        return {} if self.algorithm == Policy.algorithm else {"algorithm": self.algorithm}

    @property
    def method(self) -> str:
        """What tables and figures call it: CTRL by its transform, another algorithm by its name."""
        own = vars(type(self)).get("label") if type(self) is not Policy else Policy.label
        name = type(self).__name__ if own is None else str(own).format(**vars(self))
        return f"{name} with floors of {', '.join(f'{floor:g}' for floor in self.floors)}" if self.floors else name

    @property
    def aims(self) -> bool:
        """Whether the training aims at the KL budget, which otherwise marks the figures alone."""
        return self.beta is None

    @property
    def objective(self) -> Objective:
        if isinstance(self.transform, TransformName):
            return Objective(self.transform.transform, procedures.parse(self.procedure), self.kl_budget)
        return Objective.parse(self.transform, self.procedure, self.kl_budget)


def _check_floors(floors: Any) -> None:
    numbers = isinstance(floors, tuple | list) and all(isinstance(one, int | float) for one in floors)
    _require(
        numbers and all(0 < floor < 1 for floor in floors),
        "policy.floors",
        floors,
        f"Policy.floors is {floors!r}",
        "give the mean rank that each of `combine.rewards` keeps, between 0 and 1, as a tuple such as (0.5,): .5 is "
        "the reference's.",
    )


def _require_an_algorithm(config: Policy, shared: type[Policy], field: str) -> None:
    """Refuses the class of options that several algorithms share."""
    name = shared.__name__
    _require(
        type(config) is not shared,
        field,
        name,
        f"{name} has the options that several algorithms share, and is none",
        f"give one of those: {_names(shared)}.",
    )


def _names(shared: type[Policy]) -> str:
    """Of the algorithms' options that share a class."""
    *names, last = sorted(one.__name__ for one in _algorithms(shared))
    return f"{', '.join(names)} or {last}"


def _algorithms(shared: type[Policy]) -> Iterator[type[Policy]]:
    for one in shared.__subclasses__():
        if "algorithm" in vars(one):
            yield one
        yield from _algorithms(one)


@dataclass(frozen=True)
class Pairs(Policy):
    """What algorithms share that learn from the data's preference pairs.

    A step reads `prompts_per_step` pairs. Nothing is sampled, and the KL budget marks the figures alone.
    """

    algorithm: ClassVar[str]

    transform: str = "raw"

    @property
    def aims(self) -> bool:
        return False

    @property
    def reads_order_alone(self) -> bool:
        return True

    def __post_init__(self) -> None:
        _require_an_algorithm(self, Pairs, "policy")
        super().__post_init__()
        _require(
            self.transform == "raw",
            "policy.transform",
            self.transform,
            f"{type(self).__name__}.transform is {self.transform!r}",
            "preference pairs say nothing of ranks: leave it at raw.",
        )
        _unused(self, _MEASURED, "floors")


def _unused(config: Policy, why: str, *names: str) -> None:
    """Refuses options that the algorithm has no use for, where they are not at their defaults."""
    defaults = {field.name: field.default for field in fields(config)}
    for name in names:
        value = getattr(config, name)
        problem = f"{type(config).__name__}.{name} is {value}"
        _require(value == defaults[name], _field(config, name), value, problem, f"leave it out: {why}.")


_MEASURED = "a floor is kept by what the policy's own responses measure, and none are sampled"


def _require_beta(config: Policy) -> None:
    name = type(config).__name__
    _require(config.beta is not None, "policy.beta", None, f"{name}.beta is missing", "give the weight of the KL, 0.1.")


@dataclass(frozen=True)
class Dpo(Pairs):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    algorithm: ClassVar[str] = "dpo:Dpo"
    label: ClassVar[str | None] = "DPO"

    beta: float | None = 0.1
    """Weight of the KL in raw rewards per nat: the smaller, the farther from the reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_beta(self)


@dataclass(frozen=True)
class RobustDpo(Dpo):
    """DPO where a known share of the labels is flipped by chance (Chowdhury et al. 2024, arXiv 2403.00409)."""

    algorithm: ClassVar[str] = "robust_dpo:RobustDpo"
    label: ClassVar[str | None] = "robust DPO"

    flip_probability: float = 0.1
    """ε: the share of pairs whose labels are the wrong way round; 0 is DPO. Of pairs that are each there once, the loss
    has no lower bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _between(self, 0, 0.45, "near a half the labels say nothing", "flip_probability")


@dataclass(frozen=True)
class Ipo(Pairs):
    """Identity preference optimisation: the margin of a pair is fitted to 1 / (2β) (arXiv 2310.12036)."""

    algorithm: ClassVar[str] = "ipo:Ipo"
    label: ClassVar[str | None] = "IPO"

    beta: float | None = 0.1
    """Weight of the KL in probabilities of being preferred per nat: the smaller, the farther from the reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_beta(self)


@dataclass(frozen=True)
class Slic(Pairs):
    """Sequence likelihood calibration: a hinge on a pair's likelihoods, and that of the chosen (arXiv 2305.10425)."""

    algorithm: ClassVar[str] = "slic:Slic"
    label: ClassVar[str | None] = "SLiC"

    margin: float = 1.0
    """δ: nats by which the chosen response is to be likelier than the rejected one."""
    regularization: float = 0.5
    """λ: weight of the chosen response's log-likelihood beside the hinge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.beta is None,
            "policy.beta",
            self.beta,
            f"Slic.beta is {self.beta}",
            "no KL is in its loss: leave it out, and give `policy.margin` and `policy.regularization`.",
        )
        _unused(self, "no KL is in its loss", "beta_share")
        _between(self, 1e-3, 1e3, "below, nothing is ranked; above, no two responses are so far apart", "margin")
        _between(self, 1e-6, 1e3, "without it nothing keeps the policy near the data", "regularization")


@dataclass(frozen=True)
class ActorCritic(Policy):
    """CTRL with a critic, by which each token is moved by what it changed (Schulman et al. 2016, arXiv 1506.02438)."""

    algorithm: ClassVar[str] = "actor_critic:ActorCritic"
    label: ClassVar[str | None] = "{transform} with a critic"

    trace: float = 1.0
    """λ: how much of what the next tokens changed counts for a token. At 1 the gradient has no bias, whatever the
    critic says; with less it has less noise, and what the critic does not know yet counts for the last tokens alone.
    benchmarks/gradient_signal.py says what a λ gains, and what its bias costs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _between(self, 0.0, 1.0, "it is the share of the next tokens' changes", "trace")


@dataclass(frozen=True)
class PpoClip(Policy):
    """CTRL's reward with several updates a batch of responses (Schulman et al. 2017, arXiv 1707.06347)."""

    algorithm: ClassVar[str] = "ppo_clip:PpoClip"
    label: ClassVar[str | None] = "PPO-clip, {transform}"

    learning_rate: float = 3e-4
    clip: float = 0.2
    """ε: how far an update may move a token's probability from the sampler's, as a share of it."""
    epochs: int = 2
    """How often a step learns from its responses."""
    minibatches: int = 4
    """Parts of an epoch, by prompts, of one update each; their number divides prompts_per_step / devices."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "epochs", "minibatches")
        _between(self, 1e-3, 0.999, "below, nothing is learned; at 1, a token's probability may fall to 0", "clip")
        _require(
            self.prompts_per_step % self.minibatches == 0,
            "policy.minibatches",
            self.minibatches,
            f"PpoClip.minibatches is {self.minibatches} and PpoClip.prompts_per_step {self.prompts_per_step}",
            "the first must divide the second.",
        )


@dataclass(frozen=True)
class Grpo(PpoClip):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300), with one update a batch by default."""

    algorithm: ClassVar[str] = "grpo:Grpo"
    label: ClassVar[str | None] = "GRPO"

    transform: str = "raw"
    learning_rate: float = 1e-3
    epochs: int = 1
    minibatches: int = 1


@dataclass(frozen=True)
class KSample(Policy):
    """The best of k samples as the objective (Tang et al. 2025, arXiv 2503.19595): pass@k where rewards are 0 or 1.

    `procedure` is best_of_k, of rewards as `transform` makes them.
    """

    algorithm: ClassVar[str] = "k_sample:KSample"
    label: ClassVar[str | None] = "k-sample"

    transform: str = "raw"

    def __post_init__(self) -> None:
        super().__post_init__()
        _best_of(self, 2, "of one sample it is CTRL: give a Policy")

    @property
    def least_references(self) -> int:
        return 2 if self.beta is not None else self.objective.procedure.num_samples


@dataclass(frozen=True)
class BonRl(Policy):
    """The chance that one of N samples is a success (Chow et al. 2024, arXiv 2412.15287), for `procedure` best_of_N."""

    algorithm: ClassVar[str] = "bon_rl:BonRl"
    label: ClassVar[str | None] = "BoN-RL"

    transform: str = "raw"
    success: float = 0.75
    """The calibrated reward above which a response is a success: .75 is better than three quarters of the reference's.
    Raw rewards of 0 and 1 are kept apart by .5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _best_of(self, 1, "give one")
        _only_transform(self, "raw", "successes say nothing of ranks")
        problem = f"BonRl.success is {self.success}"
        remedy = "it is a share of the reference's responses, at least 0 and below 1."
        _require(0 <= self.success < 1, "policy.success", self.success, problem, remedy)

    @property
    def least_references(self) -> int:
        return 2 if self.beta is not None else self.objective.procedure.num_samples

    @property
    def reads_order_alone(self) -> bool:
        return True


@dataclass(frozen=True)
class FunctionalDerivative(Policy):
    """The win rate under `procedure` as the objective, by its derivative at the policy's own responses."""

    algorithm: ClassVar[str] = "functional_derivative:FunctionalDerivative"
    label: ClassVar[str | None] = "functional derivative"

    transform: str = "optimal"
    """Φ*, whose ideal policy is this objective's optimum; nothing is transformed by it, and `beta` is in win rate per
    nat."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _only_transform(self, "optimal", "the optimum is that of Φ*")
        _enough_samples(self, self.objective.procedure.num_samples + 1, "the procedure's, and one to leave out")

    @property
    def least_references(self) -> int:
        return self.objective.procedure.num_samples


@dataclass(frozen=True)
class JBond(Policy):
    """J-BOND (Sessa et al. 2024, arXiv 2407.14622) with the policy as its own anchor, in place of a moving average."""

    algorithm: ClassVar[str] = "j_bond:JBond"
    label: ClassVar[str | None] = "J-BOND"

    transform: str = "raw"
    backward: float = 0.5
    """The weight of the policy gradient on r_J; the rest is that of the likelihood of the better of two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _only_transform(self, "raw", "it compares the responses of a group")
        _enough_samples(self, 3, "a response and two to compare it with")
        _between(self, 0, 1, "it is a share", "backward")

    @property
    def reads_order_alone(self) -> bool:
        return True


@dataclass(frozen=True)
class Vbon(Policy):
    """Variational best-of-N (Amini et al. 2024, arXiv 2407.06057): β sets N = 1 + 1/β and is held.

    The KL ends near log N − (N − 1)/N, and the KL budget marks the figures alone.
    """

    algorithm: ClassVar[str] = "vbon:Vbon"
    label: ClassVar[str | None] = "vBoN"

    transform: str = "logarithm"
    beta: float | None = 1 / 3
    """1/(N − 1) for the best of N: 1/3 for 4, 1/7 for 8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        _require(
            self.beta is not None, "policy.beta", None, f"{name}.beta is missing", "give 1/(N − 1): 1/3 for N = 4."
        )
        _only_transform(self, "logarithm", "best-of-N is its optimum")


@dataclass(frozen=True)
class Bond(Vbon):
    """BOND (Sessa et al. 2024, arXiv 2407.14622): the Jeffreys divergence to the best of N, for N = 1 + 1/β."""

    algorithm: ClassVar[str] = "bond:Bond"
    label: ClassVar[str | None] = "BOND"

    backward: float = 0.5
    """The weight of KL(policy || best of N), which alone is vBoN; the rest is that of KL(best of N || policy)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _between(self, 0, 1, "it is a share", "backward")


def _only_transform(policy: Policy, wanted: str, why: str) -> None:
    problem = f"{type(policy).__name__}.transform is {policy.transform!r}"
    _require(policy.transform == wanted, "policy.transform", policy.transform, problem, f"leave it at {wanted}: {why}.")


def _enough_samples(policy: Policy, least: int, why: str) -> None:
    samples = policy.samples_per_prompt
    problem = f"{type(policy).__name__}.samples_per_prompt is {samples}"
    _require(samples >= least, "policy.samples_per_prompt", samples, problem, f"it must be at least {least}: {why}.")


def _best_of(policy: Policy, least: int, otherwise: str) -> None:
    procedure = policy.objective.procedure
    problem = f"{type(policy).__name__}.procedure is {policy.procedure!r}"
    remedy = f"it must be a best_of_N with N of at least {least}; {otherwise}."
    right = isinstance(procedure, procedures.BestOfN) and procedure.n >= least
    _require(right, "policy.procedure", policy.procedure, problem, remedy)
    _enough_samples(policy, procedure.num_samples, "those that it picks among")


@dataclass(frozen=True)
class Stored(Policy):
    """What algorithms share that learn from the reference's stored responses (`calibration.keep_responses`).

    Nothing is drawn or scored. A step reads `prompts_per_step` groups of `samples_per_prompt` responses each, in which
    those of a prompt are split. β follows from the KL budget, or is given, and nothing trims it: the losses are least
    at the policy of that β.
    """

    algorithm: ClassVar[str]

    steps: int = 60
    """A step is an update by stored responses, at the cost of one forward and one backward pass over them."""
    samples_per_prompt: int = 16
    """N: responses in a group; it divides `calibration.samples_per_prompt`."""
    learning_rate: float = 3e-4
    warmup_steps: int = 5

    def __post_init__(self) -> None:
        _require_an_algorithm(self, Stored, "start")
        super().__post_init__()
        _unused(self, _MEASURED, "floors")


@dataclass(frozen=True)
class GroupProjection(Stored):
    """A group's shares under the policy are fitted to those under the optimum: −Σ q log p (group_projection.py)."""

    algorithm: ClassVar[str] = "group_projection:GroupProjection"
    label: ClassVar[str | None] = "group projection, {transform}"


@dataclass(frozen=True)
class Regression(Stored):
    """The log-ratio of each response to the reference is fitted to the optimum's: QRPO (arXiv 2507.08068)."""

    algorithm: ClassVar[str] = "regression:Regression"
    label: ClassVar[str | None] = "QRPO, {transform}"


@dataclass(frozen=True)
class WeightedLikelihood(Stored):
    """The likelihood of responses by their weight under the optimum, with a control variate."""

    algorithm: ClassVar[str] = "weighted_likelihood:WeightedLikelihood"
    label: ClassVar[str | None] = "weighted likelihood, {transform}"


@dataclass(frozen=True)
class RewardDistillation(Stored):
    """Gaps of the log-ratio are fitted to gaps of the raw reward, over the pairs of a group (arXiv 2405.19316)."""

    algorithm: ClassVar[str] = "reward_distillation:RewardDistillation"
    label: ClassVar[str | None] = "reward distillation"

    transform: str = "raw"


@dataclass(frozen=True)
class BestOfGroup(Stored):
    """What algorithms share that fit the law of best-of-N, N = `samples_per_prompt`.

    N alone decides the KL, log N − (N − 1) / N nats without ties. The KL budget marks the figures, in which the ideal
    policies are those of the logarithm: best-of-N is one of them.
    """

    algorithm: ClassVar[str]

    transform: str = "logarithm"
    samples_per_prompt: int = 4
    """N: responses in a group, of which the best is learned from; it divides `calibration.samples_per_prompt`."""

    @property
    def aims(self) -> bool:
        return False

    def __post_init__(self) -> None:
        _require_an_algorithm(self, BestOfGroup, "policy")
        super().__post_init__()
        name = type(self).__name__
        _require(
            self.beta is None,
            "policy.beta",
            self.beta,
            f"{name}.beta is {self.beta}",
            "the law of best-of-N has none: leave it out, and choose N, `policy.samples_per_prompt`.",
        )
        _require(
            self.transform == "logarithm",
            "policy.transform",
            self.transform,
            f"{name}.transform is {self.transform!r}",
            "the law of best-of-N is that of the logarithm: leave it there.",
        )
        _unused(self, "the law of best-of-N has no β", "beta_share")


@dataclass(frozen=True)
class BestOfNSft(BestOfGroup):
    """The likelihood of the best response of each group: best-of-N fine-tuning, an iteration of RAFT."""

    algorithm: ClassVar[str] = "best_of_n_sft:BestOfNSft"
    label: ClassVar[str | None] = "best-of-N fine-tuning"


@dataclass(frozen=True)
class Bonbon(BestOfGroup):
    """BoNBoN: the likelihood of a group's best response, and IPO on its best and worst (arXiv 2406.00832)."""

    algorithm: ClassVar[str] = "bonbon:Bonbon"
    label: ClassVar[str | None] = "BoNBoN"

    alpha: float = 0.005
    """α: weight of the likelihood beside that of IPO, 1 − α."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _between(self, 0, 1, "it is the weight of one of two parts, which add up to 1", "alpha")


@dataclass(frozen=True)
class Decoding:
    """How `sample` draws responses. By default all is as in the training; what else a server does can be tried."""

    max_length: int | None = None
    """The longest response, in tokens."""
    temperature: float | None = None
    """1 is the model's own law; towards 0 it becomes greedy."""
    top_k: int | None = None
    """Draw from the k likeliest tokens alone."""
    top_p: float | None = None
    """Draw from the smallest set of likeliest tokens that has this probability."""

    def __post_init__(self) -> None:
        for name, unit in (("max_length", "a response has"), ("top_k", "draw from")):
            value = getattr(self, name)
            _require(
                value is None or value >= 1,
                name,
                value,
                f"{name} is {value}",
                f"{unit} at least 1 token.",
            )
        _require(
            self.temperature is None or (self.temperature > 0 and math.isfinite(self.temperature)),
            "temperature",
            self.temperature,
            f"temperature is {self.temperature}",
            "it must be greater than 0. For the likeliest token alone set top_k to 1.",
        )
        if self.temperature is not None:
            _between(self, 1e-6, 1e3, "logits in float32 are divided by it", "temperature")
        _require(
            self.top_p is None or 0 < self.top_p <= 1,
            "top_p",
            self.top_p,
            f"top_p is {self.top_p}",
            "it is a probability above 0, up to 1.",
        )


@dataclass(frozen=True)
class Evaluation:
    """Unbiased win rates on held-out prompts."""

    prompts: int = 256
    """Test prompts; the intervals are over these."""
    responses_per_prompt: int = 64
    """M: responses a prompt from the policy, and as many from the reference."""
    procedures: tuple[str, ...] = (
        "sampling",
        *(f"{side}_of_{n}" for side in ("best", "worst") for n in (2, 4, 8, 16)),
    )
    bootstrap_resamples: int = 1000
    """Resamples of the prompts behind an interval, at least 100."""
    along: int = 0
    """Points evenly along the training at which KL and win rates are measured too, so that policies can be compared at
    equal KL (docs/comparison.md). Each takes as long as the evaluation of the final policy, and keeps its trained
    parameters in the work directory."""
    along_responses: int | None = None
    """Responses a prompt at each of these points; by default `responses_per_prompt`."""
    judge: str | None = None
    """An independent judge, reported beside the reward that the policy is trained on: `module:name` of a Python
    function (prompts, responses) -> floats, or a Hugging Face directory of a sequence classifier with one label. It
    compares what the procedure picks by the training reward, as deployment does."""

    def __post_init__(self) -> None:
        _positive(self, "prompts", "responses_per_prompt", "bootstrap_resamples")
        _require(
            self.bootstrap_resamples >= 100,
            "evaluation.bootstrap_resamples",
            self.bootstrap_resamples,
            f"Evaluation.bootstrap_resamples is {self.bootstrap_resamples}",
            "it must be at least 100: of fewer, the two most extreme alone make an end of a 95 % interval.",
        )
        problem = f"Evaluation.along is {self.along}"
        _require(self.along >= 0, "evaluation.along", self.along, problem, "it is a number of points, 0 for none.")
        found = [procedures.parse(name) for name in self.procedures]
        _set(self, procedures=tuple(procedure.name for procedure in found))
        needed = max((procedure.num_samples for procedure in found), default=1)
        _require(
            self.along_responses is None or self.along_responses >= needed,
            "evaluation.along_responses",
            self.along_responses,
            f"Evaluation.along_responses is {self.along_responses}, but Evaluation.procedures has one that needs "
            f"{needed} responses a prompt",
            f"raise it to at least {needed}, or leave that procedure out.",
        )
        for name, procedure in zip(self.procedures, found, strict=True):
            needed = procedure.num_samples
            _require(
                needed <= self.responses_per_prompt,
                "evaluation.procedures",
                self.procedures,
                f"Evaluation.procedures has {name!r}, which needs {needed} responses a prompt, but "
                f"Evaluation.responses_per_prompt is {self.responses_per_prompt}",
                f"raise it to at least {needed}.",
            )


@dataclass(frozen=True)
class Experiment:
    """All that a run depends on. What a stage on disk depends on is the part of this that its job reads."""

    name: str
    """Names the work directory."""
    seed: int = 0
    """Folded with the stage, step, prompt and sample into every random key."""
    data: Data = Data()
    model: Model = Model()
    sft: Supervised = Supervised(steps=600, learning_rate=1e-2)
    reward_model: RewardModel = RewardModel(steps=400, learning_rate=3e-3)
    combine: Combine = Combine()
    calibration: Calibration = Calibration()
    policy: Policy = Policy()
    evaluation: Evaluation = Evaluation()
    start: Stored | None = None
    """A training on the reference's stored responses, whose policy `policy` goes on from. The KL of both is measured
    against the reference. An experiment's file gives one; the command line may change its options."""

    def __post_init__(self) -> None:
        _require(
            self.name not in ("", ".", "..", "stages") and "/" not in self.name,
            "name",
            self.name,
            f"Experiment.name is {self.name!r}, which cannot be the name of a folder beside stages/",
            "choose another.",
        )
        _seed(self)
        for stage in ("sft", "reward_model"):
            batch_size = getattr(self, stage).batch_size
            _require(
                not self.data.generated or batch_size <= self.data.dialogues,
                f"{stage}.batch_size",
                batch_size,
                f"{stage}.batch_size is {batch_size}, but there are only Data.dialogues = {self.data.dialogues} "
                "examples",
                "lower the first or raise the second.",
            )
        _require(
            self.sft.steps > 0 or self.model.path is not None,
            "sft.steps",
            self.sft.steps,
            "sft.steps is 0 and Model.path is missing: a model from scratch would not be trained at all.",
            "Give `model.path` a Hugging Face directory, or `sft.steps` some hundreds.",
        )
        self._check_reward()
        self._check_policy()
        self._check_references()
        self._check_stored()

    def _check_reward(self) -> None:
        """The rewards beside one another, and beside what they are learned from and for."""
        trained_on = [
            self.reward_model.function,
            self.reward_model.path,
            *(self.combine.rewards if self.combines else ()),
        ]
        _require(
            self.evaluation.judge is None or self.evaluation.judge not in trained_on,
            "evaluation.judge",
            self.evaluation.judge,
            f"Evaluation.judge is {self.evaluation.judge!r}, which is also the reward that the policy is trained on. "
            "That one judges every run already",
            "give another one, or leave the option out.",
        )
        _require(
            self.reward_model.members > 1 or self.combine.ensemble == Combine.ensemble,
            "combine.ensemble",
            self.combine.ensemble,
            f"combine.ensemble is {self.combine.ensemble!r}, of {self.reward_model.members} member",
            "ask for several (`reward_model.members=4`), or leave it out.",
        )
        _require(
            not self.data.corrupted or self.reward_model.trained or isinstance(self.policy, Pairs),
            "data.corrupted",
            self.data.corrupted,
            f"Data.corrupted is {self.data.corrupted:g}, and nothing learns from the preference pairs: the reward is "
            f"{self.reward_model.function or self.reward_model.path}",
            "leave it out, or train a reward model.",
        )
        _require(
            bool(self.combine.rewards) or not self.combine.changes or not self.policy.reads_order_alone,
            "combine.by",
            self.combine.by,
            f"combine.by is {self.combine.by!r} of one reward, whose order stays as it is, and "
            f"{type(self.policy).__name__} with transform {self.policy.transform!r} sees order alone",
            "train on raw rewards (`Policy` with `policy.transform=raw`), or name more rewards (`combine.rewards`).",
        )
        if self.policy.floors:
            count = len(self.combine.rewards)
            _require(
                count == len(self.policy.floors),
                "policy.floors",
                self.policy.floors,
                f"Policy.floors is {self.policy.floors}, and combine.rewards names {count} rewards to hold there",
                "give a floor for each of them.",
            )
            _require(
                self.combine.by == Combine.by,
                "combine.by",
                self.combine.by,
                f"combine.by is {self.combine.by!r}, and policy.floors hold combine.rewards at floors instead",
                "leave one of the two out.",
            )
        _require(
            not {self.reward_model.function, self.reward_model.path} & set(self.combine.rewards),
            "combine.rewards",
            self.combine.rewards,
            f"combine.rewards {self.combine.rewards} has the reward model's own reward in it",
            "leave it out there: `combine.weights` give it more weight.",
        )

    @property
    def combines(self) -> bool:
        """Whether the reward is another than the reward model's own. Rewards at floors are not mixed into it."""
        return self.combine.changes and not self.policy.floors

    @property
    def functions(self) -> dict[str, str]:
        """The Python functions among its rewards, `module:name`, with the option that names each."""
        own = self.reward_model.function
        return {
            **({} if own is None else {own: "reward_model.function"}),
            **dict.fromkeys(self.combine.functions, "combine.rewards"),
        }

    @property
    def trainings(self) -> dict[str, Policy]:
        """The options of the trainings of the policy, by their section: of its start, if it has one, and its own."""
        return {**({} if self.start is None else {"start": self.start}), "policy": self.policy}

    def _check_stored(self) -> None:
        """What learns from stored responses, beside the calibration that keeps them."""
        _require(
            self.start is None or isinstance(self.start, Stored),
            "start",
            type(self.start).__name__,
            f"Experiment.start is a {type(self.start).__name__}, which does not learn from stored responses",
            f"give one that does: {_names(Stored)}.",
        )
        for section, stored in self.trainings.items():
            if not isinstance(stored, Stored):
                continue
            name, kept = type(stored).__name__, self.calibration.samples_per_prompt
            _require(
                self.calibration.keep_responses,
                "calibration.keep_responses",
                False,
                f"Calibration.keep_responses is False, and the {section} ({name}) learns from the reference's stored "
                "responses",
                "set it to True.",
            )
            _require(
                section == "policy" or stored.kl_limit is None,
                f"{section}.kl_limit",
                stored.kl_limit,
                f"{section.capitalize()}.kl_limit is {stored.kl_limit}",
                "leave it out: the KL of a start is an estimate, which stops nothing.",
            )
            _require(
                kept % stored.samples_per_prompt == 0,
                f"{section}.samples_per_prompt",
                stored.samples_per_prompt,
                f"{name}.samples_per_prompt is {stored.samples_per_prompt}, into groups of which the {kept} responses "
                "of a prompt (`calibration.samples_per_prompt`) do not divide",
                "make the second a multiple of the first.",
            )
            groups = self.calibration.prompts * kept // stored.samples_per_prompt
            _require(
                stored.prompts_per_step <= groups,
                f"{section}.prompts_per_step",
                stored.prompts_per_step,
                f"{name}.prompts_per_step is {stored.prompts_per_step}, and there are {groups} groups of responses",
                "lower it, or raise `calibration.prompts`.",
            )
            _require(
                stored.temperature == self.policy.temperature,
                f"{section}.temperature",
                stored.temperature,
                f"{name}.temperature is {stored.temperature}, and the responses are drawn at "
                f"{self.policy.temperature} (`policy.temperature`)",
                "give both the same.",
            )

    def _check_policy(self) -> None:
        """The policy beside what it is calibrated and evaluated with."""
        objective = self.policy.objective
        needed = objective.procedure.num_samples
        along, responses = self.evaluation.along, self.evaluation.along_responses
        _require(
            along < self.policy.steps,
            "evaluation.along",
            along,
            f"Evaluation.along is {along}, but Policy.steps is {self.policy.steps}",
            "there are no more points before the last step than that: lower the first.",
        )
        _require(
            responses is None or responses >= needed,
            "evaluation.along_responses",
            responses,
            f"Evaluation.along_responses is {responses}, but Policy.procedure is {self.policy.procedure!r}",
            f"it needs {needed} responses a prompt: raise the first.",
        )
        _require(
            needed <= self.evaluation.responses_per_prompt,
            "policy.procedure",
            self.policy.procedure,
            f"Policy.procedure is {self.policy.procedure!r}, which needs {needed} responses a prompt, but "
            f"Evaluation.responses_per_prompt is {self.evaluation.responses_per_prompt}",
            f"raise it to at least {needed}.",
        )
        _require(
            self.policy.prompts_per_step <= self.calibration.prompts,
            "policy.prompts_per_step",
            self.policy.prompts_per_step,
            f"Policy.prompts_per_step is {self.policy.prompts_per_step}, but only Calibration.prompts = "
            f"{self.calibration.prompts} prompts are calibrated to train on",
            "lower the first or raise the second.",
        )

    def _check_references(self) -> None:
        """The reference rewards of a prompt, beside what the policy makes of them."""
        references, name = self.calibration.rewards_per_prompt, type(self.policy).__name__
        _require(
            references >= self.policy.least_references,
            "calibration.samples_per_prompt",
            references,
            f"The calibration keeps {references} reference rewards a prompt, and {name} with {self.policy.procedure} "
            f"needs {self.policy.least_references}",
            "raise `calibration.samples_per_prompt` (and `calibration.quantiles`, where it is given).",
        )
        _require(
            self.calibration.quantiles is None or not isinstance(self.policy, FunctionalDerivative),
            "calibration.quantiles",
            self.calibration.quantiles,
            f"Calibration.quantiles is {self.calibration.quantiles}, and {name} draws its picks from the reference's "
            "rewards themselves",
            "leave it out, so that all are kept.",
        )
        for section, one in reversed(self.trainings.items()):
            reached = one.objective.most_kl(references)
            _require(
                one.beta is not None or one.kl_budget < reached,
                f"{section}.kl_budget",
                one.kl_budget,
                f"{section.capitalize()}.kl_budget is {one.kl_budget:g} nats, but {references} reference responses a "
                f"prompt support {reached:.3g} at most.",
                f"Lower `{section}.kl_budget`, raise `calibration.samples_per_prompt` (and `calibration.quantiles`, "
                f"where it is given), or give `{section}.beta`.",
            )


def grid(base: Experiment, *, transforms: Sequence[str], kl_budgets: Sequence[float]) -> list[Experiment]:
    """A sweep: `base` with every transform at every KL budget (nats per response), one budget after the other.

    A start has the point's transform too, and the same share of its budget as in `base`.
    """
    policies = [
        replace(base.policy, transform=transform, kl_budget=kl_budget, beta=None)
        for kl_budget in kl_budgets
        for transform in transforms
    ]
    share = 1.0 if base.start is None else base.start.kl_budget / base.policy.kl_budget

    def start(policy: Policy) -> Stored | None:
        if base.start is None:
            return None
        return replace(base.start, transform=policy.transform, kl_budget=share * policy.kl_budget, beta=None)

    return [
        replace(base, name=f"{policy.transform}_kl{policy.kl_budget:g}", policy=policy, start=start(policy))
        for policy in policies
    ]
