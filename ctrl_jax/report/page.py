"""The report's pages: numbers into words, words and figures into one self-contained HTML file.

Nothing is fetched: style and figures stand in the page. All text that comes from data or models is escaped.
"""

import math
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from ctrl_jax.report import figures
from ctrl_jax.report.measurements import Estimate, Run, lift_share

SAMPLES_SHOWN = 20
SAMPLES_CHARACTERS = 400_000
"""Of all texts together, so that the page stays light; the rest is in samples.jsonl."""
TEXT_CHARACTERS = 4_000


def run_page(run: Run) -> str:
    """The report of one run, as HTML."""
    return _environment().get_template("run.html").render(
        title=f"{run.name}: report",
        palette=figures.PALETTE,
        fonts=figures.FONTS,
        run=run,
        kicker=_kicker(run),
        lead=_lead(run),
        tiles=list(_tiles(run)),
        sections={
            "frontier": _section(
                "result", "What training bought", [*figures.frontier(run), *figures.calibration(run)]
            ),
            "win_rate_vs_n": _section("win-rate-vs-n", "Win rate over N", figures.win_rate_vs_n(run)),
            "training": _section("training", "Training", figures.training(run)),
            "reliability": _section("reliability", "Reward model", figures.reliability(run)),
            "proxy_gold": _section("proxy-gold", "Proxy against gold", figures.proxy_gold(run)),
        },
        samples=_samples(run.samples),
        win_rates=[_win_rate_row(run, name) for name in sorted(run.evaluation.win_rates, key=figures.procedure_order)],
        configuration=list(_flat(run.config)),
        timings=[*((name, _duration(seconds)) for name, seconds in run.evaluation.timings.items()),
                 *([("all", _duration(sum(run.evaluation.timings.values())))] if run.evaluation.timings else [])],
    )  # fmt: skip


def sweep_page(name: str, points: Sequence[figures.Point], notes: Sequence[str] = ()) -> str:
    """The report of a sweep, as HTML: the Pareto figure of each procedure in it, and all runs with their states."""
    order = list(dict.fromkeys(point.procedure for point in points))
    panels = [panel for procedure in order for panel in figures.pareto(_of(points, procedure), procedure)]
    done = sum(point.evaluation is not None for point in points)
    return _environment().get_template("sweep.html").render(
        title=f"{name}: sweep",
        palette=figures.PALETTE,
        fonts=figures.FONTS,
        name=name,
        lead=f"{done} of {len(points)} runs evaluated.",
        charts=_charts("pareto", panels),
        rows=[_sweep_row(point) for point in points],
        notes=notes,
    )  # fmt: skip


def sample_page(
    experiment: str,
    *,
    sides: Sequence[str],
    trained_for: tuple[str, str] | None,
    prompt: str,
    num_samples: int,
    procedure: str,
) -> str:
    """The page of `make sample`, as HTML: a form, and the script that shows what is answered.

    `trained_for` is the policy's procedure and transform, or None for a model without rewards.
    """
    return _environment().get_template("sample.html").render(
        title=f"{experiment}: sample",
        palette=figures.PALETTE,
        fonts=figures.FONTS,
        experiment=experiment,
        sides=sides,
        trained_for=trained_for,
        prompt=prompt,
        num_samples=num_samples,
        procedure=procedure,
        examples=["sampling", "best_of_2", "best_of_4", "worst_of_4", "soft_best_of_4(0.1)"],
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ctrl_jax", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": lambda share: "–" if share is None else f"{100 * share:.1f} %",
        "percent_number": lambda share: f"{100 * share:.1f}",
        "whole_percent": lambda share: "–" if share is None else f"{100 * share:.0f} %",
        "spoken": figures.spoken,
        "clipped": lambda text: text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]} … (cut)",
    }
    return environment


def _section(identifier: str, heading: str, panels: Sequence[figures.Panel]) -> dict[str, Any]:
    return {"id": identifier, "heading": heading, "svgs": _charts(identifier, panels)}


def _charts(identifier: str, panels: Iterable[figures.Panel]) -> list[dict[str, Any]]:
    # `figures.svg` escapes the texts that it is given; all else in the drawing is its own.
    return [
        {"title": panel.title, "svg": Markup(figures.svg(panel, f"{identifier}-{index}"))}
        for index, panel in enumerate(panels)
    ]


def _kicker(run: Run) -> str:
    prompts, responses = run.arrays["policy_rewards"].shape
    source = run.config.get("data", {}).get("source") if isinstance(run.config.get("data"), Mapping) else None
    words = f"Trained for {figures.spoken(run.procedure)} with {run.transform}"
    return f"{words}{f' on {source}' if source else ''} · tested on {prompts} prompts × {responses} responses"


def _lead(run: Run) -> str:
    measured = run.evaluation.win_rates[run.procedure]
    ideal = run.evaluation.ideal.get(run.procedure)
    text = (
        f"Decoded with {figures.spoken(run.procedure)} on both sides, the policy beats the reference "
        f"{_percent(measured)} of the time, {run.evaluation.kl.mean:.3f} nats per response away from it."
    )
    if ideal is None or ideal.identity is None or run.transform == "identity":
        return text
    points = 100 * (measured.mean - ideal.identity)
    side = "above" if points >= 0 else "below"
    return (
        f"{text} That is {abs(points):.1f} points {side} the {100 * ideal.identity:.1f} % that the identity transform "
        f"ideally reaches at this KL."
    )


