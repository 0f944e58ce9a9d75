"""The gold reward of the generated dialogues, known in closed form. It judges; nothing is trained on it."""

import numpy as np

from ctrl_jax.data.conversations import transcript
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.data.language import gold_reward
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.types import Prompts, Responses


def reward(corpus: Corpus) -> Reward:
    """The gold reward of responses to the prompts of generated dialogues."""

    def score(prompts: Prompts, responses: Responses) -> np.ndarray:
        asked, texts = map(transcript, corpus.conversations(prompts)), corpus.texts(responses)
        return np.array([[gold_reward(prompt, text) for text in row] for prompt, row in zip(asked, texts, strict=True)])

    return Reward(score, "gold", name="gold")
