import json

import numpy as np
import pytest
from matplotlib import image

from ctrl_jax.commands import ideal
from ctrl_jax.errors import InputError
from ctrl_jax.theory import procedures, transforms
from ctrl_jax.theory.ideal import tilt


def test_json_is_all_that_is_printed_and_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ideal.main(["--procedure", "worst_of_4", "--kl", "0.5", "--json"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert err == "" and list(tmp_path.iterdir()) == []
    assert (printed["procedure"], printed["kl"]) == ("worst_of_4", 0.5)
    # KL .5 under worst-of-4: identity .8860, exp(-10u) .9476, the optimum .948.
    expected = {"identity": 0.8860, "exponential(-10)": 0.9476, "optimal": 0.948}
    for name, win_rate in expected.items():
        assert printed["transforms"][name]["win_rates"]["worst_of_4"] == pytest.approx(win_rate, abs=5e-4)
    # β belongs to the Φ that it says it does.
    for name, of in (("exponential(10)", "normalized"), ("logarithm", "itself")):
        assert printed["transforms"][name]["beta_of"] == of
        phi = transforms.parse(name) if of == "itself" else transforms.normalized(transforms.parse(name))
        assert tilt(phi, printed["transforms"][name]["beta"]).kl == pytest.approx(0.5, rel=1e-6)


def test_a_table_for_people_and_a_figure(capsys, tmp_path):
    path = tmp_path / "new" / "figure.png"
    assert ideal.run(ideal.Options(procedure="best_of_2", kl=0.5, figure=path)) == 0
    out = capsys.readouterr().out
    for text in ("exponential(-10)", "optimal", "best_of_2", "sampling", "0.5 nats", str(path.name)):
        assert text in out
    picture = image.imread(path)
    assert picture.shape[1] > 1000 and np.ptp(picture) > 0.5


def test_a_figure_of_no_known_kind_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match=r"figure\.bmp.*\.png, \.svg or \.pdf"):
        ideal.run(ideal.Options(kl=0.5, figure=tmp_path / "figure.bmp"))


def test_an_optimum_that_has_no_such_kl_is_told(capsys):
    # The worst of 16 wins always well below 12 nats.
    assert ideal.run(ideal.Options(procedure="worst_of_16", kl=12.0, json=True)) == 0
    row = json.loads(capsys.readouterr().out)["transforms"]["optimal"]
    assert row["win_rates"]["worst_of_16"] is None or row["win_rates"]["worst_of_16"] == pytest.approx(1)


@pytest.mark.parametrize(("procedure", "kl", "message"), [("best_of_x", 1.0, "best_of_x"), ("best_of_4", -1.0, "-1")])
def test_bad_input(procedure, kl, message):
    with pytest.raises(InputError, match=message):
        ideal.run(ideal.Options(procedure=procedure, kl=kl, json=True))


def test_sampling_is_shown_once():
    assert ideal._shown_procedures(procedures.parse("sampling")) == [procedures.Sampling()]


def test_transforms_of_ones_own(capsys, tmp_path):
    figure = tmp_path / "figure.png"
    names = ("exponential:3", "logit", "exponential(3)")
    assert ideal.run(ideal.Options(kl=0.5, transforms=names, figure=figure, json=True)) == 0
    assert list(json.loads(capsys.readouterr().out)["transforms"]) == ["exponential(3)", "logit"]
    assert figure.exists()


@pytest.mark.parametrize(
    ("names", "message"), [((), "`transforms` is empty"), (("identity", "raw"), "`transforms` has raw")]
)
def test_transforms_without_an_ideal_are_refused(names, message):
    with pytest.raises(InputError, match=message):
        ideal.run(ideal.Options(transforms=names))
