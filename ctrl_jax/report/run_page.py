"""The report of one run, as a page."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report import html
from ctrl_jax.report.html import TEXT_CHARACTERS, brackets
from ctrl_jax.report.measurements import Run, floor_warnings, reward_warnings, trained_on, unfinished_warning
from ctrl_jax.report.names import procedure_order, short_name, spoken
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.panels import (
    calibrated,
    frontier,
    judges,
    lengths,
    margins,
    reliability,
    training,
    validation,
    win_rate_vs_n,
)
from ctrl_jax.report.statistics import lift_share

SAMPLES_SHOWN = 20
SAMPLES_CHARACTERS = 400_000
"""Of all texts together, so that the page stays light; the rest is in samples.jsonl."""


def render(run: Run) -> str:
    """The report of one run, as HTML."""
    reward = {
        "reliability": reliability.panels(run),
        "margins": margins.panels(run),
        "validation": validation.panels(run),
    }
    return html.render(
        "run.html",
        title=f"{run.name}: report",
        run=run,
        kicker=_kicker(run),
        lead=_lead(run),
        warning=unfinished_warning(run.evaluation, _at(run.config, "data", "response_length")),
        reward_warnings=[*reward_warnings(run.evaluation), *floor_warnings(run.evaluation)],
        tiles=list(_tiles(run)),
        sections={
            "frontier": _section(
                "result", "What training bought", [*frontier.panels(run), *calibrated.panels(run)]
            ),
            "win_rate_vs_n": _section("win-rate-vs-n", "Win rate over N", win_rate_vs_n.panels(run)),
            "training": _section("training", "Training", training.panels(run)),
            "reliability": _section("reliability", "Reward model", [*itertools.chain(*reward.values())]),
            "proxy_gold": _section("proxy-gold", "Other judges", judges.panels(run)),
            "lengths": _section("lengths", "Response length", lengths.panels(run)),
        },
        reward=_reward_words(run),
        reward_figures=[name for name, panels in reward.items() if panels],
        samples=_samples(run.samples),
        judges=[name for name, table in _other_judges(run) if table],
        win_rates=[_win_rate_row(run, name) for name in sorted(run.evaluation.win_rates, key=procedure_order)],
        configuration=list(_flat(run.config)),
        timings=[*((name, _duration(seconds)) for name, seconds in run.evaluation.timings.items()),
                 *([("all", _duration(sum(run.evaluation.timings.values())))] if run.evaluation.timings else [])],
    )  # fmt: skip


def _reward_words(run: Run) -> list[str]:
    """What there is to say of the reward beside its figures: whether it is worth climbing."""
    evaluation = run.evaluation
    quality, training = evaluation.reward_model, evaluation.reward_training
    words = [] if training is None else [trained_on(training)]
    if quality.accuracy is not None and quality.accuracy_low is not None:
        bounds = Estimate(quality.accuracy, quality.accuracy_low, quality.accuracy_high)
        words.append(
            f"It ranks {_percent(bounds)} of {quality.pairs} held-out pairs as their labels do; guessing ranks half of "
            f"them so{'' if quality.is_chance else ', and the interval leaves that out'}."
        )
    return words + evaluation.reward_signal.sentences


def _section(identifier: str, heading: str, panels: Sequence[Panel]) -> dict[str, Any]:
    return {"id": identifier, "heading": heading, "svgs": html.charts(identifier, panels)}


def _at(tree: Any, *path: str) -> Any:
    """What a configuration has at a place, or None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _kicker(run: Run) -> str:
    prompts, responses = run.arrays["policy_rewards"].shape
    source = _at(run.config, "data", "source")
    words = f"Trained for {spoken(run.procedure)} with {run.transform}"
    tested = f"tested on {prompts} {'prompt' if prompts == 1 else 'prompts'} × {responses} responses"
    return f"{words}{f' on {source}' if source else ''} · {tested}"


def _other_judges(run: Run) -> list[tuple[str, Mapping[str, Estimate]]]:
    """Who judges beside the training reward, with their win rates; empty where one does not exist."""
    judge = short_name(run.evaluation.judge)
    return [("gold", run.evaluation.gold_win_rates), (judge, run.evaluation.judge_win_rates)]


def _lead(run: Run) -> str:
    evaluation = run.evaluation
    measured, ideal = evaluation.win_rates[run.procedure], evaluation.ideal.get(run.procedure)
    text = (
        f"Decoded with {spoken(run.procedure)} on both sides, the policy beats the reference "
        f"{_percent(measured)} of the time, {evaluation.kl.mean:.3f} nats per response away from it. "
        f"The judge is {evaluation.judged_by}."
    )
    others = [
        f"{100 * table[run.procedure].mean:.1f} % by {name}"
        for name, table in _other_judges(run)
        if run.procedure in table
    ]
    if others:
        text += f" Of the same picks, it wins {' and '.join(others)}."
    if evaluation.judge is not None:
        text += f" The independent judge is {evaluation.judge}."
    if ideal is None or ideal.identity is None or run.transform == "identity":
        return text
    points = 100 * (measured.mean - ideal.identity)
    side = "above" if points >= 0 else "below"
    return (
        f"{text} By its own judge it is {abs(points):.1f} points {side} the {100 * ideal.identity:.1f} % that the "
        f"identity transform ideally reaches at this KL."
    )


