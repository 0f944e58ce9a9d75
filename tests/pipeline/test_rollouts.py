"""Batches of rollouts; what they hold is in tests/pipeline/test_calibrate.py and tests/devices/test_programs.py."""

import contextlib
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from ctrl_jax.pipeline import rollouts
from ctrl_jax.runtime import preemption


def test_a_batch_in_which_sigterm_was_swallowed_is_not_kept(mesh, monkeypatch):
    """As by a reward function that catches everything, and returns 0 instead."""
    monkeypatch.setattr(rollouts, "prompts_at_a_time", lambda *_: 1)
    run = SimpleNamespace(mesh=mesh, architecture=None, experiment=SimpleNamespace(data=None))

    def reward(batch):
        if int(batch[0]) == 8:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
            return np.zeros(8)
        return np.asarray(batch)

    kept = []
    with pytest.raises(preemption.Preempted), preemption.raising():
        for part in rollouts.batches(run, "rewards", reward, np.arange(24), together=8):
            kept.append(part)
    np.testing.assert_array_equal(kept, [np.arange(8)])
