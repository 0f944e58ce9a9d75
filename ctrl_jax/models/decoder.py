"""A decoder whose sequences are a prompt, read once, and the N responses that share it; an `Architecture` says which.

Positions are real: a response's first token follows its prompt's last real one, wherever the padding ends. Layers are
unrolled and each has its own cache, laid out [batch, head, position, dim]: on CPU that decodes several times faster
than the position-major layout, and about twice as fast as scanned layers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from ctrl_jax.models import attention
from ctrl_jax.models.architecture import Architecture, Layer
from ctrl_jax.models.attention import KeysValues, visible
from ctrl_jax.models.lora import Lora
from ctrl_jax.types import Cache, Params, Policy, Prompts, Responses


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
    fused_attention: bool

    def setup(self) -> None:
        sizes, shapes = self.architecture, self.architecture.shapes()

        def projection(name: str, scale: float = 1.0) -> Projection:
            init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
            shape = shapes[name]
            return Projection(shape.outputs, shape.bias, init, self.lora.alpha / max(1, self.lora.rank))

        def norm() -> Norm:
            return Norm(sizes.norm_epsilon, sizes.norm_offset)

        # The projections that write to the residual stream start smaller the deeper the model (Radford et al. 2019).
        residual = 1.0 / (2 * len(sizes.layers))
        self.attention_norm = norm()
        self.q_proj = projection("q_proj")
        self.k_proj = projection("k_proj")
        self.v_proj = projection("v_proj")
        self.o_proj = projection("o_proj", residual)
        self.mlp_norm = norm()
        self.gate_proj = projection("gate_proj")
        self.up_proj = projection("up_proj")
        self.down_proj = projection("down_proj", residual)
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
        """The layer's output [B, N, T, D] once its keys are known; masks as in `attention.attend`."""
        sizes = self.architecture
        scale, softcap = sizes.query_scale, sizes.attention_softcap
        if self.fused_attention and attention.fits_kernel(queries, softcap):
            mixed = attention.attend_fused(queries, shared, shared_mask, own, own_mask, scale=scale)
        else:
            mixed = attention.attend(queries, shared, shared_mask, own, own_mask, scale=scale, softcap=softcap)
        attended = self.o_proj(_rows(mixed))
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


