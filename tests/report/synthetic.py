"""A plausible work directory without a model: ranks drawn from an ideal policy, and a gold reward they only follow."""

import json
import pathlib
from typing import Any

import numpy as np

from ctrl_jax.pipeline import results
from ctrl_jax.theory import ideal, optimal, procedures, transforms

PROCEDURES = ("sampling", *(f"{side}_of_{n}" for side in ("best", "worst") for n in (2, 4, 8, 16)))
KL = 0.73


def write_work_dir(
    work_dir: pathlib.Path,
    *,
    transform: str = "exponential(10)",
    procedure: str = "best_of_4",
    kl: float = KL,
    gold: bool = True,
    prompts: int = 40,
    responses: int = 24,
    samples: int = 32,
    names: tuple[str, ...] = PROCEDURES,
    seed: int = 0,
    along: tuple[float, ...] = (),
) -> pathlib.Path:
    """`along` are the KLs after some steps of the training."""
    random = np.random.default_rng(seed)
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / "config.json").write_text(json.dumps(config(work_dir.name, transform, procedure, names)))
    arrays = rewards(random, transform, procedure, kl, prompts, responses)
    if not gold:
        arrays = {name: array for name, array in arrays.items() if "gold" not in name and "judge" not in name}
    arrays |= along_arrays(transform, procedure, along, arrays["reference_rewards"]) if along else {}
    np.savez(work_dir / "evaluation.npz", **arrays)
    (work_dir / "evaluation.json").write_text(json.dumps(evaluation(arrays, transform, kl, names)))
    with (work_dir / "metrics.jsonl").open("w") as lines:
        for row in metrics(random, kl):
            lines.write(json.dumps(row) + "\n")
    with (work_dir / "samples.jsonl").open("w") as lines:
        for index in range(samples):
            lines.write(json.dumps(sample(arrays, index % prompts, index)) + "\n")
    seal(work_dir)
    return work_dir


def seal(work_dir: pathlib.Path) -> None:
    """Says that what is there is what was written."""
    results.seal(work_dir, json.loads((work_dir / "config.json").read_text()))


def config(name: str, transform: str, procedure: str, names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "name": name,
        "seed": 0,
        "data": {"source": "dialogues/helpful", "dialogues": 12000, "prompt_length": 40, "response_length": 40},
        "calibration": {"prompts": 256, "samples_per_prompt": 128},
        "policy": {"transform": transform, "procedure": procedure, "kl_budget": 0.75, "beta": None, "steps": 150,
                   "prompts_per_step": 32, "samples_per_prompt": 16, "learning_rate": 1e-3},
        "evaluation": {"prompts": 40, "procedures": list(names)},
    }  # fmt: skip


def policy_of(transform: str, procedure: str, kl: float) -> ideal.IdealPolicy:
    if transform == "optimal":
        return ideal.at_kl(optimal.optimal_transform(procedures.parse(procedure), kl=kl), kl)
    return ideal.at_kl(transforms.parse("identity" if transform == "raw" else transform), kl)


