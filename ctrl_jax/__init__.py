"""ctrl_jax: train a language model for how it will be decoded (InfAlign-CTRL) in JAX.

`import ctrl_jax as cj` gives the names below. Each is imported when it is first used, so that importing the package
costs nothing and touches no device. docs/library.md shows them at work.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrl_jax.errors import InputError
    from ctrl_jax.library.align import Aligned, Constraint, align
    from ctrl_jax.library.model import Model, generate, load_model
    from ctrl_jax.library.ranks import (
        Interval,
        calibrate,
        difference,
        interval,
        judged_win_rate,
        score,
        win_rate,
    )
    from ctrl_jax.library.rewards import combined_reward
    from ctrl_jax.library.theory import (
        best_of,
        best_of_poisson,
        ideal_policy,
        mixture,
        procedure,
        sampling,
        soft_best_of,
        transform,
        worst_of,
    )
    from ctrl_jax.report.choice import Choice, choose_n
    from ctrl_jax.report.judgement import Judgement, judge
    from ctrl_jax.steps.kl import exact as exact_kl
    from ctrl_jax.steps.kl import k1, k2, k3
    from ctrl_jax.steps.kl import per_sequence as kl_per_response
    from ctrl_jax.steps.policy_gradient import exact_kl_loss, leave_one_out, sampled_kl_loss
    from ctrl_jax.theory.objective import Objective, optimal, raw
    from ctrl_jax.theory.optimal import optimal_transform
    from ctrl_jax.theory.procedures import Procedure
    from ctrl_jax.theory.transforms import exponential, identity, logarithm, logit, named, normalized, tabulated

__version__ = "0.2.0"

__all__ = [  # noqa: RUF022 (in the order of docs/library.md)
    "InputError",
    "__version__",
    # Arrays from any sampler.
    "Choice",
    "Interval",
    "Judgement",
    "calibrate",
    "choose_n",
    "difference",
    "interval",
    "judge",
    "judged_win_rate",
    "win_rate",
    # What a policy is trained for, and what theory allows.
    "Objective",
    "exponential",
    "identity",
    "logarithm",
    "logit",
    "named",
    "normalized",
    "optimal",
    "raw",
    "tabulated",
    "transform",
    "Procedure",
    "best_of",
    "best_of_poisson",
    "mixture",
    "procedure",
    "sampling",
    "soft_best_of",
    "worst_of",
    "ideal_policy",
    "optimal_transform",
    # Language models.
    "Aligned",
    "Constraint",
    "Model",
    "align",
    "combined_reward",
    "generate",
    "load_model",
    # Parts of a loop of your own, for jax.jit.
    "exact_kl",
    "exact_kl_loss",
    "k1",
    "k2",
    "k3",
    "kl_per_response",
    "leave_one_out",
    "sampled_kl_loss",
    "score",
]

_MODULES = {
    "errors": ("InputError",),
    "library.align": ("Aligned", "Constraint", "align"),
    "library.model": ("Model", "generate", "load_model"),
    "library.ranks": ("Interval", "calibrate", "difference", "interval", "judged_win_rate", "score", "win_rate"),
    "library.rewards": ("combined_reward",),
    "library.theory": (
        *("best_of", "best_of_poisson", "ideal_policy", "mixture", "procedure", "sampling", "soft_best_of"),
        *("transform", "worst_of"),
    ),
    "report.choice": ("Choice", "choose_n"),
    "report.judgement": ("Judgement", "judge"),
    "steps.kl": ("exact as exact_kl", "k1", "k2", "k3", "per_sequence as kl_per_response"),
    "steps.policy_gradient": ("exact_kl_loss", "leave_one_out", "sampled_kl_loss"),
    "theory.objective": ("Objective", "optimal", "raw"),
    "theory.optimal": ("optimal_transform",),
    "theory.procedures": ("Procedure",),
    "theory.transforms": ("exponential", "identity", "logarithm", "logit", "named", "normalized", "tabulated"),
}
"""The imports above once more, for run time; tests/test_library.py compares the two, and both with `__all__`."""

_PLACES = {
    name.rpartition(" as ")[2]: (module, name.partition(" as ")[0])
    for module, names in _MODULES.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
