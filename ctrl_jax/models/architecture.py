"""What a decoder computes, as one value: the model families that can be read differ in these fields alone."""

from dataclasses import dataclass
from typing import Literal

from ctrl_jax import config


@dataclass(frozen=True)
class Layer:
    """What may differ between the layers of one model."""

    window: int | None
    """Tokens that a token attends to, itself included; None is all before it."""
    rotary: tuple[float, ...]
    """[head_dim / 2] radians a position, one for each pair of the rotated halves; a scaled rope is scaled here."""


@dataclass(frozen=True)
class Architecture:
    vocabulary_size: int
    """Rows of the embedding, which may be more than the tokenizer has pieces."""
    width: int
    heads: int
    kv_heads: int
    """Heads of keys and values; each serves heads / kv_heads query heads."""
    head_dim: int
    mlp_width: int
    layers: tuple[Layer, ...]
    tied_embeddings: bool
    """Whether the token embedding is also the output projection."""
    embedding_scale: float
    """Factor on a token's embedding."""
    query_scale: float
    """Factor on the dot products of queries and keys."""
    norm_epsilon: float
    norm_offset: float = 0.0
    """RMSNorm multiplies by offset + scale: 1 in Gemma."""
    post_norms: bool = False
    """Whether attention and MLP are normalised again before they join the residual stream (Gemma 2, 3)."""
    query_key_norm: bool = False
    """Whether each head's queries and keys are normalised before the rotation (Qwen3, Gemma 3)."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    attention_softcap: float | None = None
    """s becomes c · tanh(s / c) for the attention scores (Gemma 2)."""
    logits_softcap: float | None = None
    """The same for the logits."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations, and of weights that are not trained; norms and softmax are computed in float32."""


def from_config(model: config.Model, vocabulary_size: int) -> Architecture:
    """The decoder that is trained from scratch."""
    head_dim = model.width // model.heads
    return Architecture(
        vocabulary_size=vocabulary_size,
        width=model.width,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=head_dim,
        mlp_width=model.mlp_width,
        layers=(Layer(None, rotary_frequencies(head_dim, model.rope_theta)),) * model.layers,
        tied_embeddings=model.tied_embeddings,
        # Unit variance into the first norm, though the tied table is small enough to give logits of order one.
        embedding_scale=model.width**0.5,
        query_scale=head_dim**-0.5,
        norm_epsilon=model.norm_epsilon,
        dtype=model.dtype,
    )


def rotary_frequencies(head_dim: int, theta: float) -> tuple[float, ...]:
    """θ^(−2i / d) for i < d/2: rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""
    return tuple(theta ** (-2 * i / head_dim) for i in range(head_dim // 2))
