"""What scores responses: a reward model trained on preference pairs, a classifier from a directory, or a function."""

import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ctrl_jax.algorithms.bradley_terry import BradleyTerry
from ctrl_jax.data import pretrained_tokenizers
from ctrl_jax.data.conversations import Conversation
from ctrl_jax.data.pipelines import batches, padded
from ctrl_jax.devices import parameters, partitioning, programs
from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface, lora, networks, weights
from ctrl_jax.pipeline import assembly, optimizers, randomness, watch
from ctrl_jax.pipeline.corpus import Corpus
from ctrl_jax.pipeline.run import Run, function_sources
from ctrl_jax.pipeline.sft import Trained, finish
from ctrl_jax.rewards import functions
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.loop import lowest_loss
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.types import Prompts, Responses, Score

LABEL = "reward model"
BUCKET = 32
"""A classifier reads its own tokens padded to this or the next power of two, so that few programs are compiled."""


class Reward(NamedTuple):
    score: Score
    stage: str
    """Names what it is, by content: the key of whatever depends on it."""
    seconds: float = 0.0
    """What its training took, if it was trained here."""
    columns: tuple[str, ...] = ()
    """Columns of the data that it reads beside prompts and responses."""


def run(run: Run, reference: Trained) -> Reward:
    """The experiment's reward: trained, trained on, or read where it is done; or what it was given.

    Raises:
      InputError: if the directory or function that was given cannot be used.
    """
    config = run.experiment.reward_model
    if config.path is not None:
        return _classifier(run, Path(config.path))
    if config.function is not None:
        return _function(run, config.function)
    return _trained(run, reference)


def named(run: Run, text: str, option: str) -> Reward:
    """The reward that `text`, the value of `option`, names: a sequence classifier's directory or a function.

    Raises:
      InputError: if it is neither, or cannot be used.
    """
    try:
        if Path(text).is_dir():
            return _classifier(run, Path(text))
        if text.count(":") == 1:
            return _function(run, text)
    except InputError as error:
        raise InputError(re.sub(r"--reward-model\.(path|function)", option, str(error))) from error
    raise InputError(
        f"{option} is {text!r}, which is neither a directory here nor module:name. Give a Hugging Face directory of a "
        "sequence classifier with one label, or a Python function such as rewards:brevity."
    )


def _trained(run: Run, reference: Trained) -> Reward:
    experiment = run.experiment
    config = experiment.reward_model
    stage = run.stage(
        "reward_model",
        corpus=run.corpus.key("train"),
        reference=reference.stage,
        lora=experiment.model.lora,
        reward_model=config,
        seed=experiment.seed,
    )
    optimizer = optimizers.supervised(config)
    key = randomness.stage_key(experiment.seed, "reward_model")
    frozen, trained = parameters.adapt_reward(run.models, run.mesh, key, reference.params)
    with stage.exclusive():
        with run.open_training(
            LABEL,
            programs.init_state(trained, optimizer, run.mesh),
            batches(run.corpus.pairs("train"), batch_size=config.batch_size, seed=experiment.seed),
            metrics=BradleyTerry.metrics,
            mesh=run.mesh,
            steps=config.steps,
            checkpoint_every=config.checkpoint_every,
            directory=stage.directory,
            fingerprint=stage.directory.name,
        ) as training:
            step = assembly.reward_model_step(run.models, run.mesh, optimizer, micro_batches=config.micro_batches)
            see_it_move = watch.moving(LABEL, "--reward-model", config)
            for update in training.updates(lambda state, batch: step(state, frozen, batch)):
                training.refuse_unsound(update)
                rows = training.report(update)
                see_it_move(rows)
                training.save(update, score=lowest_loss(rows))
        trained = training.state.params
        summary = finish(stage, trained)
    scorer, params = assembly.scorer(run.models, run.mesh), lora.overlay(frozen, trained)
    name = f"{stage.directory.name}-{summary['params']}"
    return Reward(lambda prompts, responses: scorer(params, prompts, responses), name, summary["seconds"])


def _classifier(run: Run, folder: Path) -> Reward:
    """A sequence classifier with one label, which reads the conversation in its own tokens and template.

    It scores what transformers' classifier of that directory scores: the finished conversation as its template writes
    it, which is what it was trained on, at the last token that is not `pad_token_id`. Where a model pads with the token
    that ends a turn, that is the token before. A policy's own reward model, which is trained here, reads the policy's
    tokens instead, prompt and response as they are sampled.
    """
    architecture = huggingface.architecture(folder, dtype=run.experiment.model.dtype)
    tokenizer = pretrained_tokenizers.load(folder, embedding_rows=architecture.vocabulary_size)
    if not huggingface.is_classifier(folder):
        raise InputError(
            f"--reward-model.path is {folder}, whose config.json is not a sequence classifier's; give one with a "
            "single label, or leave the option out to train a reward model."
        )
    place = partial(partitioning.sharding, run.mesh)
    trunk = weights.load(folder, architecture, place=place)
    head = weights.load_reward_head(folder, architecture, place=place)
    params = {"params": {"trunk": trunk, "head": head}}
    scorer = assembly.scorer(networks.create(architecture, run.experiment.model.lora), run.mesh)
    pad, context = huggingface.pad_token_id(folder), huggingface.context(folder)

    def tokens_of(conversation: Conversation, text: str) -> list[int]:
        tokens = _without_padding(tokenizer.encode_conversation(conversation, text), pad)
        if context is not None and len(tokens) > context:
            raise InputError(
                f"A prompt with its response has {len(tokens)} tokens of the classifier at --reward-model.path "
                f"{folder}, which was made for {context} (max_position_embeddings in its config.json). Lower "
                "--data.prompt-length or --data.response-length, or give a classifier with a longer context. The "
                f"response begins with {text[:60]!r}."
            )
        return tokens

    def score(prompts: Prompts, responses: Responses) -> Any:
        prompts, responses = hosts.addressable((prompts, responses))
        pairs = zip(run.corpus.conversations(prompts), run.corpus.texts(responses), strict=True)
        return scorer(
            params, *_divided([[tokens_of(said, text) for text in texts] for said, texts in pairs], prompts.ids)
        )

    return Reward(score, f"classifier-{weights.fingerprint(folder)}-{tokenizer.fingerprint}")


