"""Names as users write them and as pages print them, read into one canonical form, in time linear in their length."""

import time

import pytest

from ctrl_jax.config import Evaluation, Experiment, Policy, grid
from ctrl_jax.errors import InputError
from ctrl_jax.report.names import spoken
from ctrl_jax.theory import names, procedures, transforms

PROCEDURES = [
    "sampling",
    "best_of_4",
    "worst_of_16",
    "soft_best_of_4(0.1)",
    "best_of_poisson(4)",
    "0.5*best_of_2+0.5*soft_best_of_8(1e+20)",
]


@pytest.mark.parametrize("name", PROCEDURES)
@pytest.mark.parametrize(
    "spelling", [spoken, lambda name: spoken(name).capitalize(), str.upper, lambda name: f" {name} "]
)
def test_a_procedure_is_read_as_pages_print_it(name, spelling):
    assert procedures.parse(spelling(name)).name == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("best of 4", "best_of_4"),
        ("soft-best-of-4:0.1", "soft_best_of_4(0.1)"),
        ("best_of_04", "best_of_4"),
        ("0.50*best-of-2 + 0.50*best-of-8", "0.5*best_of_2+0.5*best_of_8"),
    ],
)
def test_spellings_of_procedures(text, name):
    assert procedures.parse(text).name == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("exponential:5", "exponential(5)"),
        ("exp5", "exponential(5)"),
        ("Exp(5.0)", "exponential(5)"),
        ("exp:-5", "exponential(-5)"),
        ("exponential5e-1", "exponential(0.5)"),
        ("Exponential( 1e1 )", "exponential(10)"),
        ("Identity", "identity"),
        ("log", "logarithm"),
        ("LOGIT ", "logit"),
    ],
)
def test_spellings_of_transforms(text, name):
    assert str(transforms.parse(text)) == name


@pytest.mark.parametrize("text", ["exp-5", "exponential-5", "exp+5", "exp", "exp:", "exp(5", "exp5)", "exp:5:5", "5"])
def test_what_could_mean_two_things_is_refused(text):
    with pytest.raises(InputError):
        transforms.parse(text)


def test_two_spellings_are_one_experiment():
    canonical = Experiment("any", policy=Policy(transform="exponential(5)", procedure="best_of_2"))
    assert Experiment("any", policy=Policy(transform="exp5", procedure="Best-of-2")) == canonical
    assert Policy(transform=" RAW").transform == "raw" and Policy(transform="Optimal").transform == "optimal"
    assert Evaluation(procedures=("Best-of-2", "sampling")).procedures == ("best_of_2", "sampling")
    assert [point.name for point in grid(canonical, transforms=["exp5", "Raw"], kl_budgets=[0.5])] == [
        "exponential(5)_kl0.5",
        "raw_kl0.5",
    ]


@pytest.mark.parametrize(
    "text",
    ["nan*best_of_2+1*best_of_2", "inf*best_of_2", "best_of_2+", "+", "*", "0.5*+0.5*best_of_2", "0.5*best_of_2++", "",
     "1*" + "best_of_2(" * 50, "best_of_²", "\ud800"],
)  # fmt: skip
def test_what_is_no_procedure_is_refused(text):
    with pytest.raises(InputError):
        procedures.parse(text)


@pytest.mark.parametrize("parse", [procedures.parse, transforms.parse])
@pytest.mark.parametrize(
    "text", ["+" * 80_000, "best_of_" + "9" * 80_000, "(" * 80_000, "exp" + "5" * 80_000, " " * 80_000]
)
def test_a_long_name_is_refused_at_once(parse, text):
    started = time.monotonic()
    with pytest.raises(InputError, match="80") as error:
        parse(text)
    assert time.monotonic() - started < 1 and len(str(error.value)) < 1000


@pytest.mark.parametrize("letter", ["+", "(", "a ", "-", "1*a+", "a(", "9", "best_of_2+"])
@pytest.mark.parametrize("parse", [procedures.parse, transforms.parse])
def test_the_longest_names_are_read_in_no_time(parse, letter):
    started = time.monotonic()
    with pytest.raises(InputError):
        parse((letter * names.MAX_LENGTH)[: names.MAX_LENGTH])
    assert time.monotonic() - started < 1
