"""What a decoder's work costs one device, from shapes alone: FLOPs, bytes moved and memory, by phase.

FLOPs are those of matrix products, two for each multiply-add, as the programs compute them: padding, masked places of
the attention and the whole allocated cache are counted. Bytes are what goes to and from the device's memory if every
product, norm and softmax reads its operands there and writes its result: fused attention moves fewer.
"""

from dataclasses import dataclass, replace

from ctrl_jax.models.architecture import Architecture
from ctrl_jax.models.lora import Lora

FLOAT32 = 4
# A value that a layer makes is written once, and read by the one or two that follow.
PASSES = 3
# Attention scores: written, read and written by the exponential, read by the mix with the values.
SCORE_PASSES = 4
# Logits of a token: written, read for the maximum, read and written by the softmax, read to draw or to select.
LOGIT_PASSES = 5
# Float32 copies of a chunk's logits that live at once, where they are drawn from, and where a loss has a gradient.
DRAWN_COPIES = 3
LOSS_COPIES = 6


@dataclass(frozen=True)
class Work:
    """What one device does."""

    flops: float = 0.0
    moved: float = 0.0
    """Bytes to and from its memory."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved + other.moved)

    def __mul__(self, times: float) -> "Work":
        return Work(times * self.flops, times * self.moved)


@dataclass(frozen=True)
class Batch:
    """One device's share of a batch."""

    prompts: int
    """B."""
    samples: int
    """N."""
    prompt_length: int
    """P, padding included."""
    response_length: int
    """T; every response is taken to have it."""

    @property
    def responses(self) -> int:
        return self.prompts * self.samples

    @property
    def prompt_tokens(self) -> int:
        return self.prompts * self.prompt_length

    def tokens(self, length: int) -> int:
        """Tokens read where the prompts are read once, and `length` tokens of every response."""
        return self.prompt_tokens + self.responses * length

    def pairs(self, length: int) -> int:
        """Pairs of a query and a key in one head of one layer, where that is read."""
        prompt_length = self.prompt_length
        return self.prompt_tokens * prompt_length + self.responses * length * (prompt_length + length)


def itemsize(sizes: Architecture) -> int:
    """Bytes of an activation, and of a weight that is not trained."""
    return 2 if sizes.dtype == "bfloat16" else FLOAT32


def parameters(sizes: Architecture) -> int:
    """Of the decoder, without an adapter."""
    layer = sum(rows * columns + bias * columns for rows, columns, bias in sizes.shapes().values())
    layer += (4 if sizes.post_norms else 2) * sizes.width + 2 * sizes.query_key_norm * sizes.head_dim
    tables = 1 if sizes.tied_embeddings else 2
    return len(sizes.layers) * layer + sizes.width + tables * sizes.vocabulary_size * sizes.width


def split(sizes: Architecture, lora: Lora) -> tuple[Architecture, Architecture]:
    """(the layers below the first that is trained, that one and all above it): what `Policy.below` and `above` read."""
    first = lora.first_layer(len(sizes.layers))
    return replace(sizes, layers=sizes.layers[:first]), replace(sizes, layers=sizes.layers[first:])


def adapter_parameters(sizes: Architecture, lora: Lora) -> int:
    """Of the low-rank adapters; 0 at rank 0."""
    shapes, (_, above) = sizes.shapes(), split(sizes, lora)
    ends = sum(shapes[target].inputs + shapes[target].outputs for target in lora.targets)
    return len(above.layers) * lora.rank * ends


def _dense(sizes: Architecture) -> int:
    """FLOPs a token in the layers' matrices."""
    return 2 * len(sizes.layers) * sum(rows * columns for rows, columns, _ in sizes.shapes().values())


def _attention(sizes: Architecture, pairs: float) -> float:
    """FLOPs of the scores and of the mix of the values, for pairs of a query and a key."""
    return 4 * len(sizes.layers) * sizes.heads * sizes.head_dim * pairs


