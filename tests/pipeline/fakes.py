"""The whole path with fakes in place of trainings and samplings, functions of what the real ones are given.

It takes a fraction of a second. All else is the product's own: keys, seals, claims, data, tokenizers, functions.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from ctrl_jax.commands import report, summary
from ctrl_jax.commands.train import align
from ctrl_jax.config import (
    Calibration,
    Combine,
    Data,
    Evaluation,
    Experiment,
    GroupProjection,
    Model,
    Policy,
    RewardModel,
    Supervised,
)  # fmt: skip
from ctrl_jax.devices import parameters, programs
from ctrl_jax.devices.mesh import make_mesh
from ctrl_jax.errors import InputError
from ctrl_jax.models import networks, weights
from ctrl_jax.pipeline import assembly, evaluate, linear, randomness, reward_model, rollouts, sft, stages, supervised
from ctrl_jax.pipeline import start as start_stage
from ctrl_jax.pipeline.results import without_neutral
from ctrl_jax.pipeline.workspace import Workspace
from ctrl_jax.rewards import classifier, trained
from ctrl_jax.runtime import checksums
from ctrl_jax.runtime.stages import read_json, write_json
from ctrl_jax.theory.objective import Objective
from ctrl_jax.types import Responses, Rollouts
from tests.pipeline.pretrained import CLASSIFIER, write_model


def digest(*parts: Any) -> int:
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16)


def value(tree: Any) -> str:
    return checksums.of_arrays(jax.tree.map(np.asarray, tree))


# Fakes of what computes: each depends on all that the real one does.


class Fakes:
    """In place of trainings, samplings and scorings."""

    def __init__(self) -> None:
        self.made: list[str] = []
        """The trainings that were done and not read."""
        self.sampled: dict[str, tuple[Rollouts, np.ndarray]] = {}
        self.sampled_by: dict[str, Any] = {}  # by stage: the parameters that drew
        """The last rollouts of each stage with their raw rewards [B, N]."""
        self.scored: list[np.ndarray] = []
        """The raw rewards [B, N] that the reward model gave."""
        self.experiment: Experiment

    @contextlib.contextmanager
    def open_training(self, label, state, batches, *, directory, fingerprint, **others):
        number = self.trained(label, state, batches, directory, fingerprint)
        params = {"w": np.array([number], np.uint32)}
        state = SimpleNamespace(params=params, extra=SimpleNamespace(params=params))
        yield SimpleNamespace(state=state, updates=lambda _: ())

    def trained(self, label, state, batches, directory, fingerprint):
        saved = directory / "checkpoints" / "1" / "state.json"
        seal = saved.with_name("checksums.json")
        if checksums.broken(seal):
            shutil.rmtree(saved.parent, ignore_errors=True)  # checkpoints.py sets it aside
        if saved.exists():
            found = read_json(saved)
            if found["fingerprint"] != fingerprint:
                raise InputError("was saved by another configuration")
            return found["value"]
        section = {sft.LABEL: "sft", reward_model.LABEL: "reward_model", start_stage.LABEL: "start"}.get(
            label, "policy"
        )
        self.made.append(section)
        options = without_neutral(getattr(self.experiment, section))
        drawn = randomness.draws(), self.experiment.seed, stages.VERSIONS[section]
        model = without_neutral(self.experiment.model.lora)
        number = digest(value(state.params), value(next(batches)), batches._fingerprint, options, drawn, model)
        write_json(saved, {"fingerprint": fingerprint, "value": number})
        write_json(seal, checksums.sealed(saved.parent, ["state.json"], {"step": 1}))
        (directory / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": 1.0}) + "\n")
        return number

    def sampling(self, run, stage, params, score, num_samples):
        experiment = run.experiment
        settings = (stage, value(params), experiment.seed, experiment.policy.temperature, randomness.draws())
        settings += (run.corpus.tokenizer.eos_ids, experiment.model.dtype, stages.VERSIONS)
        length = experiment.data.response_length

        def both(batch):
            batch = jax.tree.map(np.asarray, batch)
            shape = (len(batch.ids), num_samples)
            tokens, lengths = np.zeros((*shape, length), np.int32), np.zeros(shape, np.int32)
            eos = run.corpus.tokenizer.eos_ids[0]
            for row, prompt in enumerate(zip(batch.ids.tolist(), batch.tokens.tolist(), strict=True)):
                for sample in range(num_samples):
                    random = np.random.default_rng(digest(settings, prompt, sample))
                    tokens[row, sample] = random.integers(3, 200, length)
                    # One in three is cut at the most tokens; the others end in EOS, and more of it behind. The first of
                    # a prompt ends with its last token.
                    end = length if sample == 0 else random.integers(1, 1 + 3 * length // 2)
                    lengths[row, sample] = end
                    tokens[row, sample, end - 1 :] = eos
            lengths = np.minimum(lengths, length)
            rollouts = Rollouts(batch, Responses(tokens, lengths), np.zeros(tokens.shape, np.float32))
            self.sampled_by[stage] = value(params)
            self.sampled[stage] = rollouts, np.asarray(score(batch, rollouts.responses))
            return self.sampled[stage]

        return both

    def scorer(self, models, mesh):
        def score(params, prompts, responses):
            prompts, responses = jax.tree.map(np.asarray, (prompts, responses))
            seen = value(params)
            rows = zip(prompts.tokens.tolist(), responses.tokens.tolist(), strict=True)
            # Some tie, and their differences are log-odds that say something.
            rewards = [[digest(seen, row, text) % 13 / 4 for text in texts] for row, texts in rows]
            self.scored.append(np.array(rewards, np.float32))
            if models.members > 1:
                return np.stack([self.scored[-1] % (2 + member) for member in range(models.members)], axis=-1)
            return self.scored[-1]

        return score


def fake_weights(folder, *_, **__):
    return {"read": np.frombuffer((Path(folder) / "model.safetensors").read_bytes(), np.uint8)}


def fake_pretrained(workspace):
    """As `sft.pretrained`, which reads the model and the adapter."""
    model = workspace.experiment.model
    adapter = None if model.adapter is None else (Path(model.adapter) / "adapter_model.safetensors").read_bytes()
    return {"base": np.array([digest(value(fake_weights(model.path)), adapter)], np.uint32)}


def fake_features(models, mesh):
    """As `assembly.pooled_features`: a function of all that the real one reads."""

    def features(params, prompts, responses):
        prompts, responses = jax.tree.map(np.asarray, (prompts, responses))
        seen, width = value(params), models.architecture.width
        rows = zip(prompts.tokens.tolist(), responses.tokens.tolist(), strict=True)
        found = [
            [np.random.default_rng(digest(seen, row, text)).normal(size=width) for text in texts] for row, texts in rows
        ]
        return np.array(found, np.float32)

    return features


def key_data(key):
    return np.asarray(jax.random.key_data(key))


FAKES = {
    (parameters, "check_they_divide"): lambda *_: None,
    (parameters, "init_decoder"): lambda parts, mesh, key: {
        "key": key_data(key),
        "sizes": np.array([digest(parts.architecture)]),
    },
    (parameters, "adapt_decoder"): lambda parts, mesh, key, params: {"key": key_data(key), "params": params},
    (parameters, "adapt_reward"): lambda parts, mesh, key, params: ({}, {"key": key_data(key), "params": params}),
    (parameters, "reward_of"): lambda parts, mesh, reference, kernel: {
        "params": reference,
        "kernel": np.asarray(kernel),
    },
    (networks, "merged"): lambda parts, params: params,
    (programs, "init_state"): lambda params, *_: SimpleNamespace(params=params),
    (supervised, "starting"): lambda mesh, state: state,
    (assembly, "sft_step"): lambda *_, **__: None,
    (assembly, "reward_model_step"): lambda *_, **__: None,
    (assembly, "reward_ensemble_step"): lambda *_, **__: None,
    (assembly, "policy_step"): lambda *_, **__: None,
    (assembly, "pooled_features"): fake_features,
    (assembly, "reward_features"): fake_features,
    (assembly, "update"): lambda *_, **__: None,
    # Of the tokens that were drawn, which follow from the parameters.
    (assembly, "log_probs"): lambda *_, **__: (
        lambda params, prompts, responses: -np.asarray(responses.tokens, np.float32).sum(-1)
    ),
}


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes()
    for (module, name), fake in FAKES.items():
        monkeypatch.setattr(module, name, fake)
    made = linear._make
    monkeypatch.setattr(linear, "_make", lambda *given: (fakes.made.append("reward_model"), made(*given))[1])
    monkeypatch.setattr(Objective, "beta", lambda *_: 1.0)
    monkeypatch.setattr(trained, "scorer", fakes.scorer)
    monkeypatch.setattr(classifier, "scorer", fakes.scorer)
    monkeypatch.setattr(reward_model, "scorer", fakes.scorer)
    monkeypatch.setattr(rollouts, "_sampling", fakes.sampling)
    monkeypatch.setattr(weights, "load", fake_weights)
    monkeypatch.setattr(weights, "load_reward_head", fake_weights)
    monkeypatch.setattr(sft, "pretrained", fake_pretrained)
    monkeypatch.setattr(
        evaluate, "_kl_by_prompt", lambda run, aligned, sampled: 1.0 + np.arange(len(sampled.log_probs))
    )
    monkeypatch.setattr(report, "write", lambda work_dir: work_dir)
    monkeypatch.setattr(summary, "print_run", lambda *_: None)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return fakes


# What is run: the experiments, and the files that they name.

TRAINING = {"steps": 4, "batch_size": 4, "warmup_steps": 1}
COMMON = {
    "calibration": Calibration(prompts=6, samples_per_prompt=8),
    "policy": Policy(steps=4, prompts_per_step=4, samples_per_prompt=4, warmup_steps=1, procedure="best_of_2"),
    "evaluation": Evaluation(
        prompts=5, responses_per_prompt=6, procedures=("sampling", "best_of_2"), bootstrap_resamples=100
    ),
}
JSONL = Data(source="jsonl", path="data", prompt_length=80, response_length=8)
EXPERIMENTS = {
    "function": Experiment(
        "run", data=JSONL, model=Model(path="model", adapter="adapter"), sft=Supervised(**TRAINING),
        reward_model=RewardModel(function="rewards:reward"), **COMMON,
    ),
    "start": Experiment(
        "run", data=JSONL, model=Model(path="model"), sft=Supervised(steps=0),
        reward_model=RewardModel(function="rewards:reward"),
        start=GroupProjection(
            steps=4, prompts_per_step=4, samples_per_prompt=4, warmup_steps=1, procedure="best_of_2", kl_budget=0.5
        ),
        **{**COMMON, "calibration": Calibration(prompts=6, samples_per_prompt=8, keep_responses=True)},
    ),
    "classifier": Experiment(
        "run", data=JSONL, model=Model(path="model"), sft=Supervised(steps=0),
        reward_model=RewardModel(path="classifier"), **COMMON,
    ),
    "combined": Experiment(
        "run", data=JSONL, model=Model(path="model"), sft=Supervised(steps=0),
        reward_model=RewardModel(path="classifier"), combine=Combine(rewards=("rewards:reward", "./second")), **COMMON,
    ),
    "members": Experiment(
        "run", data=JSONL, model=Model(path="model"), sft=Supervised(steps=0),
        reward_model=RewardModel(members=2, **TRAINING), **COMMON,
    ),
    "trained": Experiment(
        "run", data=Data(dialogues=300, vocabulary_size=300, prompt_length=60), sft=Supervised(**TRAINING),
        reward_model=RewardModel(**TRAINING), **COMMON,
    ),
}  # fmt: skip

FILES = {
    "rewards.py": """
