"""A decoder whose sequences are a prompt, read once, and the N responses that share it; an `Architecture` says which.

Positions are real: a response's first token follows its prompt's last real one, wherever the padding ends. Layers are
unrolled and each has its own cache, laid out [batch, head, position, dim]: on CPU that decodes several times faster
than the position-major layout, and about twice as fast as scanned layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ctrl_jax.config import Lora
from ctrl_jax.models.architecture import Architecture, Layer
from ctrl_jax.types import Cache, Params, Policy, Prompts, Responses


class KeysValues(NamedTuple):
    """One layer's cache: [B, kv heads, P, d] of the prompts, or [B * N, kv heads, T, d] of the responses.

    One axis for all responses, as the products read them: of [B, N, ...] XLA's CPU backend copies the whole cache for
    every token."""

    keys: jax.Array
    values: jax.Array


class Rotation(NamedTuple):
    cos: jax.Array
    sin: jax.Array


def rotation(positions: jax.Array, frequencies: tuple[float, ...], size: int) -> Rotation:
    """Cosine and sine [..., 1, d/2] of each position's angles, one axis for the heads: positions [...] below size."""
    # Looked up in a constant: what the program computed, XLA would fuse into all that reads it, and compute again in
    # each layer, head and dim, whatever barrier there is.
    angles = np.arange(size, dtype=np.float32)[:, None] * np.array(frequencies, np.float32)
    cos, sin = (
        jnp.take(jnp.array(table), positions, axis=0, mode="clip") for table in (np.cos(angles), np.sin(angles))
    )
    return Rotation(cos[..., None, :], sin[..., None, :])


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves rotated: x [..., H, d]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    rotated = [first * by.cos - second * by.sin, second * by.cos + first * by.sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def visible(queries: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
    """[..., T, S] whether a token at position `queries` [..., T] attends to one at `keys` [..., S]."""
    behind = queries[..., :, None] - keys[..., None, :]
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def attend(
    queries: jax.Array,
    shared: KeysValues,
    shared_mask: jax.Array,
    own: KeysValues | None,
    own_mask: jax.Array | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """Softmax attention of each response to its prompt's keys, one copy for all N, and to its own.

    queries [B, N, T, H, d], shared_mask [B, T, P], own_mask [T, S]; returns [B, N, T, H * d]. Grouped queries: head h
    reads key-value head h // (H / kv heads) (Ainslie et al. 2023, arXiv 2305.13245). Scores are scale * q.k, and with a
    softcap c they become c * tanh(scores / c). One softmax goes over both parts' scores, while the shared keys and
    values are never copied beside each response's own.
    """
    batch, samples, length, heads, dim = queries.shape
    kv_heads = shared.keys.shape[1]
    groups = heads // kv_heads
    queries = queries.reshape(batch, samples, length, kv_heads, groups, dim).transpose(0, 1, 3, 4, 2, 5)
    queries = queries.reshape(batch, samples, kv_heads, groups * length, dim)

    def scores(equation: str, queries: jax.Array, keys: jax.Array, mask: jax.Array) -> jax.Array:
        products = jnp.einsum(equation, queries, keys, preferred_element_type=jnp.float32)
        products = scale * products.reshape(batch, samples, kv_heads, groups, length, -1)
        if softcap is not None:
            products = softcap * jnp.tanh(products / softcap)
        # Finite, so that the row of a padded query, which sees nothing, stays free of nan in the gradient too.
        return jnp.where(mask, products, -1e30)

    def mix(equation: str, weights: jax.Array, values: jax.Array) -> jax.Array:
        # Values first: the other way round, XLA's CPU backend has no product of bfloat16 into float32 (jax 0.10.1).
        mixed = jnp.einsum(equation, values, weights, preferred_element_type=jnp.float32)
        return mixed.reshape(batch, samples, kv_heads, groups, length, dim)

    all_scores = scores("bnkmd,bkpd->bnkmp", queries, shared.keys, shared_mask[:, None, None, None])
    if own is not None and own_mask is not None:
        by_row = queries.reshape(-1, *queries.shape[2:])
        own_scores = scores("rkmd,rksd->rkms", by_row, own.keys, jnp.expand_dims(own_mask, (0, 1, 2, 3)))
        all_scores = jnp.concatenate([all_scores, own_scores], axis=-1)
    weights = jnp.exp(all_scores - jax.lax.stop_gradient(all_scores.max(-1, keepdims=True)))
    num_shared = shared.keys.shape[2]
    to_shared, to_own = (
        part.reshape(batch, samples, kv_heads, groups * length, -1).astype(shared.values.dtype)
        for part in (weights[..., :num_shared], weights[..., num_shared:])
    )
    out = mix("bkpd,bnkmp->bnkmd", to_shared, shared.values)
    if own is not None:
        out += mix("rksd,rkms->rkmd", to_own.reshape(-1, *to_own.shape[2:]), own.values)
    out = (out / weights.sum(-1, keepdims=True)).astype(shared.values.dtype)
    return out.transpose(0, 1, 4, 2, 3, 5).reshape(batch, samples, length, heads * dim)


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) in float32, times offset + scale."""

    epsilon: float
    offset: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(1.0 - self.offset), (x.shape[-1],), jnp.float32)
        exact = x.astype(jnp.float32)
        exact *= jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + self.epsilon)
        return (exact * jnp.expand_dims(self.offset + scale.astype(jnp.float32), range(x.ndim - 1))).astype(x.dtype)


class Projection(nn.Module):
    """x W + b, rows [R, in] to [R, features]; with an adapter in the collection `lora` also (alpha / rank) x A B."""

    features: int
    use_bias: bool
    kernel_init: nn.initializers.Initializer
    lora_scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features)).astype(x.dtype)
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)[None]
        if self.has_variable("lora", "a"):
            a: jax.Array = self.get_variable("lora", "a")
            b: jax.Array = self.get_variable("lora", "b")
            out += self.lora_scale * ((x @ a.astype(x.dtype)) @ b.astype(x.dtype))
        return out


class Block(nn.Module):
    architecture: Architecture
    layer: Layer
    lora: Lora

    def setup(self) -> None:
        sizes = self.architecture

        def projection(features: int, use_bias: bool, scale: float = 1.0) -> Projection:
            init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
            return Projection(features, use_bias, init, self.lora.alpha / max(1, self.lora.rank))

        def norm() -> Norm:
            return Norm(sizes.norm_epsilon, sizes.norm_offset)

        # The projections that write to the residual stream start smaller the deeper the model (Radford et al. 2019).
        residual = 1.0 / (2 * len(sizes.layers))
        self.attention_norm = norm()
        self.q_proj = projection(sizes.heads * sizes.head_dim, sizes.qkv_bias)
        self.k_proj = projection(sizes.kv_heads * sizes.head_dim, sizes.qkv_bias)
        self.v_proj = projection(sizes.kv_heads * sizes.head_dim, sizes.qkv_bias)
        self.o_proj = projection(sizes.width, sizes.output_bias, residual)
        self.mlp_norm = norm()
        self.gate_proj = projection(sizes.mlp_width, sizes.mlp_bias)
        self.up_proj = projection(sizes.mlp_width, sizes.mlp_bias)
        self.down_proj = projection(sizes.width, sizes.mlp_bias, residual)
        if sizes.query_key_norm:
            self.q_norm, self.k_norm = norm(), norm()
        if sizes.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()

    def project(self, x: jax.Array, by: Rotation) -> tuple[jax.Array, KeysValues]:
        """x [B, N, T, D] to queries [B, N, T, H, d] and keys and values [B * N, kv heads, T, d]."""
        rows = _rows(self.attention_norm(x))
        queries, keys, values = (
            projection(rows).reshape(*x.shape[:-1], -1, self.architecture.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.architecture.query_key_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = rotate(queries, by), rotate(keys, by)
        return queries, KeysValues(*(part.reshape(-1, *part.shape[2:]).swapaxes(1, 2) for part in (keys, values)))

    def finish(
        self,
        x: jax.Array,
        queries: jax.Array,
        shared: KeysValues,
        shared_mask: jax.Array,
        own: KeysValues | None,
        own_mask: jax.Array | None,
    ) -> jax.Array:
        """The layer's output [B, N, T, D] once its keys are known; masks as in `attend`."""
        sizes = self.architecture
        scale, softcap = sizes.query_scale, sizes.attention_softcap
        attended = self.o_proj(_rows(attend(queries, shared, shared_mask, own, own_mask, scale=scale, softcap=softcap)))
        rows = _rows(x) + (self.attention_post_norm(attended) if sizes.post_norms else attended)
        hidden = self.mlp_norm(rows)
        gate = self.gate_proj(hidden)
        gate = nn.silu(gate) if sizes.activation == "silu" else nn.gelu(gate, approximate=True)
        out = self.down_proj(gate * self.up_proj(hidden))
        rows += self.mlp_post_norm(out) if sizes.post_norms else out
        return rows.reshape(x.shape)


def _rows(x: jax.Array) -> jax.Array:
    # XLA's CPU backend takes twice as long for the gradient of a dense layer over four axes as for one over rows.
    return x.reshape(-1, x.shape[-1])


def _exact_dot_general(*arguments: Any, **options: Any) -> jax.Array:
    """A product that is accumulated, and left, in float32."""
    return jax.lax.dot_general(*arguments, **{**options, "preferred_element_type": jnp.float32})


class Decoder(nn.Module):
    architecture: Architecture
    lora: Lora = Lora()
    rematerialize: bool = False
    """Whether the backward pass computes each layer again instead of keeping what it needs of the forward pass."""

    def setup(self) -> None:
        sizes = self.architecture
        self.embedding = nn.Embed(
            sizes.vocabulary_size, sizes.width, embedding_init=nn.initializers.normal(sizes.width**-0.5)
        )
        block = nn.remat(Block, methods=["project", "finish"]) if self.rematerialize else Block
        self.layers = [block(sizes, layer, self.lora) for layer in sizes.layers]
        self.final_norm = Norm(sizes.norm_epsilon, sizes.norm_offset)
        if not sizes.tied_embeddings:
            self.head = nn.Dense(sizes.vocabulary_size, use_bias=False, dot_general=_exact_dot_general)

    def embed(self, tokens: jax.Array) -> jax.Array:
        embedded = self.embedding(tokens).astype(self.architecture.dtype)
        return embedded * jnp.asarray(self.architecture.embedding_scale, embedded.dtype)

    def read_prompts(self, prompts: Prompts) -> tuple[jax.Array, list[KeysValues]]:
        """Features [B, D] at each prompt's last real token, and a cache a layer."""
        positions = jnp.arange(prompts.tokens.shape[1])[None]
        x = self.embed(prompts.tokens)[:, None]
        masks = self._prompt_masks(prompts.lengths, positions, x.shape[2])
        cache = []
        for block, mask, by in zip(self.layers, masks, self._rotations(positions, x.shape[2]), strict=True):
            queries, shared = block.project(x, by)
            x = block.finish(x, queries, shared, mask, None, None)
            cache.append(shared)
        last = jnp.take_along_axis(x[:, 0], (prompts.lengths - 1)[:, None, None], axis=1)[:, 0]
        return self.final_norm(last), cache

    def read_responses(self, cache: list[KeysValues], prompt_lengths: jax.Array, tokens: jax.Array) -> jax.Array:
        """Features [B, N, T, D] at each token [B, N, T] of responses that follow the cached prompts."""
        index = jnp.arange(tokens.shape[-1])
        positions = prompt_lengths[:, None] + index[None]
        x = self.embed(tokens)
        prompt_masks = self._prompt_masks(prompt_lengths, positions, cache[0].keys.shape[2])
        rotations = self._rotations(positions, cache[0].keys.shape[2] + index.size)
        for block, shared, mask, by in zip(self.layers, cache, prompt_masks, rotations, strict=True):
            queries, own = block.project(x, by)
            x = block.finish(x, queries, shared, mask, own, visible(index, index, block.layer.window))
        return self.final_norm(x)

    def read_token(
        self,
        cache: list[KeysValues],
        response_cache: list[KeysValues],
        prompt_lengths: jax.Array,
        tokens: jax.Array,
        index: jax.Array,
    ) -> tuple[jax.Array, list[KeysValues]]:
        """Features [B, N, D] at one more token [B, N], the `index`-th of every response, and the caches with it."""
        x = self.embed(tokens)[:, :, None]
        kept = jnp.arange(response_cache[0].keys.shape[2])
        positions = (prompt_lengths + index)[:, None]
        prompt_masks = self._prompt_masks(prompt_lengths, positions, cache[0].keys.shape[2])
        rotations = self._rotations(positions, cache[0].keys.shape[2] + kept.size)
        updated = []
        for block, shared, past, mask, by in zip(
            self.layers, cache, response_cache, prompt_masks, rotations, strict=True
        ):
            queries, new = block.project(x, by)
            own = KeysValues(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, row, index, axis=2)
                    for old, row in zip(past, new, strict=True)
                )
            )
            x = block.finish(x, queries, shared, mask, own, visible(index[None], kept, block.layer.window))
            updated.append(own)
        return self.final_norm(x)[:, :, 0], updated

    def unembed(self, features: jax.Array) -> jax.Array:
        """Features [..., D] to logits [..., V], in float32: in bfloat16 a KL would be off by 5e-4 nats a token."""
        if self.architecture.tied_embeddings:
            table = self.embedding.embedding.astype(features.dtype)
            logits = _exact_dot_general(features, table, (((features.ndim - 1,), (1,)), ((), ())))
        else:
            logits = self.head(features)
        softcap = self.architecture.logits_softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def __call__(self, prompts: Prompts, responses: Responses) -> jax.Array:
        """Logits [B, N, T, V] of each response token; for initialisation and tests, the steps chunk the vocabulary."""
        return self.unembed(self.predict(prompts, responses))

    def predict(self, prompts: Prompts, responses: Responses) -> jax.Array:
        """Features [B, N, T, D] that predict each response token (`types.PolicyApply`)."""
        first, cache = self.read_prompts(prompts)
        first = jnp.broadcast_to(first[:, None, None], (*responses.tokens.shape[:2], 1, first.shape[-1]))
        rest = self.read_responses(cache, prompts.lengths, responses.tokens[..., :-1])
        return jnp.concatenate([first, rest], axis=2)

    def _prompt_masks(self, lengths: jax.Array, positions: jax.Array, size: int) -> list[jax.Array]:
        """A mask [B, T, P] a layer: which of a prompt's `size` places the tokens at positions [B, T] attend to."""
        index = jnp.arange(size)
        real = (index[None] < lengths[:, None])[:, None]
        # One for all layers of a window.
        masks = {
            window: real & visible(positions, index[None], window)
            for window in dict.fromkeys(layer.window for layer in self.architecture.layers)
        }
        return [masks[layer.window] for layer in self.architecture.layers]

    def _rotations(self, positions: jax.Array, size: int) -> list[Rotation]:
        """A rotation a layer of tokens at positions [B or 1, T] below size, the same for all responses to a prompt."""
        # One for all layers of a rope.
        rotations = {
            rotary: rotation(positions[:, None], rotary, size)
            for rotary in dict.fromkeys(layer.rotary for layer in self.architecture.layers)
        }
        return [rotations[layer.rotary] for layer in self.architecture.layers]


def policy(decoder: Decoder) -> Policy:
    """The decoder as the pure functions that the steps ask for."""

    def start(prompt_cache: Cache, num_samples: int, max_length: int) -> Cache:
        def empty(keys: jax.Array) -> jax.Array:
            batch, heads, _, dim = keys.shape
            # Made from the prompt's cache, so that under shard_map it varies over devices as that does.
            rows = batch * num_samples
            return jnp.broadcast_to(keys[:1, :, :1] * 0, (rows, heads, max_length, dim))

        return jax.tree.map(empty, prompt_cache)

    def method(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: Params, *args: Any) -> Any:
            return decoder.apply(params, *args, method=function)

        return call

    return Policy(
        apply=method(Decoder.predict),
        unembed=method(Decoder.unembed),
        prefill=method(Decoder.read_prompts),
        start=start,
        decode=method(Decoder.read_token),
    )
