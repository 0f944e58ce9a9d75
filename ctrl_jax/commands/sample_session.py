"""Responses of policy and reference to a prompt while they are drawn, then their rewards and the procedure's pick."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax import config
from ctrl_jax.data import pretrained_tokenizers
from ctrl_jax.data.conversations import Conversation, Record, Turn
from ctrl_jax.data.forms import Format
from ctrl_jax.data.pipelines import PromptSet, prompts
from ctrl_jax.data.tokenizers import Tokenizer
from ctrl_jax.devices.mesh import batch_parts, shard
from ctrl_jax.errors import InputError
from ctrl_jax.models import networks
from ctrl_jax.pipeline import align, assembly, randomness, sft
from ctrl_jax.pipeline.directories import pretrained_architecture
from ctrl_jax.pipeline.run import Run, networks_of
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.runtime.console import progress, say, table
from ctrl_jax.steps.calibration import calibrate, leave_one_out
from ctrl_jax.theory import procedures
from ctrl_jax.theory.objective import Transformed
from ctrl_jax.types import Params, Prompts, Responses, Score

MAX_SAMPLES = 256
EXAMPLES = 20


@dataclass(frozen=True)
class Response:
    text: str
    state: Literal["growing", "ended", "cut"]
    """`cut`: it reached the longest length without an end."""


@dataclass(frozen=True)
class Drawn:
    """The responses so far, by side."""

    responses: Mapping[str, tuple[Response, ...]]


@dataclass(frozen=True)
class Comparing:
    """Progress of the K reference responses that give the ranks: `tokens` drawn, `of` the longest length."""

    references: int
    tokens: int
    of: int


@dataclass(frozen=True)
class Rewards:
    """Rewards of each response, in the order of the responses."""

    raw: tuple[float, ...]
    calibrated: tuple[float, ...]
    transformed: tuple[float, ...]


@dataclass(frozen=True)
class Scored:
    rewards: Mapping[str, Rewards]


@dataclass(frozen=True)
class Picked:
    """The index of each side's pick among the first `looks_at` responses."""

    procedure: str
    looks_at: int
    picks: Mapping[str, int]


class Asked(NamedTuple):
    num_samples: int
    procedure: str
    decoding: config.Decoding | None = None
    """Its temperature and top_p, where they are given, replace the session's."""


Event = Drawn | Comparing | Scored | Picked


@dataclass(frozen=True)
class Judge:
    """The rewards of responses: raw from `score`, calibrated against the side `reference`, and transformed."""

    score: Score
    references: int
    """K."""
    transformed: Transformed
    remember: Callable[[PromptSet], bool] = lambda prompts: True
    """Called with each prompt, so that `score` knows its id. False if the prompt cannot be scored, because the reward
    reads columns that only the data's own prompts have."""


