from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panels import reliability
from tests.report.drawing import drawn, marks


def test_the_reliability_diagram_shows_each_pair_once(run: Run) -> None:
    axes = drawn(reliability.panels(run)[0])
    assert axes.get_xlim()[0] == 0.5 and axes.get_xlim()[1] >= 1
    [bars] = [c for c in axes.child_axes[0].containers]
    assert sum(bar.get_height() for bar in bars.patches) == run.arrays["reliability_count"].sum() / 2
    assert min(x for x, _ in marks(axes)) >= 0.5
