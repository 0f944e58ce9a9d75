"""The page of `make sample`."""

from collections.abc import Sequence

from ctrl_jax.report import html


def render(
    experiment: str,
    *,
    sides: Sequence[str],
    trained_for: tuple[str, str] | None,
    prompt: str,
    num_samples: int,
    procedure: str,
    temperature: float = 1.0,
    top_p: float = 1.0,
    examples: Sequence[str] = (),
) -> str:
    """The page of `make sample`, as HTML: a form, and the script that shows what is answered.

    `trained_for` is the policy's procedure and transform, or None for a model without rewards; `examples` are prompts
    that a button offers one after the other.
    """
    return html.render(
        "sample.html",
        title=f"{experiment}: sample",
        experiment=experiment,
        sides=sides,
        trained_for=trained_for,
        prompt=prompt,
        num_samples=num_samples,
        procedure=procedure,
        temperature=temperature,
        top_p=top_p,
        examples=[html.visible(example) for example in examples],
        procedures=["sampling", "best_of_2", "best_of_4", "worst_of_4", "soft_best_of_4(0.1)"],
    )  # fmt: skip