def rewards(
    random: np.random.Generator, transform: str, procedure: str, kl: float, prompts: int, responses: int
) -> dict[str, np.ndarray]:
    grid = np.linspace(0, 1, 513)
    # Somewhat short of the ideal, as a trained policy is.
    cumulative = np.asarray(policy_of(transform, procedure, 0.85 * kl).cdf(grid), float)
    uniform = random.uniform(size=(2, prompts, responses))
    ranks = {"policy": np.interp(uniform[0], cumulative, grid), "reference": uniform[1]}
    level = random.normal(size=(prompts, 1))
    raw = {side: np.round(level + 2 * np.log((u + 1e-3) / (1 - u + 1e-3)), 2) for side, u in ranks.items()}
    # The proxy follows the gold reward, and least so where the policy went to please the proxy.
    gold = {
        side: level
        + 2.2 * u
        - (0.5 * np.maximum(u - 0.7, 0) if side == "policy" else 0)
        + random.normal(0, 0.35, u.shape)
        for side, u in ranks.items()
    }
    apart = random.normal(0, 0.1 * kl, prompts)
    bins = np.linspace(0, 1, 11)
    predicted = (bins[1:] + bins[:-1]) / 2
    count = np.array([90, 240, 330, 410, 440, 440, 410, 330, 240, 90.0])
    return {
        **{f"{side}_rewards": raw[side] for side in raw},
        "policy_calibrated": calibrated(raw["policy"], raw["reference"]),
        "reference_calibrated": (calibrated(raw["reference"], raw["reference"]) * responses - 0.5) / (responses - 1),
        **{f"{side}_gold": gold[side] for side in gold},
        "kl": kl + apart - apart.mean(),
        # Another opinion, further from the proxy than gold is.
        **{f"{side}_judge": gold[side] + random.normal(0, 1, gold[side].shape) for side in gold},
        **{f"{side}_lengths": np.clip(random.normal(25, 8, u.shape).round(), 1, 40) for side, u in ranks.items()},
        "reliability_predicted": predicted,
        "reliability_observed": np.round((predicted - 0.5) * 0.88 + 0.5 + random.normal(0, 0.012, 10), 3),
        "reliability_count": count,
        "margins": random.normal(0.4, 1.0, 1510),
        "validation_step": np.arange(10.0, 70, 10),
        "validation_training_loss": np.array([0.69, 0.66, 0.6, 0.5, 0.35, 0.2]),
        "validation_loss": np.array([0.69, 0.675, 0.66, 0.64, 0.66, 0.71]),
        "validation_accuracy": np.array([0.5, 0.55, 0.58, 0.62, 0.61, 0.6]),
    }


def along_arrays(
    transform: str, procedure: str, kls: tuple[float, ...], reference: np.ndarray, *, responses: int = 16
) -> dict[str, np.ndarray]:
    """Of policies that are somewhat short of the ideal too, with fewer responses."""
    random, grid = np.random.default_rng(len(reference)), np.linspace(0, 1, 513)
    rewards, kl = [], []
    for mean in kls:
        cumulative = np.asarray(policy_of(transform, procedure, 0.85 * mean).cdf(grid), float)
        u = np.interp(random.uniform(size=(len(reference), responses)), cumulative, grid)
        # A rank u of the reference's rewards of the same prompt.
        rewards.append([np.quantile(row, ranks) for row, ranks in zip(reference, u, strict=True)])
        apart = random.normal(0, 0.05, len(reference))
        kl.append(mean + apart - apart.mean())
    steps = 10 * np.arange(1, len(kls) + 1)
    return {"along_steps": steps, "along_rewards": np.array(rewards), "along_kl": np.array(kl)}


