"""The theory's page: its numbers are those of theory/, and it shows them."""

import pytest

from ctrl_jax import __main__ as command_line
from ctrl_jax.theory.objective import Objective
from ctrl_jax.theory.procedures import parse


@pytest.fixture
def page(open_page, tmp_path):
    assert command_line.main(["explore", "--output", str(tmp_path / "explorer.html")]) == 0
    return open_page((tmp_path / "explorer.html").as_uri())


@pytest.mark.parametrize("kl", [0.1, 0.6, 3.0])
@pytest.mark.parametrize(("family", "n"), [("best", 1), ("best", 4), ("best", 32), ("worst", 4)])
def test_its_win_rates_are_the_theorys(page, family, n, kl):
    for name, t, transform in (
        ("identity", 0, "identity"),
        ("logarithm", 0, "logarithm"),
        ("exponential", 10, "exponential(10)"),
        ("exponential", -10, "exponential(-10)"),
        ("optimal", 0, "optimal"),
    ):
        procedure = parse("sampling" if n == 1 else f"{family}_of_{n}")
        expected = Objective.parse(transform, procedure.name, kl).ideal(kl)
        given = [name, t, family, n, kl]
        found = page.evaluate("([name, t, family, n, kl]) => winRate(policy(name, t, family, n, kl), family, n)", given)
        assert found == pytest.approx(expected.win_rate(procedure), abs=1e-3), transform


def test_the_sliders_move_what_is_shown(page):
    rows = page.locator("#rows tr")
    assert rows.count() == 4 and "exponential(10)" in rows.nth(2).inner_text()
    before = rows.nth(2).inner_text()
    page.locator("#t").fill("-10")
    page.locator("#family").select_option("worst")
    page.wait_for_function("document.querySelector('#rows').innerText.includes('exponential(-10)')")
    assert page.locator("#named").inner_text() == "worst-of-4" and rows.nth(2).inner_text() != before
    assert not page.locator("th.cost").is_visible()
    ideal = Objective.parse("exponential(-10)", "worst_of_4", 0.6).ideal(0.6).win_rate(parse("worst_of_4"))
    assert f"{100 * ideal:.1f}" in rows.nth(2).inner_text()
    assert page.locator("svg path").count() == 12


@pytest.mark.parametrize("width", [380, 1100])
def test_it_fits_any_screen(open_page, tmp_path, width):
    command_line.main(["explore", "--output", str(tmp_path / "explorer.html")])
    page = open_page((tmp_path / "explorer.html").as_uri(), width=width, dark=width < 500)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