import json
from pathlib import Path

import helpers


def reward(prompts, responses):
    import lazily

    scale = json.loads(Path("scale.json").read_text())
    return [scale * helpers.SIGN * (len(text) + lazily.OFFSET + sum(map(ord, text)) % 97) for text in responses]


def reward_too(prompts, responses):
    return [2 * one for one in reward(prompts, responses)]
""",
    "helpers.py": "SIGN = 1",
    "lazily.py": "OFFSET = 1",
    "unused.py": "X = 1",
    "scale.json": "1.0",
}


def rows(start: int, count: int) -> str:
    return "".join(
        json.dumps(
            {"prompt": f"What is {i} and {i}?", "response": f"{2 * i}.", "chosen": f"{2 * i}!", "rejected": "Hm."}
        )
        + "\n"
        for i in range(start, start + count)
    )


def write_inputs(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "data").mkdir()
    for split, start, count in (("train", 0, 12), ("validation", 100, 2), ("test", 200, 6)):
        (folder / "data" / f"{split}.jsonl").write_text(rows(start, count))
    write_model(folder / "model", num_hidden_layers=1)
    write_adapter(folder / "adapter")
    write_model(folder / "classifier", num_hidden_layers=1, **CLASSIFIER)
    write_model(folder / "second", num_hidden_layers=1, **CLASSIFIER)


def write_adapter(folder: Path) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{prefix}.lora_A.weight": (2, 32), f"{prefix}.lora_B.weight": (32, 2)}
    tensors = {name: np.ones(shape, np.float32) for name, shape in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def train(fakes: Fakes, experiment: Experiment, work_dir: str = "runs/work", stages_dir: str = "runs/stages") -> None:
    """As a process of its own would: nothing is known of an earlier one."""
    for name in ("rewards", "helpers", "lazily"):
        sys.modules.pop(name, None)
    fakes.experiment, fakes.made = experiment, []
    align(Workspace(experiment, Path(work_dir), Path(stages_dir), make_mesh(1), open_training=fakes.open_training))


def results(work_dir: str) -> dict[str, Any]:
    """What the evaluation says, but for timings and the name of the judge, which has the place of its files."""
    return {**read_json(Path(work_dir) / "evaluation.json"), "timings": None, "judged_by": None}


@pytest.fixture(scope="session")
def first(tmp_path_factory):
    """A folder of inputs with a finished run of each experiment."""
    found = {}
    for base in EXPERIMENTS:
        folder = tmp_path_factory.mktemp(base)
        write_inputs(folder)
        found[base] = folder
    return found


@pytest.fixture
def prepared(first, fakes, tmp_path, monkeypatch):
    """A copy of an experiment's folder, with its first run, as the current folder."""

    def prepare(base: str) -> Path:
        monkeypatch.chdir(first[base])
        if not Path("runs").exists():
            train(fakes, EXPERIMENTS[base])
        folder = Path(shutil.copytree(first[base], tmp_path / base))
        monkeypatch.chdir(folder)
        return folder

    return prepare
