"""The bytes that a device holds, by what they are."""

from dataclasses import replace

from ctrl_jax.models import costs
from ctrl_jax.models.costs import Batch
from ctrl_jax.planning.sizes import Sizes

Memory = dict[str, float]
"""Bytes of one device, by what they hold."""


SUPERVISED_MOMENTS, POLICY_MOMENTS = 2, 1
"""Copies of what is trained that the optimisers keep: AdamW's two, and RMSProp's one."""


def held(found: Sizes) -> Memory:
    """What lives on each device from the start of the policy's training to its end."""
    held = {
        "reference": float(costs.itemsize(found.policy) * costs.parameters(found.policy)),
        "policy, float32": float(costs.FLOAT32 * found.trained),
        "moments": float(POLICY_MOMENTS * costs.FLOAT32 * found.trained),
    }
    return held if found.reward is None else {**held, "reward model": float(found.reward_bytes)}


def of_responses(found: Sizes, *, trained: bool) -> Memory:
    """What lives on each device while responses are drawn and scored: before the policy is trained, or after.

    Afterwards without its moments, and with a judge that is a network.
    """
    left_out = {"moments"} if trained else {"moments", "policy, float32"}
    kept = {what: size for what, size in held(found).items() if what not in left_out}
    return {**kept, "judge": float(found.judge_bytes)} if trained and found.judge else kept


def trained(found: Sizes) -> float:
    """Bytes of a second copy of what is trained, with its moments: the first is kept until all updates are sound."""
    return float((1 + POLICY_MOMENTS) * costs.FLOAT32 * found.trained)


def critic(found: Sizes, batch: Batch) -> float:
    """Bytes of a critic (steps/critic.py): the prefixes of a device's whole batch twice, and six matrices [D, D]."""
    width = found.policy.width
    prefixes = batch.prompts * batch.samples * batch.response_length * width
    return float(costs.FLOAT32 * (2 * prefixes + 6 * width**2))


def cast(found: Sizes) -> Memory:
    """Weights that are trained are float32, and computed with in the model's own type."""
    if found.lora.rank or costs.itemsize(found.policy) == costs.FLOAT32:
        return {}
    return {"weights as bfloat16": float(costs.itemsize(found.policy) * costs.parameters(found.policy))}


def chunk(found: Sizes, tokens: int) -> int:
    return min(tokens, costs.chunk_size(found.policy.vocabulary_size, found.device_memory))


def micro_batches(given: int | None, found: Sizes, batch: Batch, rematerialize: bool) -> int:
    """The micro-batches of a device's prompts."""
    memory, (_, above) = found.device_memory, costs.split(found.policy, found.lora)
    return given or costs.default_micro_batches(above, batch, rematerialize=rematerialize, memory=memory)


def update(found: Sizes, batch: Batch, slices: int, rematerialize: bool, *, length: int, networks: int) -> Memory:
    """`networks` of which there are logits: policy and reference, or one, or none."""
    part = replace(batch, prompts=batch.prompts // slices)
    policy, tokens = found.policy, part.responses * part.response_length
    below, above = costs.split(policy, found.lora)
    kept = costs.kept_activations(above, part, length=length, rematerialize=rematerialize)
    kept += networks * costs.itemsize(policy) * policy.width * tokens
    # Of several slices the sum of their gradients is held too.
    copies = 2 if slices == 1 else 3
    memory = {
        "gradients and updates": float(copies * costs.FLOAT32 * found.trained),
        # The layers below are read first, and keep nothing.
        "activations": max(kept, costs.working_set(below, part, length=length)) if below.layers else kept,
        **cast(found),
    }
    if networks:
        memory["logits"] = float(costs.logits(policy, chunk(found, tokens), copies=costs.LOSS_COPIES))
    return memory
