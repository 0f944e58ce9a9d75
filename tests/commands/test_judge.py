"""`judge` and `choose-n`: tables, JSON and figures of two files of scored responses."""

import json

import numpy as np
import pytest

import ctrl_jax as cj
from ctrl_jax.commands import choose_n, judge
from ctrl_jax.errors import InputError

REWARDS = """
def letters(prompts, responses):
    return [float(len(text)) for text in responses]


def by_row(prompts, responses, gold):
    return [-row[place % 8] for place, row in enumerate(gold)]


def by_answer(prompts, responses, answer):
    return [0.0 for _ in responses]


def never(prompts, responses):
    raise AssertionError("nothing is to be scored")
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Texts whose length is their reward, and a gold that turns against the longest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "240")
    (tmp_path / "judged_by_hand.py").write_text(REWARDS)
    random = np.random.default_rng(0)
    arrays = {}
    for name, least in (("policy", 3), ("reference", 1)):
        lengths = random.integers(least, 30, (20, 8))
        gold = np.where(lengths < 24, lengths, -lengths) + random.normal(0, 0.1, lengths.shape)
        rows = [
            {
                "prompt": f"What is {i}?",
                "responses": ["x" * n for n in row],
                "rewards": row.tolist(),
                "gold": by.tolist(),
            }
            for i, (row, by) in enumerate(zip(lengths, gold, strict=True))
        ]
        order = rows[::-1] if name == "reference" else rows
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        arrays |= {f"{name}_rewards": lengths, f"{name}_judged": gold}
    return arrays


def test_it_prints_every_win_rate_with_its_interval(files, capsys, tmp_path):
    assert judge.main(["policy.jsonl", "reference.jsonl", "--judge", "gold"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = cj.judge(**files)
    for name in found.win_rates:
        assert f"{name} │ {found.win_rates[name]} │ {found.judge_win_rates[name]}" in printed
    assert "20 prompts, 8 and 8 responses to each" in printed and f"ranks at {found.calibrated_reward}" in printed
    assert f"{100 * found.ties:.1f} % of the pairs" in printed and "runs/judge_policy_reference_gold.png" in printed
    assert (tmp_path / "runs" / "judge_policy_reference_gold.png").read_bytes().startswith(b"\x89PNG")


def test_its_json_is_for_programs(files, capsys, tmp_path):
    arguments = ["policy.jsonl", "reference.jsonl", "--json", "--procedures", "best_of_4", "soft_best_of_2(0.5)"]
    assert judge.main(arguments) == 0
    tree = json.loads(capsys.readouterr().out)
    rewards = (files["policy_rewards"], files["reference_rewards"])
    expected = cj.win_rate(*rewards, cj.procedure("soft_best_of_2(0.5)")).mean()
    assert tree["win_rates"]["soft_best_of_2(0.5)"]["mean"] == pytest.approx(expected)
    assert len(tree["win_rates"]) == 2 and tree["judge_win_rates"] == {}
    assert not (tmp_path / "runs").exists()


def test_a_function_scores_the_texts(files, capsys):
    trees = []
    for arguments in ([], ["--reward", "judged_by_hand:letters"]):
        assert judge.main(["policy.jsonl", "reference.jsonl", "--json", *arguments]) == 0
        trees.append(json.loads(capsys.readouterr().out))
    assert trees[0] == trees[1]


def test_choose_n_says_what_is_enough_and_where_it_turns(files, capsys, tmp_path):
    assert choose_n.main(["policy.jsonl", "reference.jsonl", "--judge", "gold", "--figure", "n.svg"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = cj.choose_n(**files)
    assert found.turns_down and found.best < 8
    for n, one in found.judge_win_rates.items():
        assert f"{n} │ {found.win_rates[n]} │ {one} │ {found.risk.counted[n]}" in printed
    assert found.risk.extrapolated
    for n, one in found.risk.extrapolated.items():
        assert f"{n} │ │ │ {one} * │ {found.risk.of_reference(n):.3f}" in printed
    assert f"Best by gold: N = {found.best}. Cheapest within 0.01 of it: N = {found.cheapest}." in printed
    assert f"It turns down: from N = {found.best} to 8 it loses {found.decline}" in printed
    assert found.early_stop is None and "Drawn one by one" not in printed
    assert all(text in (tmp_path / "n.svg").read_text() for text in ("enough", "grey: stopping early"))
    assert choose_n.main(["policy.jsonl", "reference.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(
        json.dumps(cj.choose_n(files["policy_rewards"], files["reference_rewards"]).as_json())
    )


def test_choose_n_says_what_stopping_early_saves(files, capsys):
    assert choose_n.main(["policy.jsonl", "reference.jsonl", "--within", "0.05", "--figure", "n.svg"]) == 0
    stop = cj.choose_n(files["policy_rewards"], files["reference_rewards"], within=0.05).early_stop
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        f"Drawn one by one until one is among the reference's highest {100 * stop.share:.1f} %, at most 8, "
        f"{stop.draws.mean:.1f} responses in the mean are as near to it: {stop.win_rate}."
    ) in printed


@pytest.mark.parametrize("command", [judge, choose_n])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere.jsonl", "reference.jsonl"], r"nowhere\.jsonl cannot be read|No such file"),
        (["policy.jsonl", "reference.jsonl", "--judge", "opinion"], "has no 'opinion'; it has .*'gold'"),
        (["policy.jsonl", "reference.jsonl", "--judge", "rewards"], "--judge is rewards, which picks already"),
        (["policy.jsonl", "reference.jsonl", "--reward", "judged_by_hand:vowels"], "has no function 'vowels'"),
        (["policy.jsonl", "reference.jsonl", "--figure", "a.gif"], "names no kind of picture"),
    ],
)
def test_what_cannot_be_judged_is_refused(files, tmp_path, command, arguments, match):
    with pytest.raises(InputError, match=match):
        command.main(arguments)
    assert not (tmp_path / "runs").exists()


def test_more_samples_than_there_are(files):
    arguments = ["policy.jsonl", "reference.jsonl", "--procedures", "best_of_9", "--reward", "judged_by_hand:never"]
    with pytest.raises(InputError, match=r"policy\.jsonl has 8 responses a prompt, and .*9.* needs 9"):
        judge.main(arguments)


@pytest.mark.parametrize("options", [["--within", "2"], ["--lowest", "0"]])
def test_a_share_is_refused_before_anything_is_scored(files, options):
    with pytest.raises(InputError, match="give a share between 0 and 1"):
        choose_n.main(["policy.jsonl", "reference.jsonl", "--reward", "judged_by_hand:never", *options])


def test_a_function_gets_columns_by_name_and_what_the_rows_lack_is_refused_before_anything_is_scored(files, capsys):
    arguments = ["policy.jsonl", "reference.jsonl", "--json", "--judge", "judged_by_hand:by_row"]
    assert judge.main(arguments) == 0
    judged = json.loads(capsys.readouterr().out)["judge_win_rates"]
    expected = cj.judge(**{name: -array if "judged" in name else array for name, array in files.items()})
    assert judged["best_of_4"]["mean"] == pytest.approx(expected.judge_win_rates["best_of_4"].mean)
    with pytest.raises(InputError, match="asks for answer, which the data lacks"):
        judge.main([*arguments[:2], "--reward", "judged_by_hand:never", "--judge", "judged_by_hand:by_answer"])


def test_nothing_to_draw_is_said(files, capsys, tmp_path):
    assert judge.main(["policy.jsonl", "reference.jsonl", "--procedures", "sampling"]) == 0
    assert "No figure: there is no best-of-N" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()


def test_choose_n_says_where_the_lowest_tie(files, capsys, tmp_path):
    """A judge of two values, by which one response of the reference in a hundred is bad."""
    for name in ("policy", "reference"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for place, row in enumerate(rows):
            row["safe"] = [float(place > 0 or other > 0) for other in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert choose_n.main(["policy.jsonl", "reference.jsonl", "--judge", "safe", "--figure", "n.svg"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Values tie at the threshold: 95.6% of the reference's own responses are at it or below" in told
    assert choose_n.main(["policy.jsonl", "reference.jsonl", "--judge", "gold", "--figure", "n.svg"]) == 0
    assert "tie at the threshold" not in capsys.readouterr().out