@jax.custom_jvp
def exact_product(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """features [..., D] by kernel [D, V], accumulated and left in float32, whatever type they have.

    Its gradients are products in that type again. Without this rule those of a bfloat16 model would be in float32,
    half as fast on an accelerator.
    """
    return jnp.matmul(features, kernel, preferred_element_type=jnp.float32)


@functools.partial(exact_product.defjvp, symbolic_zeros=True)
def _exact_product_jvp(primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    features, kernel = primals
    of_features, of_kernel = tangents
    out = exact_product(features, kernel)
    tangent = jnp.zeros_like(out)
    if not isinstance(of_features, SymbolicZero):
        tangent += (of_features @ kernel).astype(jnp.float32)
    if not isinstance(of_kernel, SymbolicZero):
        tangent += (features @ of_kernel).astype(jnp.float32)
    return out, tangent


class Head(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        return exact_product(x, kernel.astype(x.dtype))


class Streams(NamedTuple):
    """The residual stream of every token that is read, between two layers."""

    prompts: jax.Array
    """[B, 1, P, D]."""
    responses: jax.Array
    """[B, N, T - 1, D]: nothing is predicted from the last token."""


ALL = slice(None)
"""Layers."""


class Decoder(nn.Module):
    architecture: Architecture
    lora: Lora = Lora()
    rematerialize: bool = False
    """Whether the backward pass computes each layer again instead of keeping what it needs of the forward pass."""
    fused_attention: bool = False
    """Whether the devices have cuDNN's kernel (`attention.has_kernel`), to be taken where it fits."""

    def setup(self) -> None:
        sizes = self.architecture
        self.embedding = nn.Embed(
            sizes.vocabulary_size, sizes.width, embedding_init=nn.initializers.normal(sizes.width**-0.5)
        )
        block = nn.remat(Block, methods=["project", "finish"]) if self.rematerialize else Block
        self.layers = [block(sizes, layer, self.lora, self.fused_attention) for layer in sizes.layers]
        self.final_norm = Norm(sizes.norm_epsilon, sizes.norm_offset)
        if not sizes.tied_embeddings:
            self.head = Head(sizes.vocabulary_size)

    def embed(self, tokens: jax.Array) -> jax.Array:
        embedded = self.embedding(tokens).astype(self.architecture.dtype)
        return embedded * jnp.asarray(self.architecture.embedding_scale, embedded.dtype)

    def read_prompts(self, prompts: Prompts) -> tuple[jax.Array, list[KeysValues]]:
        """Features [B, D] at each prompt's last real token, and a cache a layer."""
        x, cache = self._prompts_through(ALL, self.embed(prompts.tokens)[:, None], prompts.lengths)
        return self._predicting(x, prompts.lengths), cache

    def read_responses(self, cache: list[KeysValues], prompt_lengths: jax.Array, tokens: jax.Array) -> jax.Array:
        """Features [B, N, T, D] at each token [B, N, T] of responses that follow the cached prompts."""
        return self.final_norm(self._responses_through(ALL, self.embed(tokens), cache, prompt_lengths))

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
            logits = exact_product(features, table.T)
        else:
            logits = self.head(features)
        softcap = self.architecture.logits_softcap
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    def __call__(self, prompts: Prompts, responses: Responses) -> jax.Array:
        """Logits [B, N, T, V] of each response token; for initialisation and tests, the steps chunk the vocabulary."""
        return self.unembed(self.above(self.below(prompts, responses), prompts, responses))

    def below(self, prompts: Prompts, responses: Responses) -> Streams | tuple[()]:
        """What the layers below the first that is trained make of each token (`types.Below`)."""
        first = self.lora.first_layer(len(self.layers))
        if first == 0:
            return ()
        layers, embedded = slice(first), self._embedded(prompts, responses)
        of_prompts, cache = self._prompts_through(layers, embedded.prompts, prompts.lengths)
        return Streams(of_prompts, self._responses_through(layers, embedded.responses, cache, prompts.lengths))

    def above(self, trunk: Streams | tuple[()], prompts: Prompts, responses: Responses) -> jax.Array:
        """Features [B, N, T, D] that predict each response token (`types.Above`)."""
        layers = slice(self.lora.first_layer(len(self.layers)), None)
        read = trunk or self._embedded(prompts, responses)
        of_prompts, cache = self._prompts_through(layers, read.prompts, prompts.lengths)
        first = self._predicting(of_prompts, prompts.lengths)
        first = jnp.broadcast_to(first[:, None, None], (*responses.tokens.shape[:2], 1, first.shape[-1]))
        rest = self.final_norm(self._responses_through(layers, read.responses, cache, prompts.lengths))
        return jnp.concatenate([first, rest], axis=2)

    def _embedded(self, prompts: Prompts, responses: Responses) -> Streams:
        return Streams(self.embed(prompts.tokens)[:, None], self.embed(responses.tokens[..., :-1]))

    def _prompts_through(self, layers: slice, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, list[KeysValues]]:
        """The stream [B, 1, P, D] of prompts behind some layers, and a cache of each of them."""
        size = x.shape[2]
        positions = jnp.arange(size)[None]
        masks, rotations = self._prompt_masks(lengths, positions, size), self._rotations(positions, size)
        cache = []
        for block, mask, by in zip(self.layers[layers], masks[layers], rotations[layers], strict=True):
            queries, shared = block.project(x, by)
            x = block.finish(x, queries, shared, mask, None, None)
            cache.append(shared)
        return x, cache

    def _responses_through(
        self, layers: slice, x: jax.Array, cache: list[KeysValues], prompt_lengths: jax.Array
    ) -> jax.Array:
        """The stream [B, N, T, D] of responses behind some layers, of which the cache has the prompts."""
        index, size = jnp.arange(x.shape[2]), cache[0].keys.shape[2]
        positions = prompt_lengths[:, None] + index[None]
        masks = self._prompt_masks(prompt_lengths, positions, size)
        rotations = self._rotations(positions, size + index.size)
        for block, shared, mask, by in zip(self.layers[layers], cache, masks[layers], rotations[layers], strict=True):
            queries, own = block.project(x, by)
            x = block.finish(x, queries, shared, mask, own, visible(index, index, block.layer.window))
        return x

    def _predicting(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """Features [B, D] at the last real token of the prompts' stream [B, 1, P, D]."""
        return self.final_norm(jnp.take_along_axis(x[:, 0], (lengths - 1)[:, None, None], axis=1)[:, 0])

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
        below=method(Decoder.below),
        above=method(Decoder.above),
        unembed=method(Decoder.unembed),
        prefill=method(Decoder.read_prompts),
        start=start,
        decode=method(Decoder.read_token),
    )