def calibrated(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    wins = np.sign(values[:, :, None] - reference[:, None, :]) / 2 + 0.5
    return wins.mean(axis=2)


def win_rates(arrays: dict[str, np.ndarray], judge: str, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """What `judge` says of the picks by the rewards."""
    order = {side: np.argsort(arrays[f"{side}_rewards"], axis=1) for side in ("policy", "reference")}
    policy, reference = (np.take_along_axis(arrays[f"{side}_{judge}"], order[side], axis=1) for side in order)
    wins = np.sign(policy[:, :, None] - reference[:, None, :]) / 2 + 0.5
    table = {}
    for name in names:
        rule = procedures.parse(name)
        weights = [np.asarray(rule.order_weights(side.shape[1]), float) for side in (policy, reference)]
        table[name] = interval(np.einsum("bij,i,j->b", wins, *weights))
    return table


def interval(values: np.ndarray) -> dict[str, float]:
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return {"mean": float(values.mean()), "low": float(values.mean() - half), "high": float(values.mean() + half)}


def evaluation(arrays: dict[str, np.ndarray], transform: str, kl: float, names: tuple[str, ...]) -> dict[str, Any]:
    table: dict[str, Any] = {
        "kl": {"mean": kl, "low": kl - 0.021, "high": kl + 0.021},
        "kl_budget": 0.75,
        "win_rates": win_rates(arrays, "rewards", names),
        "judged_by": "the reward model that the policy was trained on",
        "judge": None,
        "ideal": {
            name: {
                "identity": policy_of("identity", name, kl).win_rate(procedures.parse(name)),
                "transform": None
                if transform == "raw"
                else policy_of(transform, name, kl).win_rate(procedures.parse(name)),
                "optimal": policy_of("optimal", name, kl).win_rate(procedures.parse(name)),
            }
            for name in names
        },
        "reward_model": {
            "pairs": 1210,
            "accuracy": 0.7431,
            "accuracy_low": 0.7177,
            "accuracy_high": 0.7669,
            "ece": 0.0217,
            "brier": 0.1743,
            "margin_length_correlation": 0.312,
        },
        "reward_training": {
            "pairs": 1500,
            "cut": 400,
            "dropped": 0,
            "steps": 60,
            "used_step": 40,
            "validation_pairs": 250,
        },
        "reward_signal": {
            "length_correlation": {"mean": 0.121, "low": 0.052, "high": 0.191},
            "learnability": {"mean": 0.412, "low": 0.361, "high": 0.462},
        },
        "ties": 0.0123,
        "response_length": {
            side: {
                "mean": float(arrays[f"{side}_lengths"].mean()),
                **{
                    name: float(np.quantile(arrays[f"{side}_lengths"], q))
                    for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))
                },
            }
            for side in ("policy", "reference")
        },
        "unfinished": {"policy": 0.021, "reference": 0.017},
        "timings": {"sft": 81.2, "reward_model": 64.9, "calibrate": 40.2, "train": 251.7, "evaluate": 66.3},
    }
    if "along_steps" in arrays:
        table["along"] = [
            {
                "step": int(step),
                "kl": interval(point_kl),
                "win_rates": win_rates(
                    {"policy_rewards": point, "reference_rewards": arrays["reference_rewards"]}, "rewards", names
                ),
            }
            for step, point, point_kl in zip(
                arrays["along_steps"], arrays["along_rewards"], arrays["along_kl"], strict=True
            )
        ]
    if "policy_gold" in arrays:
        table["gold_win_rates"] = win_rates(arrays, "gold", names)
    if "policy_judge" in arrays:
        table["judge"] = {"name": "rewards:second_opinion", "fingerprint": "function-0123456789ab"}
        table["judge_win_rates"] = win_rates(arrays, "judge", names)
    return table


def metrics(random: np.random.Generator, kl: float) -> list[dict[str, float]]:
    rows = []
    for step in range(150):
        share = 1 - np.exp(-step / 30)
        noise = random.normal(size=4)
        measured = kl * share * (1 + 0.05 * noise[0])
        rows.append(
            {
                "step": step,
                "kl": measured,
                "kl_k1": measured + 0.05 * noise[1],
                "kl_k3": measured,
                "kl_standard_error": 0.015 + 0.02 * share,
                "kl_budget": 0.75,
                "beta": 0.08 * float(np.exp(-0.4 * share + 0.02 * noise[1])),
                "raw_reward": 2 * share,
                "calibrated_reward": 0.5 + 0.27 * share + 0.01 * noise[2],
                "transformed_reward": 0.3 * share,
                "win_rate": 0.5 + 0.37 * share**0.7 + 0.012 * noise[3],
                "response_length": 31.0,
                "unfinished": 0.02,
                "gradient_norm": 0.4,
                "sampler_scorer_gap": 1e-6,
                "learning_rate": 1e-3,
            }
        )
    return rows


def sample(arrays: dict[str, np.ndarray], prompt: int, index: int) -> dict[str, Any]:
    def pick(side: str, text: str) -> dict[str, Any]:
        best = int(arrays[f"{side}_rewards"][prompt, :4].argmax())
        gold = arrays.get(f"{side}_gold")
        return {
            "text": text,
            "reward": float(arrays[f"{side}_rewards"][prompt, best]),
            "calibrated": float(arrays[f"{side}_calibrated"][prompt, best]),
            "gold": None if gold is None else float(gold[prompt, best]),
        }

    return {
        "prompt": f"Human: how do I keep basil number {index} alive over the winter?\n\nAssistant:",
        "policy": pick("policy", " put it by a bright window, water when the soil is dry, and pinch the tips."),
        "reference": pick("reference", " i am not sure. maybe you can water it."),
    }  # fmt: skip