class Session:
    """Draws responses to one prompt after another; the same prompt gets new ones each time.

    Args:
      experiment: for its lengths, its temperature and its seed.
      parts: the models of `sides`.
      mesh: the devices, which all compute the same one prompt.
      tokenizer: the models'.
      sides: parameters, by the name that responses are shown under: `policy` and `reference`, or one model alone.
      judge: None for neither rewards nor picks.
      decoding: how all responses are drawn, also those of the reference that give the ranks.
      examples: prompts that a user may want to try.
    """

    def __init__(
        self, experiment: config.Experiment, parts: networks.Networks, mesh: Any, tokenizer: Tokenizer,
        sides: Mapping[str, Params], judge: Judge | None, decoding: config.Decoding, examples: Sequence[str] = (),
    ):  # fmt: skip
        self.sides = tuple(sides)
        self.format = experiment.data.format
        self.has_rewards = judge is not None
        self.examples = tuple(examples)
        self.temperature = decoding.temperature or experiment.policy.temperature
        self.top_p = decoding.top_p
        self.max_length = decoding.max_length or experiment.data.response_length
        self._params = sides
        self._judge = judge
        self._experiment = experiment
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._drawn = 0

        self._streamer = lru_cache(maxsize=8)(
            lambda num_samples, temperature, top_p: assembly.streamer(
                parts, mesh,
                num_samples=num_samples, max_length=self.max_length, eos_ids=tokenizer.eos_ids,
                temperature=temperature, top_k=decoding.top_k, top_p=top_p,
            )
        )  # fmt: skip

    def answer(self, conversation: Conversation, asked: Asked) -> Iterator[Event]:
        """Draws N responses of each side to a conversation: `Drawn` many times, then `Scored` and `Picked`.

        A prompt that the judge cannot score ends without the last two.

        Raises:
          InputError: before anything is drawn, if the prompt is empty or longer than the context, N is out of bounds,
            or the procedure does not exist or looks at more responses than N.
        """
        prompt = read_prompt(conversation, self._tokenizer, self._experiment.data)
        if not 1 <= asked.num_samples <= MAX_SAMPLES:
            raise InputError(f"{asked.num_samples} responses are asked for; ask for 1 to {MAX_SAMPLES}.")
        judged = False
        if self._judge is not None:
            _looking_at(asked.procedure, asked.num_samples)
            judged = self._judge.remember(prompt)
            if not judged:
                say(
                    "No rewards: the reward reads columns of the data, which this prompt does not have.", style="yellow"
                )
        # Every device reads the same prompt.
        everywhere = jax.tree.map(lambda x: np.repeat(x, batch_parts(self._mesh), axis=0), prompt.prompts)
        chosen = asked.decoding or config.Decoding()
        law = (chosen.temperature or self.temperature, chosen.top_p or self.top_p)
        judge = self._judge if judged else None
        return self._events(shard(self._mesh, everywhere), asked.num_samples, asked.procedure, law, judge)

    def pick(self, rewards: Mapping[str, Any], procedure: str) -> Picked:
        """Picks a response of each side by its raw rewards.

        Raises:
          InputError: if there is no such procedure, or it looks at more responses than there are.
        """
        rule = _looking_at(procedure, min(map(len, rewards.values())))
        key = jax.random.fold_in(randomness.stage_key(self._experiment.seed, "pick"), self._drawn)
        picks = {
            side: int(rule.select(jnp.array([*map(float, raw[: rule.num_samples])]), jax.random.fold_in(key, place)))
            for place, (side, raw) in enumerate(rewards.items())
        }
        return Picked(rule.name, rule.num_samples, picks)

    def _events(
        self,
        prompts: Prompts,
        num_samples: int,
        procedure: str,
        law: tuple[float, float | None],
        judge: Judge | None,
    ) -> Iterator[Event]:
        self._drawn += 1
        latest: dict[str, tuple[Response, ...]] = {}
        responses: dict[str, Responses] = {}
        # A token of each side in turn; a side that ends first stays as it is.
        for step in zip_longest(*(self._stream(side, prompts, num_samples, law) for side in self.sides)):
            for side, state in zip(self.sides, step, strict=True):
                if state is not None:
                    responses[side], alive = state
                    latest[side] = self._texts(responses[side], alive)
            yield Drawn(dict(latest))
        if judge is None:
            return

        count = max(judge.references, num_samples)
        for references, _ in self._stream("reference", prompts, count, law):
            tokens = int(references.lengths[0].max())
            yield Comparing(count, tokens, self.max_length)
        raw = {side: self._score(prompts, responses[side]) for side in self.sides}
        # The reference's own responses are the first of these: both draw the same.
        by_reference = jnp.asarray([*raw["reference"], *self._score(prompts, references)[num_samples:]])
        calibrated = {
            side: leave_one_out(by_reference)[:num_samples]
            if side == "reference"
            else calibrate(jnp.asarray(raw[side]), by_reference)
            for side in self.sides
        }
        rewards = {}
        for side, ranks in calibrated.items():
            transformed = judge.transformed(raw[side], ranks)
            rewards[side] = Rewards(*(tuple(map(float, np.asarray(x))) for x in (raw[side], ranks, transformed)))
        yield Scored(rewards)
        yield self.pick({side: of_side.raw for side, of_side in rewards.items()}, procedure)

    def _stream(
        self, side: str, prompts: Prompts, num_samples: int, law: tuple[float, float | None]
    ) -> Iterator[tuple[Responses, np.ndarray]]:
        """Yields (responses so far, which of them still grow [1, N]) in host memory, a token at a time.

        A response depends on the side, the prompt, its index and how many prompts came before, not on N.
        """
        start, advance = self._streamer(num_samples, *law)
        key = jax.random.fold_in(randomness.stage_key(self._experiment.seed, f"sample, {side}"), self._drawn)
        state = start(self._params[side], prompts, key)
        unfinished = True
        while unfinished:
            responses, alive = jax.device_get((state.rollouts.responses, state.alive))
            unfinished = bool(state.unfinished)
            if unfinished:
                # Dispatched before the current responses are read.
                state = advance(self._params[side], state)
            yield responses, alive & unfinished

    def _score(self, prompts: Prompts, responses: Responses) -> np.ndarray:
        assert self._judge is not None
        return np.asarray(self._judge.score(prompts, shard(self._mesh, responses)))[0]

    def _texts(self, responses: Responses, alive: np.ndarray) -> tuple[Response, ...]:
        rows = zip(responses.tokens[0].tolist(), responses.lengths[0].tolist(), alive[0].tolist(), strict=True)
        return tuple(self._text(tokens[:length], grows) for tokens, length, grows in rows)

    def _text(self, tokens: list[int], grows: bool) -> Response:
        text = self._tokenizer.decode(tokens)
        if grows:
            # Its last bytes may begin a character that is not complete.
            return Response(text.rstrip("\ufffd"), "growing")
        return Response(text, "ended" if tokens[-1] in self._tokenizer.eos_ids else "cut")


