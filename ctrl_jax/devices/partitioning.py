"""How each parameter is sharded on a mesh: the one table from a parameter's name to the axes that it is split over.

A parameter's axes have names of the model's (`width`, `heads`, ...), and those are split over the mesh's: `fsdp` takes
the width, so that it costs memory alone on a device, and `model` what attention heads, hidden units or tokens of the
vocabulary can do apart from each other. The table covers all trees of a decoder's parameters: a reward model's, an
adapter's, a gradient's, and an optimiser's moments.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ctrl_jax.errors import InputError
from ctrl_jax.models.architecture import MATRICES

AXES = {"width": "fsdp", "heads": "model", "kv_heads": "model", "mlp": "model", "vocabulary": "model"}
"""What each axis of a parameter is split over."""

_KERNELS = {
    **{matrix.name: (matrix.inputs, matrix.outputs) for matrix in MATRICES},
    # Of a decoder, or of a reward model, which has one column: an axis of size 1 is not split.
    "head": ("width", "vocabulary"),
}
_NORMS = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm", "final_norm", "q_norm", "k_norm")

RULES: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("embedding", "embedding"): ("vocabulary", "width"),
    # Of an ensemble of reward models: a column a member.
    ("heads", "kernel"): ("width", None),
    ("heads", "bias"): (None,),
    **{(name, "kernel"): axes for name, axes in _KERNELS.items()},
    # Vectors over the width are as small as they are many: whole on each device.
    **{(name, "bias"): (None if out == "width" else out,) for name, (_, out) in _KERNELS.items()},
    **{(name, "scale"): (None,) for name in _NORMS},
    # The rank is no axis to split; the other axis is sharded as the kernel's is.
    **{(name, "a"): (into, None) for name, (into, _) in _KERNELS.items()},
    **{(name, "b"): (None, out) for name, (_, out) in _KERNELS.items()},
}
"""(module, parameter), the last two names of its path, to the name of each of its axes; None is not split."""


def spec(mesh: Mesh, path: tuple[str, ...], shape: tuple[int, ...]) -> P:
    """What the parameter at `path`, such as ("layers_0", "q_proj", "kernel"), is split over; axes of size 1 left out.

    Raises:
      InputError: if no rule of the table fits it, or one of its axes does not divide.
    """
    axes = RULES.get(path[-2:]) if len(path) > 1 else None
    name = ".".join(path)
    if axes is None or len(axes) != len(shape):
        raise InputError(
            f"No rule says how the parameter {name} of shape {list(shape)} is sharded on a mesh.",
            field=name,
            value=shape,
            remedy=f"Add one for {path[-2:]} to RULES in {__file__}.",
        )
    entries: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        over = None if axis is None or size == 1 else AXES[axis]
        parts = 1 if over is None else mesh.shape[over]
        if size % parts:
            option = "fsdp" if over == "fsdp" else "model_parallel"
            fitting = [count for count in range(1, parts) if size % count == 0 and mesh.size % count == 0]
            raise InputError(
                f"The parameter {name} has the shape {list(shape)}, and its axis {axis} of {size} does not divide by "
                f"the {parts} devices of the mesh's axis {over}.",
                field=option,
                value=parts,
                remedy=f"Make `{option}` a divisor of {size}, such as {fitting[-1]}.",
            )
        entries.append(over if parts > 1 else None)
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def sharding(mesh: Mesh, path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
    """As `spec`, for `weights.load(place=...)`."""
    return NamedSharding(mesh, spec(mesh, path, shape))


def specs(mesh: Mesh, tree: Any) -> Any:
    """The `spec` of each array of a tree that has parameters in it, such as an optimiser's state.

    What is in no dict is no parameter, and whole on each device: counts, and the controller's memory.

    Raises:
      InputError: as `spec`.
    """

    def of(path: tuple[Any, ...], array: Any) -> P:
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        return spec(mesh, names, array.shape) if names else P()

    return jax.tree.map_with_path(of, tree)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The `specs` of a tree as shardings, to place it by."""
    return jax.tree.map(lambda found: NamedSharding(mesh, found), specs(mesh, tree))
