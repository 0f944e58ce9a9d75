from ctrl_jax.report import sweep_page
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.statistics import lift_share
from ctrl_jax.report.status import Cost, Status
from tests.report.pages import links, visible


def test_a_sweep_shows_every_point_with_its_state(run: Run) -> None:
    points = [
        Status(
            "a b",
            "exponential(10)",
            "best_of_4",
            0.75,
            "done",
            report="a b/report/index.html",
            evaluation=run.evaluation,
        ),
        Status("b", "identity", "best_of_4", 0.75, "running"),
        Status("<b>", "raw", "best_of_4", 0.5, "failed"),
        Status("d", "raw", "best_of_4", 1.5, "missing"),
    ]
    text = sweep_page.render("bon", points, ["b went wrong"])
    assert set(links(text).found) - {link for link in links(text).found if link.startswith("#")} == {
        "data:,", "a%20b/report/index.html",
    }  # fmt: skip
    words = visible(text)
    assert "1 of 4 runs evaluated" in words and "b went wrong" in words
    for state in ("done", "running", "failed", "missing"):
        assert state in words
    measured = run.evaluation.win_rates["best_of_4"]
    share = lift_share(measured.mean, run.evaluation.ideal["best_of_4"].transform)
    assert share is not None
    assert f"{100 * measured.mean:.1f} % [{100 * measured.low:.1f}, {100 * measured.high:.1f}]" in words
    assert f"{100 * share:.0f} % running" in words, "each row starts with its state"
    assert "<b>" not in text
    assert text.count("<svg ") == 1


def test_a_sweep_of_nothing_yet_says_so(words_only: None) -> None:
    text = sweep_page.render("bon", [Status("a", "identity", "best_of_4", 0.5, "missing")])
    assert "No run of the sweep has been evaluated yet" in text


def test_other_algorithms_are_named_with_what_their_training_took(run: Run) -> None:
    points = [
        Status(
            "ours",
            "exponential(10)",
            "best_of_4",
            0.6,
            "done",
            evaluation=run.evaluation,
            cost=Cost(76800, 76800, 81.4),
            highest_kl=0.66,
        ),
        Status(
            "dpo",
            "raw",
            "best_of_4",
            0.6,
            "done",
            evaluation=run.evaluation,
            method="DPO",
            aims=False,
            cost=Cost(0, 9600, None),
            highest_kl=0.5,
        ),
        Status("later", "raw", "best_of_4", 0.6, "missing", method="DPO"),
    ]
    words = visible(sweep_page.render("rivals", points))
    assert "state run method KL budget" in words and "done dpo DPO – " in words
    assert "What each training took" in words and "ours 76,800 76,800 81 0.660 110 %" in words
    assert "dpo 0 9,600 – 0.500 " in words and "0.500 83 %" not in words, "it aims at no budget"
    without = visible(sweep_page.render("bon", points[:1]))
    assert "state run transform KL budget" in without and "dpo" not in without
    assert "What each training took" not in visible(sweep_page.render("bon", points[2:]))