def _tiles(run: Run) -> Iterable[dict[str, str]]:
    evaluation = run.evaluation
    yield _win_rate_tile(f"{spoken(run.procedure).capitalize()} win rate", run, run.procedure)
    if run.procedure != "sampling":
        yield _win_rate_tile("Standard win rate (one sample)", run, "sampling")
    yield {
        "label": "KL from the reference, nats per response",
        "value": f"{evaluation.kl.mean:.3f}",
        "interval": brackets(evaluation.kl, scale=1, digits=3),
        "detail": _landing(run),
    }
    for name, table in _other_judges(run):
        if run.procedure in table:
            estimate = table[run.procedure]
            ahead = 100 * (evaluation.win_rates[run.procedure].mean - estimate.mean)
            yield {
                "label": f"{spoken(run.procedure).capitalize()} win rate by {name}",
                "value": f"{100 * estimate.mean:.1f} %",
                "interval": brackets(estimate),
                "detail": f"on the same picks, which the training reward puts {abs(ahead):.1f} points "
                f"{'higher' if ahead >= 0 else 'lower'}",
            }
    for name, one in evaluation.floors.items():
        yield {
            "label": f"Mean rank by {name}",
            "value": f"{100 * one.mean_rank.mean:.1f} %",
            "interval": brackets(one.mean_rank),
            "detail": f"of single responses; the floor is {100 * one.floor:g} %, the reference's 50 %",
        }
    yield from _quality_tile(run)
    yield {
        "label": "Ties",
        "value": f"{100 * evaluation.ties:.1f} %",
        "interval": "",
        "detail": "of compared responses have equal raw rewards",
    }
    lengths, unfinished = evaluation.response_length, evaluation.unfinished
    if {"policy", "reference"} <= lengths.keys() & unfinished.keys():
        yield {
            "label": "Response length, tokens",
            "value": f"{lengths['policy'].mean:.1f}",
            "interval": "",
            "detail": f"reference {lengths['reference'].mean:.1f}; unfinished {100 * unfinished['policy']:.1f} % "
            f"({100 * unfinished['reference']:.1f} %)",
        }


def _quality_tile(run: Run) -> Iterable[dict[str, str]]:
    quality = run.evaluation.reward_model
    pairs = "" if quality.pairs is None else f"on {quality.pairs} held-out pairs"
    if quality.accuracy is not None:
        brier = "" if quality.brier is None else f"Brier score {quality.brier:.3f}"
        ece = "" if quality.ece is None else f"expected calibration error {100 * quality.ece:.1f} points"
        bounds = Estimate(quality.accuracy, quality.accuracy_low, quality.accuracy_high)
        yield {
            "label": "Reward model accuracy",
            "value": f"{100 * quality.accuracy:.1f} %",
            "interval": "" if quality.accuracy_low is None else brackets(bounds),
            "detail": "; ".join(text for text in (pairs, ece, brier) if text),
        }
    if quality.agreements is not None:
        yield {
            "label": "Held-out pairs that the function ranks as their labels do",
            "value": f"{quality.agreements} of {quality.pairs}",
            "interval": "",
            "detail": f"and gives {quality.equal or 0} of them two equal rewards; it is no model of preferences",
        }


def _win_rate_tile(label: str, run: Run, procedure: str) -> dict[str, str]:
    estimate, ideal = run.evaluation.win_rates[procedure], run.evaluation.ideal.get(procedure)
    detail = "a raw reward has no ideal" if run.transform == "raw" else "no ideal was computed"
    if ideal is not None and ideal.transform is not None:
        detail = f"ideal at this KL {100 * ideal.transform:.1f} %"
        share, low, high = (lift_share(value, ideal.transform) for value in (estimate.mean, *estimate.bounds))
        if share is not None and low is not None and high is not None:
            detail += f"; {100 * share:.0f} % of its lift"
            detail += "" if estimate.low is None else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return {"label": label, "value": f"{100 * estimate.mean:.1f} %", "interval": brackets(estimate), "detail": detail}


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
    return f"{100 * estimate.mean:.1f} % {brackets(estimate)}"


def _win_rate_row(run: Run, procedure: str) -> dict[str, Any]:
    estimate, ideal = run.evaluation.win_rates[procedure], run.evaluation.ideal.get(procedure)
    return {
        "procedure": procedure,
        "win_rate": estimate,
        "others": [table.get(procedure) for _, table in _other_judges(run) if table],
        "ideal": ideal,
        "share": lift_share(estimate.mean, ideal.transform if ideal else None),
    }


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
