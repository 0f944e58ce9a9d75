"""The reference's responses, as the calibration stage keeps them: a record a response, [B, K] in one file.

A prompt's responses are in the order in which they were drawn, which says nothing of their rewards. So N after the
other are a random group.
"""

from typing import Any

import jax
import numpy as np

from ctrl_jax import config
from ctrl_jax.errors import InputError
from ctrl_jax.runtime.stages import RowFile, Stage, read_rows
from ctrl_jax.types import Prompts, Responses, StoredResponses

FILE = "responses.npy"


def record(data: config.Data, vocabulary_size: int) -> np.dtype:
    """What is kept of a response. Its tokens are padded, and take 2 bytes each, or 4 where the vocabulary is large."""
    token = np.uint16 if vocabulary_size <= 2**16 else np.int32
    return np.dtype([
        ("log_prob", np.float32),
        ("reward", np.float32),
        ("length", np.int32),
        ("tokens", token, (data.response_length,)),
    ])  # fmt: skip


def bytes_per_prompt(experiment: config.Experiment, vocabulary_size: int) -> int:
    return experiment.calibration.samples_per_prompt * record(experiment.data, vocabulary_size).itemsize


def open_file(stage: Stage, experiment: config.Experiment, vocabulary_size: int) -> RowFile:
    """Where a batch of prompts goes behind another."""
    shape = (experiment.calibration.prompts, experiment.calibration.samples_per_prompt)
    return RowFile(stage.directory / FILE, shape, record(experiment.data, vocabulary_size))


def records(responses: Responses, log_probs: np.ndarray, rewards: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The records [B, K] of responses, the log-probs of whole responses and raw rewards, each [B, K]."""
    kept = np.zeros(rewards.shape, dtype)
    kept["log_prob"], kept["reward"] = log_probs, rewards
    kept["length"], kept["tokens"] = responses.lengths, responses.tokens
    return kept


def read(stage: Stage, experiment: config.Experiment, vocabulary_size: int) -> np.ndarray:
    """The records [B, K], which stay on disk.

    Raises:
      InputError: if they are not those of the experiment.
    """
    kept = read_rows(stage.directory / FILE)
    wanted = (experiment.calibration.prompts, experiment.calibration.samples_per_prompt)
    if kept.shape != wanted or kept.dtype != record(experiment.data, vocabulary_size):
        raise InputError(
            f"{stage.directory / FILE} has responses of {kept.dtype}{list(kept.shape)}, and others were made. Move "
            f"{stage.directory} away to have them made anew."
        )
    return kept


def warning(options: config.Policy, calibration: config.Calibration) -> str | None:
    """What to say of a training that reads each stored response more than once."""
    read = options.steps * options.prompts_per_step * options.samples_per_prompt
    passes = read / (calibration.prompts * calibration.samples_per_prompt)
    if passes <= 1:
        return None
    return (
        f"The training on stored responses reads each of them {passes:.2g} times. After the first time a large model "
        "learns them by heart: the loss and the ranks that are printed are of these responses, and go on improving "
        "where new responses get worse. Fewer `steps` or more `calibration.prompts` make it one pass."
    )


def examples(prompts: Prompts, kept: np.ndarray, group: int) -> StoredResponses:
    """The records [B, K] of prompts as groups of N, which divides K: K / N of each prompt, [B K / N, N]."""
    count, size = kept.shape
    prompt = np.repeat(np.arange(count), size // group)
    groups: Any = kept.reshape(-1, group)
    every: Any = kept["reward"]
    return StoredResponses(
        jax.tree.map(lambda x: np.asarray(x)[prompt], prompts),
        Responses(groups["tokens"], groups["length"]),
        groups["log_prob"],
        groups["reward"],
        every[prompt],
    )
