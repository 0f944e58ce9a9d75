"""The pytrees that flow between the steps, and the functions that the steps ask of a network.

Letters, here and in every docstring of the project:

    B prompts          N rollouts of a prompt       K reference responses of a prompt
    M evaluation responses of a prompt              P prompt tokens     T response tokens
    V vocabulary       D width                      H heads

Tokens are padded on the right. `lengths` alone say which tokens are real, never a token's value, so
EOS may equal PAD. A response's length counts its EOS, if it has one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

Params = Any
"""A network's parameters: a nested dict of arrays."""

Cache = Any
"""Keys and values of tokens already read: a pytree of arrays that lead with B for prompts, with B * N for responses."""


class Metric(NamedTuple):
    """A number that a training step reports."""

    name: str
    unit: str
    quantity: str = ""
    """The word for what went wrong if it is not finite, where it is a sign of something."""
    guarded: bool = False
    """Whether it must be finite for the step to be made."""
    shown: bool = False
    """Whether the console shows it while training runs."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    tokens: jax.Array
    """[B, P] int32."""
    lengths: jax.Array
    """[B] int32, at least 1."""
    ids: jax.Array
    """[B] uint32: names the prompt in the random keys and in the calibration table, whatever its batch."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Responses:
    tokens: jax.Array
    """[B, N, T] int32."""
    lengths: jax.Array
    """[B, N] int32, in 1..T."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollouts:
    prompts: Prompts
    responses: Responses
    log_probs: jax.Array
    """[B, N, T] nats, of each token under the law that sampled it; 0 past the length."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Examples:
    """Prompts with responses to learn from: N = 1 demonstration, or N = 2, the chosen response before the rejected."""

    prompts: Prompts
    responses: Responses


PreferencePairs = Examples
"""Examples with N = 2: index 0 is the chosen response, index 1 the rejected one."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch:
    """Prompts to sample responses to."""

    prompts: Prompts
    reference_rewards: jax.Array
    """[B, K] raw rewards of reference responses, or [B, Q] quantiles of them; each row ascending."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """The policy's own responses, and what is known of their quality."""

    rollouts: Rollouts
    raw: jax.Array
    """[B, N] raw rewards."""
    reference_rewards: jax.Array
    """[B, K], as in PolicyBatch."""
    constrained: jax.Array | None = None
    """[B, N, M] ranks in [0, 1] by other rewards, where an algorithm holds these at a floor."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredResponses:
    """Groups of N of the reference's K responses to a prompt, as the calibration stage kept them."""

    prompts: Prompts
    """A prompt is there once a group."""
    responses: Responses
    """In the integers that they are stored in."""
    log_probs: jax.Array
    """[B, N] nats of whole responses under the reference, by the law that training scores."""
    raw: jax.Array
    """[B, N] raw rewards."""
    reference_rewards: jax.Array
    """[B, K] raw rewards of all the prompt's responses, those of the group among them; in no order."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scored:
    """The three rewards of responses, each [B, N]."""

    raw: jax.Array
    """The reward model's."""
    calibrated: jax.Array
    """Ranks in [0, 1] among the reference's raw rewards."""
    transformed: jax.Array
    """What a policy is trained on."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CalibrationTable:
    """What the reference policy scores on each prompt."""

    ids: jax.Array
    """[B] uint32 of the prompts, in the order of the data."""
    rewards: jax.Array
    """[B, K] raw rewards of the reference's responses, or [B, Q] quantiles of them; each row ascending. A memory map in
    the host, where it is read from a stage."""


class Unembed(Protocol):
    """Features [..., D] to logits [..., V]."""

    def __call__(self, params: Params, features: jax.Array) -> jax.Array: ...


Trunk = Any
"""What the layers that are not trained make of prompts and responses: a pytree of arrays that lead with B, and an empty
one where all layers are trained."""


class Below(Protocol):
    """Reads prompts and responses by the layers below the first that is trained.

    All policies that are trained from one reference agree on it, and so does the reference: read once, it serves them.
    """

    def __call__(self, params: Params, prompts: Prompts, responses: Responses) -> Trunk: ...


class Above(Protocol):
    """Features [B, N, T, D] from which `unembed` predicts each response token, given all before it.

    features[b, n, t] has read prompt b and responses[b, n, :t], so that t = 0 has read the prompt alone. The trunk is
    that of the same prompts and responses.
    """

    def __call__(self, params: Params, trunk: Trunk, prompts: Prompts, responses: Responses) -> jax.Array: ...


class Prefill(Protocol):
    """Reads the prompts once: (features [B, D] that predict the first response token, prompt cache)."""

    def __call__(self, params: Params, prompts: Prompts) -> tuple[jax.Array, Cache]: ...


class StartResponses(Protocol):
    """An empty cache for N responses of at most T tokens beside each prompt's cache."""

    def __call__(self, prompt_cache: Cache, num_samples: int, max_length: int) -> Cache: ...


class Decode(Protocol):
    """Reads one more token of each response.

    (prompt cache, response cache, prompt lengths [B], tokens [B, N], index of those tokens in the response)
    to (features [B, N, D] that predict the next token, response cache).
    """

    def __call__(
        self, params: Params, prompt_cache: Cache, response_cache: Cache, prompt_lengths: jax.Array,
        tokens: jax.Array, index: jax.Array,
    ) -> tuple[jax.Array, Cache]: ...  # fmt: skip


class Policy(NamedTuple):
    """A language model as pure functions; a test's fake is six lambdas."""

    below: Below
    above: Above
    unembed: Unembed
    prefill: Prefill
    start: StartResponses
    decode: Decode

    def apply(self, params: Params, prompts: Prompts, responses: Responses) -> jax.Array:
        """The features of `above`, by all layers."""
        return self.above(params, self.below(params, prompts, responses), prompts, responses)


class RewardApply(Protocol):
    """Raw rewards [B, N]: the score of a response read with its prompt."""

    def __call__(self, params: Params, prompts: Prompts, responses: Responses) -> jax.Array: ...


Score = Callable[[Prompts, Responses], Any]
"""Raw rewards [B, N] of responses: by a compiled reward model, or by a function of the host."""

Transform = Callable[[jax.Array], jax.Array]
"""Φ: ranks u in [0, 1] to transformed rewards, elementwise and increasing."""