def _without_padding(tokens: list[int], pad: int | None) -> list[int]:
    """Up to the last token that is no padding; of padding alone transformers reads the first."""
    last = next((i for i in reversed(range(len(tokens))) if tokens[i] != pad), 0)
    return tokens[: last + 1]


def _divided(rows: Sequence[Sequence[list[int]]], ids: Any) -> tuple[Prompts, Responses]:
    """[B][N] sequences: as prompts the beginning that a row's sequences share, which is read once, and the rest."""
    shared = [_shared(row) for row in rows]
    prompts, prompt_lengths = _bucketed([row[0][:length] for row, length in zip(rows, shared, strict=True)])
    tokens, lengths = _bucketed([tokens[length:] for row, length in zip(rows, shared, strict=True) for tokens in row])
    shape = (len(rows), len(rows[0]))
    return Prompts(prompts, prompt_lengths, ids), Responses(tokens.reshape(*shape, -1), lengths.reshape(shape))


def _shared(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with, but at most all but the last of one: there its score is read."""
    columns = zip(*(tokens[:-1] for tokens in sequences), strict=False)
    return len([*itertools.takewhile(lambda column: len(set(column)) == 1, columns)])


def _bucketed(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    return padded(rows, 1 << (max(BUCKET, *map(len, rows)) - 1).bit_length(), 0)


def _function(run: Run, name: str) -> Reward:
    function, sources = _load(name)
    columns = functions.columns_of(function, name, run.corpus)
    values = run.corpus.values(columns)

    def score(prompts: Prompts, responses: Responses) -> np.ndarray:
        prompts, responses = hosts.addressable((prompts, responses))
        # Where hosts divide the work, each response is still scored once: a function need not answer alike twice.
        return hosts.divided(
            lambda rows: of_rows(*jax.tree.map(lambda x: np.asarray(x)[rows], (prompts, responses))),
            len(prompts.lengths),
        )

    def of_rows(prompts: Prompts, responses: Responses) -> np.ndarray:
        ids = np.asarray(prompts.ids).tolist()
        of_prompts = [values.get(prompt_id, dict.fromkeys(columns)) for prompt_id in ids]
        return functions.rewards(function, name, run.corpus.asked(prompts), run.corpus.texts(responses), of_prompts)

    return Reward(score, f"function-{fingerprint({'name': name, 'sources': sources})}", columns=columns)


def check_function(name: str, corpus: Corpus) -> None:
    """Refuses a function that cannot be imported, or fails on one row of the data."""
    functions.check(_load(name)[0], name, corpus)


def _load(name: str) -> tuple[functions.TextReward, dict[str, str]]:
    """The function called module:name, and what is known of its module and all that this imports: where any of them is
    another, it is another reward."""
    module_name, attribute = name.split(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(
            f"--reward-model.function is {name!r}, and {module_name!r} is no name of a module; write it as `import` "
            "would, without .py: rewards:brevity for brevity in rewards.py."
        )
    # As `python -c "import module"` would find it: the command may run from an installed script.
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = _imported(name, module_name, attribute)
    except BaseException:
        sys.path.pop(0)
        raise
    # It stays, for what the function imports when it is called.
    if str(Path.cwd()) in sys.path[1:]:
        sys.path.pop(0)
    sources = function_sources(name)
    hosts.check_alike({f"{source} of the reward {name}": known for source, known in sources.items()})
    first = vars(sys.modules[module_name]).setdefault("__ctrl_jax_sources__", sources)
    if first != sources:
        changed = ", ".join(one for one in {**first, **sources} if first.get(one) != sources.get(one))
        raise InputError(
            f"The reward {name} has changed ({changed}) since this process imported it, and would be used as it was. "
            "Start it again; in a notebook, restart the kernel."
        )
    return function, sources


def _imported(name: str, module_name: str, attribute: str) -> functions.TextReward:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"--reward-model.function is {name!r}, and the module {module_name!r} cannot be imported from {Path.cwd()} "
            f"({error}). Write module:name of a file there, or of an installed package."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(
            f"--reward-model.function is {name!r}, but {module_name} has no function {attribute!r}; define "
            f"{attribute}(prompts, responses) there, which returns a float for each."
        )
    try:
        inspect.getsource(module)
    except (OSError, TypeError) as error:
        raise InputError(
            f"--reward-model.function is {name!r}, and {module_name} has no Python source ({error}), by which to tell "
            "whether the reward has changed; wrap it in a function of a .py file."
        ) from error
    return function