def _weights(sizes: Architecture) -> int:
    """Bytes of the layers, read once; the embedding is not: only its rows that are asked for are."""
    tables = (1 if sizes.tied_embeddings else 2) * sizes.vocabulary_size * sizes.width
    return itemsize(sizes) * (parameters(sizes) - tables)


def _made(sizes: Architecture) -> int:
    """Values that a layer makes of one token, besides the attention scores.

    Two norms; queries, keys and values, before and after the rotation; what attention and MLP add to the residual
    stream, and the stream with it; gate, its activation, up, and their product.
    """
    heads = 2 * sizes.heads + 3 * sizes.kv_heads
    return (8 if sizes.post_norms else 6) * sizes.width + (heads + sizes.heads) * sizes.head_dim + 4 * sizes.mlp_width


def _traffic(sizes: Architecture, tokens: float, pairs: float) -> float:
    """Bytes of a forward pass but the weights."""
    made = PASSES * itemsize(sizes) * _made(sizes) * tokens
    return len(sizes.layers) * (made + SCORE_PASSES * FLOAT32 * sizes.heads * pairs)


def forward(sizes: Architecture, lora: Lora, batch: Batch, *, length: int) -> Work:
    """The layers, where the prompts are read once, and `length` tokens of every response."""
    tokens, pairs = batch.tokens(length), batch.pairs(length)
    flops = (_dense(sizes) + 2 * adapter_parameters(sizes, lora)) * tokens + _attention(sizes, pairs)
    return Work(flops, _weights(sizes) + _traffic(sizes, tokens, pairs))


def backward(sizes: Architecture, lora: Lora, batch: Batch, *, length: int) -> Work:
    """The gradient of `forward`: by the activations, and by the weights where they are trained and not an adapter.

    It ends at the first layer that is trained.
    """
    tokens, pairs, (_, above) = batch.tokens(length), batch.pairs(length), split(sizes, lora)
    times = 2 if lora.rank == 0 else 1
    flops = (times * _dense(above) + 4 * adapter_parameters(above, lora)) * tokens + 2 * _attention(above, pairs)
    return Work(flops, times * _weights(above) + 2 * _traffic(above, tokens, pairs))


def unembed(sizes: Architecture, tokens: int, *, chunks: int = 1) -> Work:
    """Logits of `tokens` and their softmax; the table is read once a chunk."""
    table = itemsize(sizes) * sizes.vocabulary_size * sizes.width
    logits = LOGIT_PASSES * FLOAT32 * sizes.vocabulary_size * tokens
    features = itemsize(sizes) * sizes.width * tokens
    return Work(2.0 * sizes.width * sizes.vocabulary_size * tokens, chunks * table + features + logits)


def prefill(sizes: Architecture, lora: Lora, batch: Batch) -> Work:
    """Reads the prompts, and draws every response's first token."""
    return forward(sizes, lora, batch, length=0) + unembed(sizes, batch.responses)


def decode(sizes: Architecture, lora: Lora, batch: Batch) -> Work:
    """Draws the other T − 1 tokens of every response. The prompts' caches are read once for their N responses."""
    rows = batch.responses
    pairs = rows * (batch.prompt_length + batch.response_length)
    flops = (_dense(sizes) + 2 * adapter_parameters(sizes, lora)) * rows + _attention(sizes, pairs)
    adapters = FLOAT32 * adapter_parameters(sizes, lora)
    moved = _weights(sizes) + adapters + prompt_cache(sizes, batch) + response_cache(sizes, batch)
    token = Work(flops, moved + _traffic(sizes, rows, pairs)) + unembed(sizes, rows)
    return token * (batch.response_length - 1)


def optimizer(trained: int, *, moments: int) -> Work:
    """Adam (two moments) or RMSProp (one), of float32 values: parameter and moments are read and written; the gradient
    is read for its norm, clipped, and read again."""
    return Work(0.0, FLOAT32 * (2 * (1 + moments) + 4) * trained)


