"""What a decoder computes, as one value: the model families that can be read differ in these fields alone."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Matrix(NamedTuple):
    """One of the matrices of a layer, whose axes have the model's names."""

    name: str
    block: Literal["self_attn", "mlp"]
    """The part of a layer that Hugging Face's names have it in."""
    inputs: str
    outputs: str
    bias: Literal["qkv_bias", "output_bias", "mlp_bias"]
    """The field of an architecture that says whether it has a bias."""


MATRICES = (
    Matrix("q_proj", "self_attn", "width", "heads", "qkv_bias"),
    Matrix("k_proj", "self_attn", "width", "kv_heads", "qkv_bias"),
    Matrix("v_proj", "self_attn", "width", "kv_heads", "qkv_bias"),
    Matrix("o_proj", "self_attn", "heads", "width", "output_bias"),
    Matrix("gate_proj", "mlp", "width", "mlp", "mlp_bias"),
    Matrix("up_proj", "mlp", "width", "mlp", "mlp_bias"),
    Matrix("down_proj", "mlp", "mlp", "width", "mlp_bias"),
)
"""Every matrix of a layer, in the order in which they are applied."""


class Shape(NamedTuple):
    """The size of a matrix in a certain architecture."""

    inputs: int
    outputs: int
    bias: bool


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

    def shapes(self) -> dict[str, Shape]:
        """The size of each of `MATRICES`, by name."""
        sizes = {
            "width": self.width,
            "heads": self.heads * self.head_dim,
            "kv_heads": self.kv_heads * self.head_dim,
            "mlp": self.mlp_width,
        }
        return {one.name: Shape(sizes[one.inputs], sizes[one.outputs], getattr(self, one.bias)) for one in MATRICES}


def from_scratch(
    *,
    vocabulary_size: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    mlp_width: int,
    tied_embeddings: bool = True,
    rope_theta: float = 10_000.0,
    norm_epsilon: float = 1e-5,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Architecture:
    """The decoder that is trained from random weights."""
    head_dim = width // heads
    return Architecture(
        vocabulary_size=vocabulary_size,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=mlp_width,
        layers=(Layer(None, rotary_frequencies(head_dim, rope_theta)),) * layers,
        tied_embeddings=tied_embeddings,
        # Unit variance into the first norm, though the tied table is small enough to give logits of order one.
        embedding_scale=width**0.5,
        query_scale=head_dim**-0.5,
        norm_epsilon=norm_epsilon,
        dtype=dtype,
    )


def rotary_frequencies(head_dim: int, theta: float) -> tuple[float, ...]:
    """θ^(−2i / d) for i < d/2: rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""
    return tuple(theta ** (-2 * i / head_dim) for i in range(head_dim // 2))
