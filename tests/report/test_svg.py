import re
import xml.etree.ElementTree

from ctrl_jax.report import svg
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panel import Panel
from ctrl_jax.report.panels import calibrated, frontier, reliability, training


def test_svg_is_well_formed_has_own_ids_and_only_role_colours(run: Run) -> None:
    panels = [*frontier.panels(run), *reliability.panels(run), *training.panels(run)]
    ids: list[str] = []
    for index, panel in enumerate(panels):
        text = svg.element(panel, f"chart-{index}")
        xml.etree.ElementTree.fromstring(text)
        assert "http" not in text
        assert set(re.findall(r"#[0-9a-fA-F]{6}\b", text)) <= set()
        own = re.findall(r'\bid="([^"]*)"', text)
        assert all(identifier.startswith(f"chart-{index}-") for identifier in own)
        assert {
            target for pair in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', text) for target in pair if target
        } <= set(own)
        ids += own
    assert len(set(ids)) == len(ids)


def test_svg_escapes_its_texts() -> None:
    panel = Panel("<script>", "a & b", lambda axes: None)
    assert "&lt;script&gt;: a &amp; b" in svg.element(panel, "x")


def test_svg_is_the_same_every_time(run: Run) -> None:
    panel = calibrated.panels(run)[0]
    assert svg.element(panel, "x") == svg.element(panel, "x")