def _cache(sizes: Architecture, tokens: int) -> int:
    return 2 * len(sizes.layers) * sizes.kv_heads * sizes.head_dim * itemsize(sizes) * tokens


def prompt_cache(sizes: Architecture, batch: Batch) -> int:
    """Bytes of the keys and values of the prompts, one copy for all N responses."""
    return _cache(sizes, batch.prompt_tokens)


def response_cache(sizes: Architecture, batch: Batch) -> int:
    """Bytes of the keys and values of the responses, at their full length."""
    return _cache(sizes, batch.responses * batch.response_length)


def kept_activations(sizes: Architecture, batch: Batch, *, length: int, rematerialize: bool) -> float:
    """Bytes of what a forward pass leaves for its backward pass, and of the gradients of the layer that this is at.

    Kept of a token in a layer: the inputs of the norms and of the matrices; queries, keys and values; gate, its
    activation and up; float32 attention weights, and the mix before it is divided. Recomputed, only the input of each
    half of a layer is, with queries, keys and values, and all that for one layer at a time.
    """
    tokens, pairs, size = batch.tokens(length), batch.pairs(length), itemsize(sizes)
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    stream = 2 * FLOAT32 * sizes.width + size * (4 if sizes.post_norms else 2) * sizes.width
    attention = size * (2 * queries + 2 * keys) + FLOAT32 * queries
    layer = (stream + attention + size * 4 * sizes.mlp_width) * tokens + FLOAT32 * sizes.heads * pairs
    if not rematerialize:
        return (len(sizes.layers) + 1) * layer
    halves = size * (sizes.width + queries + 2 * keys) * tokens
    return len(sizes.layers) * halves + 2 * layer


def working_set(sizes: Architecture, batch: Batch, *, length: int) -> float:
    """Bytes of a forward pass that keeps nothing: the prompts' caches and the largest half of a layer."""
    tokens, size = batch.tokens(length), itemsize(sizes)
    attention = 4 * size * (sizes.heads + sizes.kv_heads) * sizes.head_dim * tokens
    attention += 2 * FLOAT32 * sizes.heads * batch.pairs(length)
    mlp = size * (3 * sizes.mlp_width + 2 * sizes.width) * tokens
    return prompt_cache(sizes, batch) + size * sizes.width * tokens + max(attention, mlp)


def logits(sizes: Architecture, tokens: int, *, copies: int) -> int:
    """Bytes of float32 logits that live at once."""
    return FLOAT32 * sizes.vocabulary_size * tokens * copies


def default_micro_batches(sizes: Architecture, batch: Batch, *, rematerialize: bool, memory: float | None) -> int:
    """Into how many slices a device's prompts are cut where the experiment does not say: as few as keep a slice's
    activations under a sixteenth of an accelerator's memory, in bytes, or under 64 MiB on a CPU (None).

    On CPU small slices are fast too: what the backward pass reads is near. Accelerators want large ones.
    """
    most = 2**26 if memory is None else memory / 16

    def fits(count: int) -> bool:
        part = replace(batch, prompts=batch.prompts // count)
        kept = kept_activations(sizes, part, length=batch.response_length, rematerialize=rematerialize)
        return kept <= most

    counts = [count for count in range(1, batch.prompts + 1) if batch.prompts % count == 0]
    return next((count for count in counts if fits(count)), counts[-1])


def chunk_size(vocabulary_size: int, memory: float | None) -> int:
    """Tokens whose logits exist at a time, for any vocabulary: 32 MiB of float32 on a CPU (None), or a 64th of an
    accelerator's memory, in bytes; of these `compare` has four.

    The gradient of the output projection is read and written for every chunk.
    """
    most = 2**25 if memory is None else memory / 64
    return max(1, min(4096, int(most / 4 / vocabulary_size)))