def ask_for(policy: config.Policy, num_samples: int | None, procedure: str | None, *, rewards: bool = True) -> Asked:
    """Fills in the defaults: the procedure of the training, and 4 responses or, with rewards, as many as it looks at.

    Raises:
      InputError: if there is no such procedure, or it looks at more responses than are asked for.
    """
    rule = procedures.parse(policy.procedure if procedure is None else procedure)
    needed = rule.num_samples if rewards else 1
    count = max(4, needed) if num_samples is None else num_samples
    return Asked(count, _looking_at(rule.name, count).name if rewards else rule.name)


def said(text: str, format: Format = "chat") -> Conversation:
    """A conversation of one user turn; of a plain text all white space counts."""
    return (Turn("user", text.strip() if format == "chat" else text),)


def first(run: Run) -> Conversation:
    """The first test prompt."""
    return run.corpus.prompts("test", 1).conversations[0]


def read_prompt(conversation: Conversation, tokenizer: Tokenizer, data: config.Data) -> PromptSet:
    """The conversation as the one prompt of a set.

    Raises:
      InputError: if its last turn is empty, or it is longer than the context and long prompts are not cut.
    """
    text = conversation[-1].content
    if not text.strip():
        raise InputError(f"The prompt is empty ({text!r}); write something to answer.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError("The prompt names half of a character (\\ud800 to \\udfff, alone); mend its text.")
    length = len(tokenizer.encode_prompt(conversation))
    if length > data.prompt_length and data.long_prompts == "drop":
        raise InputError(
            f"The prompt has {length} tokens, but the context holds {data.prompt_length}; shorten it, or train with "
            f"--data.prompt-length {length}."
        )
    return prompts([Record(conversation)], tokenizer, prompt_length=data.prompt_length, long_prompts=data.long_prompts)


def trained(run: Run, decoding: config.Decoding, prompt: str | None = None) -> Session:
    """A session with the experiment's policy and reference; stages that are missing run first.

    Raises:
      InputError: before that, if the first prompt is empty or too long.
    """
    experiment, tokenizer = run.experiment, run.corpus.tokenizer
    if prompt is not None:
        read_prompt(said(prompt, experiment.data.format), tokenizer, experiment.data)
    references = experiment.calibration.samples_per_prompt
    aligned = align.policy(run)
    return Session(
        experiment,
        run.models,
        run.mesh,
        tokenizer,
        {"policy": aligned.policy, "reference": aligned.reference.params},
        Judge(
            aligned.reward.score,
            references,
            experiment.policy.objective.transformed(experiment.calibration.rewards_per_prompt),
            lambda prompts: run.corpus.remember(prompts) or not aligned.reward.columns,
        ),
        decoding,
        _examples(run),
    )


def _examples(run: Run) -> list[str]:
    """Test prompts of a single turn, which a user could have typed."""
    prompts = run.corpus.prompts("test", min(EXAMPLES, run.experiment.evaluation.prompts))
    return [one[-1].content for one in prompts.conversations if len(one) == 1]


def untrained(workspace: Workspace, decoding: config.Decoding) -> Session:
    """A session with the pretrained model, without rewards; nothing is trained, and no data is read.

    Raises:
      InputError: if the experiment has no such directory.
    """
    path = workspace.experiment.model.path
    if path is None:
        raise InputError(
            "--untrained shows a pretrained model, and this experiment starts from scratch. Give a Hugging Face "
            "directory, --model.path, or leave --untrained out."
        )
    sizes = pretrained_architecture(workspace.experiment)
    form = workspace.experiment.data.format
    tokenizer = pretrained_tokenizers.load(Path(path), embedding_rows=sizes.vocabulary_size, format=form)
    sides = {"model": sft.pretrained(workspace)}
    models = networks_of(workspace, sizes)
    return Session(workspace.experiment, models, workspace.mesh, tokenizer, sides, None, decoding)


def print_responses(session: Session, conversation: Conversation, asked: Asked) -> None:
    """Prints a table of each side's responses and rewards; ▸ marks the procedure's pick."""
    say(conversation[-1].content, style="bold")
    rewards: Mapping[str, Rewards] = {}
    picks: Mapping[str, int] = {}
    events = session.answer(conversation, asked)
    with progress("sample", session.max_length * (2 if session.has_rewards else 1)) as bar:
        for tokens, event in enumerate(events, start=1):
            match event:
                case Drawn():
                    responses = event.responses
                    bar.update(tokens)
                case Comparing():
                    bar.update(session.max_length + event.tokens)
                case Scored():
                    rewards = event.rewards
                case Picked():
                    picks = event.picks
    for side in session.sides:
        marks = ["▸ " if index == picks.get(side) else "  " for index in range(asked.num_samples)]
        texts = [mark + shown(response) for mark, response in zip(marks, responses[side], strict=True)]
        if side in rewards:
            of_side = rewards[side]
            columns = [f"response (▸ {asked.procedure})", "raw", "calibrated", "transformed"]
            rows = zip(texts, of_side.raw, of_side.calibrated, of_side.transformed, strict=True)
            table(side, columns, [*map(list, rows)])
        else:
            table(side, ["response"], [[text] for text in texts])


def shown(response: Response) -> str:
    return f"{response.text} …" if response.state == "cut" else response.text


def _looking_at(name: str, count: int) -> procedures.Procedure:
    """The procedure of that name; InputError unless it can pick among `count` responses."""
    rule = procedures.parse(name.strip())
    if rule.num_samples > count:
        raise InputError(
            f"{rule} looks at {rule.num_samples} responses, but there are {count}; ask for at least {rule.num_samples}."
        )
    return rule
