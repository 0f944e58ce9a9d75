"""The keys of stages."""

import jax
import numpy as np

from ctrl_jax.pipeline import randomness


def test_stage_keys_differ_by_seed_and_stage():
    keys = [randomness.stage_key(seed, stage) for seed in (0, 1) for stage in ("sft", "policy")]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == 4
