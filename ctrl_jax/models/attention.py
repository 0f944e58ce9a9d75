"""Attention of the N responses that share a prompt to that prompt and each to itself, in two forms that agree."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh


class KeysValues(NamedTuple):
    """One layer's cache: [B, kv heads, P, d] of the prompts, or [B * N, kv heads, T, d] of the responses.

    One axis for all responses, as the products read them: of [B, N, ...] XLA's CPU backend copies the whole cache for
    every token."""

    keys: jax.Array
    values: jax.Array


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


def has_kernel(mesh: Mesh) -> bool:
    """Whether a program on the mesh's devices can take cuDNN's kernel, which is for NVIDIA's GPUs since Ampere."""
    device = mesh.devices.flat[0]
    # jax 0.10 has no gradient of it under shard_map, which several devices have.
    differentiable = jax.__version_info__ >= (0, 11) or mesh.size == 1
    return differentiable and device.device_kind.startswith("NVIDIA") and float(device.compute_capability) >= 8


def fits_kernel(queries: jax.Array, softcap: float | None) -> bool:
    """Whether cuDNN's kernel can, and should, be taken for queries [B, N, T, H, d], where there is one.

    It is for bfloat16, with heads of up to 128 that are a multiple of 8, and knows no softcap. One token at a time
    reads its prompt's one copy faster by `attend`.
    """
    fits = queries.dtype == jnp.bfloat16 and queries.shape[-1] % 8 == 0 and queries.shape[-1] <= 128
    return fits and softcap is None and queries.shape[2] > 1


def attend_fused(
    queries: jax.Array,
    shared: KeysValues,
    shared_mask: jax.Array,
    own: KeysValues | None,
    own_mask: jax.Array | None,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attend` by `jax.nn.dot_product_attention`: flash attention (Dao et al. 2022, arXiv 2205.14135) on a GPU.

    No scores [T, P + T] are written down, forward or backward; the shared keys and values are copied to each response.
    The arguments are those of `attend`; `xla` runs anywhere, for tests.
    """
    batch, samples, length, heads, dim = queries.shape

    def of_rows(shared: jax.Array, own: jax.Array | None) -> jax.Array:
        """[B * N, S, kv heads, d]: a response's own after its prompt's."""
        copied = jnp.repeat(shared, samples, axis=0)
        return (copied if own is None else jnp.concatenate([copied, own], axis=2)).swapaxes(1, 2)

    keys = of_rows(shared.keys, None if own is None else own.keys)
    values = of_rows(shared.values, None if own is None else own.values)
    mask = jnp.repeat(shared_mask, samples, axis=0)
    if own_mask is not None:
        mask = jnp.concatenate([mask, jnp.broadcast_to(own_mask, (batch * samples, *own_mask.shape))], axis=2)
    queries = queries.reshape(batch * samples, length, heads, dim)
    # The kernel's gradient wants even lengths.
    queries, (keys, values) = _padded(queries), map(_padded, (keys, values))
    mask = jnp.pad(mask, [(0, 0), (0, queries.shape[1] - length), (0, keys.shape[1] - mask.shape[2])])
    out = jax.nn.dot_product_attention(
        queries, keys, values, mask=mask[:, None], scale=scale, implementation=implementation
    )
    return out[:, :length].reshape(batch, samples, length, heads * dim)


def _padded(x: jax.Array) -> jax.Array:
    """[R, S, ...] with S made a multiple of 8."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % 8), *[(0, 0)] * (x.ndim - 2)])