def _tiles(run: Run) -> Iterable[dict[str, str]]:
    evaluation = run.evaluation
    yield _win_rate_tile(f"{figures.spoken(run.procedure).capitalize()} win rate", run, run.procedure)
    if run.procedure != "sampling":
        yield _win_rate_tile("Standard win rate (one sample)", run, "sampling")
    yield {
        "label": "KL from the reference, nats per response",
        "value": f"{evaluation.kl.mean:.3f}",
        "interval": f"[{evaluation.kl.low:.3f}, {evaluation.kl.high:.3f}]",
        "detail": _landing(run),
    }
    gold = evaluation.gold_win_rates.get(run.procedure)
    if gold is not None:
        ahead = 100 * (evaluation.win_rates[run.procedure].mean - gold.mean)
        yield {
            "label": f"{figures.spoken(run.procedure).capitalize()} win rate by gold",
            "value": f"{100 * gold.mean:.1f} %",
            "interval": _brackets(gold),
            "detail": f"the reward model says {abs(ahead):.1f} points {'more' if ahead >= 0 else 'less'}",
        }
    if evaluation.accuracy is not None and evaluation.ece is not None:
        yield {
            "label": "Reward model accuracy",
            "value": f"{100 * evaluation.accuracy:.1f} %",
            "interval": "",
            "detail": f"expected calibration error {100 * evaluation.ece:.1f} points",
        }
    yield {
        "label": "Ties",
        "value": f"{100 * evaluation.ties:.1f} %",
        "interval": "",
        "detail": "of compared responses have equal raw rewards",
    }


def _win_rate_tile(label: str, run: Run, procedure: str) -> dict[str, str]:
    estimate, ideal = run.evaluation.win_rates[procedure], run.evaluation.ideal.get(procedure)
    detail = "a raw reward has no ideal" if run.transform == "raw" else "no ideal was computed"
    if ideal is not None and ideal.transform is not None:
        detail = f"ideal at this KL {100 * ideal.transform:.1f} %"
        share, low, high = (lift_share(value, ideal.transform) for value in estimate)
        if share is not None and low is not None and high is not None:
            detail += f"; {100 * share:.0f} % of its lift [{100 * low:.0f}, {100 * high:.0f}]"
    return {"label": label, "value": f"{100 * estimate.mean:.1f} %", "interval": _brackets(estimate), "detail": detail}


def _landing(run: Run) -> str:
    budget, measured = run.evaluation.kl_budget, run.evaluation.kl.mean
    if not budget:
        return "no budget was set"
    distance = measured - budget
    side, share = "over" if distance >= 0 else "under", f"{100 * distance / budget:+.1f}".replace("-", "−")
    landed = f"{abs(distance):.3f} {side} the budget of {budget:g} ({share} %)"
    beta = run.config["policy"].get("beta")
    return landed if beta is None else f"{landed}, with β held at {beta:g}"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} % {_brackets(estimate)}"


def _brackets(estimate: Estimate) -> str:
    return f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _win_rate_row(run: Run, procedure: str) -> dict[str, Any]:
    estimate, ideal = run.evaluation.win_rates[procedure], run.evaluation.ideal.get(procedure)
    return {
        "procedure": procedure,
        "win_rate": estimate,
        "gold": run.evaluation.gold_win_rates.get(procedure),
        "ideal": ideal,
        "share": lift_share(estimate.mean, ideal.transform if ideal else None),
    }


def _sweep_row(point: figures.Point) -> dict[str, Any]:
    evaluation = point.evaluation
    win_rate = evaluation.win_rates.get(point.procedure) if evaluation else None
    ideals = evaluation.ideal.get(point.procedure) if evaluation else None
    ideal = ideals.transform if ideals else None
    return {
        "point": point,
        "kl": evaluation.kl if evaluation else None,
        "win_rate": win_rate,
        "standard": evaluation.win_rates.get("sampling") if evaluation else None,
        "gold": evaluation.gold_win_rates.get(point.procedure) if evaluation else None,
        "ideal": ideal,
        "share": lift_share(win_rate.mean, ideal) if win_rate else None,
        "link": urllib.parse.quote(point.report) if point.report else None,
    }


def _of(points: Sequence[figures.Point], procedure: str) -> list[figures.Point]:
    return [point for point in points if point.procedure == procedure]


def _samples(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kept, characters = 0, 0
    for row in rows:
        texts = (row["prompt"], row["policy"]["text"], row["reference"]["text"])
        characters += sum(min(len(text), TEXT_CHARACTERS) for text in texts)
        if characters > SAMPLES_CHARACTERS:
            break
        kept += 1
    return {"shown": rows[:SAMPLES_SHOWN][:kept], "more": rows[SAMPLES_SHOWN:kept], "left": len(rows) - kept}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(str(item) for item in value)
        else:
            yield f"{prefix}{name}", "–" if value is None else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(math.floor(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
