"""What scores responses: a reward model trained on preference pairs, a classifier from a directory, or a function."""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ctrl_jax import build
from ctrl_jax.data import pretrained_tokenizers
from ctrl_jax.data.conversations import transcript
from ctrl_jax.data.pipelines import batches, padded
from ctrl_jax.errors import InputError
from ctrl_jax.jobs.run import Run, function_sources
from ctrl_jax.jobs.sft import Trained, finish
from ctrl_jax.models import huggingface, lora, partitioning, weights
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.types import Prompts, Responses

BUCKET = 32
"""A classifier reads its own tokens padded to this or the next power of two, so that few programs are compiled."""

TextReward = Callable[[list[str], list[str]], Sequence[float]]
"""(prompts as transcripts, a response to each) to a raw reward of each."""


class Reward(NamedTuple):
    score: build.Score
    stage: str
    """Names what it is, by content: the key of whatever depends on it."""
    seconds: float = 0.0
    """What its training took, if it was trained here."""


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
    optimizer = build.supervised_optimizer(config)
    key = build.stage_key(experiment.seed, "reward_model")
    frozen, trained = build.adapt_reward(run.models, run.mesh, key, reference.params)
    with stage.exclusive():
        step = build.reward_model_step(run.models, run.mesh, optimizer, micro_batches=config.micro_batches)
        state = run.fit(
            "reward model",
            lambda state, batch: step(state, frozen, batch),
            build.init_state(trained, optimizer, run.mesh),
            batches(run.corpus.pairs("train"), batch_size=config.batch_size, seed=experiment.seed),
            mesh=run.mesh,
            steps=config.steps,
            checkpoint_every=config.checkpoint_every,
            directory=stage.directory,
            fingerprint=stage.directory.name,
            columns=("loss", "accuracy"),
        )
        summary = finish(stage, state.params)
    scorer, params = build.scorer(run.models, run.mesh), lora.overlay(frozen, state.params)
    name = f"{stage.directory.name}-{summary['params']}"
    return Reward(lambda prompts, responses: scorer(params, prompts, responses), name, summary["seconds"])


def _classifier(run: Run, folder: Path) -> Reward:
    """A sequence classifier with one label, which reads the conversation in its own tokens and template."""
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
    scorer = build.scorer(build.models(architecture, run.experiment.model.lora), run.mesh)

    def score(prompts: Prompts, responses: Responses) -> Any:
        prompts, responses = hosts.addressable((prompts, responses))
        conversations = run.corpus.conversations(prompts)
        texts = run.corpus.texts(responses)
        asked = [tokenizer.encode_prompt(conversation) for conversation in conversations]
        said = [[[*tokenizer.encode_response(text), *tokenizer.after_response] for text in row] for row in texts]
        prompt_tokens, prompt_lengths = _bucketed(asked)
        tokens, lengths = _bucketed([tokens for row in said for tokens in row])
        shape = (len(said), len(said[0]))
        return scorer(
            params,
            Prompts(prompt_tokens, prompt_lengths, prompts.ids),
            Responses(tokens.reshape(*shape, -1), lengths.reshape(shape)),
        )

    return Reward(score, f"classifier-{weights.fingerprint(folder)}-{tokenizer.fingerprint}")


def _bucketed(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    return padded(rows, 1 << (max(BUCKET, *map(len, rows)) - 1).bit_length(), 0)


def _function(run: Run, name: str) -> Reward:
    function, sources = _load(name)

    def score(prompts: Prompts, responses: Responses) -> np.ndarray:
        prompts, responses = hosts.addressable((prompts, responses))
        # Where hosts divide the work, each response is still scored once: a function need not answer alike twice.
        return hosts.divided(
            lambda rows: of_rows(*jax.tree.map(lambda x: np.asarray(x)[rows], (prompts, responses))),
            len(prompts.lengths),
        )

    def of_rows(prompts: Prompts, responses: Responses) -> np.ndarray:
        texts = run.corpus.texts(responses)
        asked = [transcript(conversation) for conversation in run.corpus.conversations(prompts)]
        rewards = function(
            [prompt for prompt, row in zip(asked, texts, strict=True) for _ in row],
            [text for row in texts for text in row],
        )
        try:
            values = np.asarray(rewards, np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"The reward {name} returned what are not numbers ({error}); return a float each."
            ) from error
        responses_count = len(texts) * len(texts[0])
        if values.shape != (responses_count,):
            raise InputError(
                f"The reward {name} returned an array of shape {values.shape} for {responses_count} responses; return "
                "one float for each."
            )
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"The reward {name} returned {values[bad]} for response {bad}; return finite numbers.")
        return values.reshape(len(texts), -1)

    return Reward(score, f"function-{fingerprint({'name': name, 'sources': sources})}")


def _load(name: str) -> tuple[TextReward, dict[str, str]]:
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


def _imported(name: str, module_name: str, attribute: str) -> TextReward:
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
