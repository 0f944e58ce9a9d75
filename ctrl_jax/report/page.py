"""The report's pages: numbers into words, words and figures into one self-contained HTML file.

Nothing is fetched: style and figures stand in the page. All text that comes from data or models is escaped, and what
would steer the reader's screen in it (control characters, changes of the writing direction) is made visible.
"""

import math
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from ctrl_jax.report import figures, glossary
from ctrl_jax.report.measurements import Estimate, Run, finite, lift_share, unfinished_warning

SAMPLES_SHOWN = 20
SAMPLES_CHARACTERS = 400_000
"""Of all texts together, so that the page stays light; the rest is in samples.jsonl."""
TEXT_CHARACTERS = 4_000


def run_page(run: Run) -> str:
    """The report of one run, as HTML."""
    return _render(
        "run.html",
        title=f"{run.name}: report",
        run=run,
        kicker=_kicker(run),
        lead=_lead(run),
        warning=unfinished_warning(run.evaluation, _at(run.config, "data", "response_length")),
        tiles=list(_tiles(run)),
        sections={
            "frontier": _section(
                "result", "What training bought", [*figures.frontier(run), *figures.calibration(run)]
            ),
            "win_rate_vs_n": _section("win-rate-vs-n", "Win rate over N", figures.win_rate_vs_n(run)),
            "training": _section("training", "Training", figures.training(run)),
            "reliability": _section("reliability", "Reward model", figures.reliability(run)),
            "proxy_gold": _section("proxy-gold", "Other judges", figures.proxy_gold(run)),
            "lengths": _section("lengths", "Response length", figures.lengths(run)),
        },
        samples=_samples(run.samples),
        judges=[name for name, table in _other_judges(run) if table],
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
    judges = list(
        dict.fromkeys(p.evaluation.judge for p in points if p.evaluation is not None and p.evaluation.judge is not None)
    )
    return _render(
        "sweep.html",
        title=f"{name}: sweep",
        name=name,
        lead=f"{done} of {len(points)} runs evaluated.",
        charts=_charts("pareto", panels),
        rows=[_sweep_row(point) for point in points],
        procedures=order,
        judge=figures.short_name(judges[0]) if judges else None,
        has_gold=any(point.evaluation is not None and point.evaluation.gold_win_rates for point in points),
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
    temperature: float = 1.0,
    top_p: float = 1.0,
    examples: Sequence[str] = (),
) -> str:
    """The page of `make sample`, as HTML: a form, and the script that shows what is answered.

    `trained_for` is the policy's procedure and transform, or None for a model without rewards; `examples` are prompts
    that a button offers one after the other.
    """
    return _render(
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
        examples=[visible(example) for example in examples],
        procedures=["sampling", "best_of_2", "best_of_4", "worst_of_4", "soft_best_of_4(0.1)"],
    )  # fmt: skip


_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with what has no look of its own, yet steers a screen or hides words, as `⟦U+202E⟧`.

    Control characters but line feed and tab, overrides of the writing direction, lone surrogates (which no file can
    hold), and tag characters. A carriage return before a line feed is left out.
    """
    return _STEERING.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", text.replace("\r\n", "\n"))


def _render(template: str, **values: Any) -> str:
    words: set[str] = set()

    def finished(value: Any) -> Any:
        # What is markup is the page's own; all else is text of data, models, files or users.
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ctrl_jax", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finished,
    )
    environment.globals["words"] = lambda: glossary.glossary(words)
    environment.filters |= {
        "percent": lambda share: "–" if share is None else f"{100 * share:.1f} %",
        "percent_number": lambda share: f"{100 * share:.1f}",
        "whole_percent": lambda share: "–" if share is None else f"{100 * share:.0f} %",
        "brackets": _brackets,
        "kl_brackets": lambda estimate: _brackets(estimate, scale=1, digits=3),
        "finite": finite,
        "spoken": figures.spoken,
        "explained": lambda text: glossary.explained(finished(text), words=words),
        "clipped": lambda text: text if len(text) <= TEXT_CHARACTERS else f"{text[:TEXT_CHARACTERS]} … (cut)",
    }
    return environment.get_template(template).render(palette=figures.PALETTE, fonts=figures.FONTS, **values)


def _section(identifier: str, heading: str, panels: Sequence[figures.Panel]) -> dict[str, Any]:
    return {"id": identifier, "heading": heading, "svgs": _charts(identifier, panels)}


def _charts(identifier: str, panels: Iterable[figures.Panel]) -> list[dict[str, Any]]:
    # `figures.svg` escapes the texts that it is given; all else in the drawing is its own.
    return [
        {"title": panel.title, "svg": Markup(figures.svg(panel, f"{identifier}-{index}"))}
        for index, panel in enumerate(panels)
    ]


def _at(tree: Any, *path: str) -> Any:
    """What a configuration has at a place, or None."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _kicker(run: Run) -> str:
    prompts, responses = run.arrays["policy_rewards"].shape
    source = _at(run.config, "data", "source")
    words = f"Trained for {figures.spoken(run.procedure)} with {run.transform}"
    tested = f"tested on {prompts} {'prompt' if prompts == 1 else 'prompts'} × {responses} responses"
    return f"{words}{f' on {source}' if source else ''} · {tested}"


def _other_judges(run: Run) -> list[tuple[str, Mapping[str, Estimate]]]:
    """Who judges beside the training reward, with their win rates; empty where one does not exist."""
    judge = figures.short_name(run.evaluation.judge)
    return [("gold", run.evaluation.gold_win_rates), (judge, run.evaluation.judge_win_rates)]


def _lead(run: Run) -> str:
    evaluation = run.evaluation
    measured, ideal = evaluation.win_rates[run.procedure], evaluation.ideal.get(run.procedure)
    text = (
        f"Decoded with {figures.spoken(run.procedure)} on both sides, the policy beats the reference "
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
    yield _win_rate_tile(f"{figures.spoken(run.procedure).capitalize()} win rate", run, run.procedure)
    if run.procedure != "sampling":
        yield _win_rate_tile("Standard win rate (one sample)", run, "sampling")
    yield {
        "label": "KL from the reference, nats per response",
        "value": f"{evaluation.kl.mean:.3f}",
        "interval": _brackets(evaluation.kl, scale=1, digits=3),
        "detail": _landing(run),
    }
    for name, table in _other_judges(run):
        if run.procedure in table:
            estimate = table[run.procedure]
            ahead = 100 * (evaluation.win_rates[run.procedure].mean - estimate.mean)
            yield {
                "label": f"{figures.spoken(run.procedure).capitalize()} win rate by {name}",
                "value": f"{100 * estimate.mean:.1f} %",
                "interval": _brackets(estimate),
                "detail": f"on the same picks, which the training reward puts {abs(ahead):.1f} points "
                f"{'higher' if ahead >= 0 else 'lower'}",
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
        ece = "" if quality.ece is None else f"expected calibration error {100 * quality.ece:.1f} points"
        bounds = Estimate(quality.accuracy, quality.accuracy_low, quality.accuracy_high)
        yield {
            "label": "Reward model accuracy",
            "value": f"{100 * quality.accuracy:.1f} %",
            "interval": "" if quality.accuracy_low is None else _brackets(bounds),
            "detail": "; ".join(text for text in (pairs, ece) if text),
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


def _brackets(estimate: Estimate, *, scale: float = 100, digits: int = 1) -> str:
    """The interval, in percent by default, or that there is none: a single prompt has no spread to take one from."""
    if estimate.low is None or estimate.high is None:
        return "no interval: 1 prompt"
    return f"[{scale * estimate.low:.{digits}f}, {scale * estimate.high:.{digits}f}]"


def _win_rate_row(run: Run, procedure: str) -> dict[str, Any]:
    estimate, ideal = run.evaluation.win_rates[procedure], run.evaluation.ideal.get(procedure)
    return {
        "procedure": procedure,
        "win_rate": estimate,
        "others": [table.get(procedure) for _, table in _other_judges(run) if table],
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
        "judge": evaluation.judge_win_rates.get(point.procedure) if evaluation else None,
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
