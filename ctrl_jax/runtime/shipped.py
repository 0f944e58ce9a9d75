"""The experiments that come with an installed package: the checkout's experiments/, below the package's own folder."""

import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "shipped"
"""Holds `experiments/`; a checkout has none, and its experiments/ where commands are run."""
EXPERIMENTS = FOLDER / "experiments"


def make_importable() -> None:
    """Lets `import experiments.rewards.brevity` find what was shipped, behind a folder experiments/ of the user's."""
    if EXPERIMENTS.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
