import io
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from ctrl_jax.report import pictures
from ctrl_jax.report.measurements import Run
from ctrl_jax.report.panel import PANEL_SIZE
from ctrl_jax.report.panels import win_rate_vs_n


def test_pictures_have_the_asked_shape_on_a_transparent_ground(run: Run) -> None:
    panels = win_rate_vs_n.panels(run)
    drawn = pictures.draw(panels, ("png", "svg", "pdf"), columns=2, dots_per_inch=100)
    with Image.open(io.BytesIO(drawn["png"])) as picture:
        width, height = 2 * 100 * PANEL_SIZE[0], 100 * (PANEL_SIZE[1] + 0.3)
        assert picture.size == pytest.approx((width, height), abs=2)
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    assert alpha[0, 0] == 0 and (alpha == 0).mean() > 0.5, "the ground is left to the slide"
    root = xml.etree.ElementTree.fromstring(drawn["svg"])
    assert root.tag.endswith("svg")
    grounds = [element for element in root.iter() if element.get("id") in ("patch_1", "patch_2")]
    assert grounds and all("fill: none" in str(path.get("style")) for ground in grounds for path in ground)
    assert drawn["pdf"].startswith(b"%PDF")
    assert pictures.draw(panels, ("png", "svg", "pdf"), columns=2, dots_per_inch=100) == drawn
    with Image.open(io.BytesIO(pictures.draw(panels, ("png",), columns=2, ground="white")["png"])) as picture:
        assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_no_global_plotting_state() -> None:
    code = "import sys, ctrl_jax.commands.report; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
