import dataclasses
import re

from ctrl_jax.evaluation import Estimate
from ctrl_jax.report.charts import headline
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import frontier, judges, lengths, reliability, training, validation
from tests.report.drawing import drawn, rows


def test_charts_of_missing_inputs_are_left_out(run: Run) -> None:
    optional = re.compile("reliability|margins|validation|.*(gold|lengths)")
    arrays = {name: array for name, array in run.arrays.items() if not optional.match(name)}
    evaluation = dataclasses.replace(run.evaluation, gold_win_rates={}, judge_win_rates={})
    bare = dataclasses.replace(run, arrays=arrays, metrics={}, evaluation=evaluation)
    assert judges.panels(bare) == training.panels(bare) == reliability.panels(bare) == validation.panels(bare) == []
    assert lengths.panels(bare) == []
    assert len(headline(bare)) == 3


def test_no_interval_is_drawn_where_there_is_none(run: Run) -> None:
    alone = {name: Estimate(value.mean, None, None) for name, value in run.evaluation.win_rates.items()}
    kl = Estimate(run.evaluation.kl.mean, None, None)
    evaluation = dataclasses.replace(run.evaluation, kl=kl, win_rates=alone)
    bare = dataclasses.replace(run, evaluation=evaluation)
    [point] = [row for row in rows(frontier.panels(bare)) if row["series"] == "policy"]
    assert point["y_low"] == point["y"] == point["y_high"]
    for panel in (*headline(bare), *judges.panels(bare)):
        drawn(panel)
