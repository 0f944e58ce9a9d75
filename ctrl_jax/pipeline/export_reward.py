"""The reward model that was trained here as a sequence classifier, which transformers and vLLM read, and what its
rewards of the reference's responses are.

The score is read at a response's last token, as in training: at the token that ends the reply where it is finished. Two
things of a policy's directory would spoil that. Many models pad with the very token that ends a reply, which a
classifier then takes for padding: another control token pads here. And many templates write white space behind the last
turn, most often a newline: it is left out here.
"""

import json
from pathlib import Path

import jax
import numpy as np

from ctrl_jax.config import Experiment
from ctrl_jax.data import pretrained_tokenizers
from ctrl_jax.data.conversations import Turn
from ctrl_jax.errors import InputError
from ctrl_jax.models import huggingface, networks, weights
from ctrl_jax.pipeline import assembly, calibrate, export, reward_model, sft
from ctrl_jax.pipeline.calibrate import Calibrated
from ctrl_jax.pipeline.run import Run
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.console import say

CALIBRATION = "calibration.jsonl"
"""A row a training prompt, `{"prompt": ..., "rewards": [...]}`: the rewards of the reference's responses, ascending; or
the quantiles that the calibration kept of them."""
TEMPLATE = "chat_template.jinja"
_WITHOUT_SPACE_BEHIND = (
    "{%% set written %%}\n%s{%% endset %%}{{ written if add_generation_prompt is true else written.rstrip() }}"
)


def check(experiment: Experiment, output: Path) -> None:
    """Refuses, before anything is trained, what could not be written.

    Raises:
      InputError: if the reward is not a network with one head on a response's last token, if that is none that a
        Hugging Face directory can hold, or if the output is not empty.
    """
    config = experiment.reward_model
    if not config.trained:
        field = "reward_model.function" if config.path is None else "reward_model.path"
        raise InputError(
            f"The reward of this experiment is `{field}`, which was not trained here",
            field=field,
            value=config.function or config.path,
            remedy="there is nothing to export.",
        )
    export.check_model(experiment, "the reward model")
    if config.linear:
        raise InputError(
            "`reward_model.linear` reads the mean of a response's features, where a sequence classifier reads the last",
            field="reward_model.linear",
            value=True,
            remedy="train a network instead, or use the run's own (`make sample`, the library).",
        )
    if config.members > 1:
        raise InputError(
            f"`reward_model.members` is {config.members}, and a sequence classifier with one label has one head",
            field="reward_model.members",
            value=config.members,
            remedy="train one.",
        )
    weights.check_new(output)


def run(run: Run, output: Path) -> None:
    """Trains what is not trained yet, and writes the reward model to `output`; call `check` first."""
    experiment = run.experiment
    reference = sft.run(run)
    rewarded = reward_model.alone(run, reference)
    # A combination's table has its rewards, and not the reward model's.
    counted = assembly.is_calibrated(experiment) and not experiment.combines
    calibrated = calibrate.run(run, reference, rewarded.reward) if counted else None
    assert rewarded.params is not None and experiment.model.path is not None, "check refuses it"
    params = networks.merged(run.models, rewarded.params)["params"]
    params = hosts.addressable(jax.tree.map(lambda x: x.astype(run.architecture.dtype), params))
    if not hosts.first():
        return
    folder = Path(experiment.model.path)
    beside, pad = _beside(run, folder)
    if calibrated is not None:
        beside[CALIBRATION] = _rows(run, calibrated)
    config = huggingface.classifier_config(folder, pad_token_id=pad)
    weights.save_classifier(output, params["trunk"], params["head"], run.architecture, config, beside=beside)
    _say_where_it_ends(run, output)
    say(
        f"Reward model: {output}. Load it with "
        f"transformers.AutoModelForSequenceClassification.from_pretrained({str(output)!r})."
    )
    if calibrated is not None:
        say(f"The reference's rewards on {len(calibrated.table.rewards)} training prompts: {output / CALIBRATION}.")


def _say_where_it_ends(run: Run, folder: Path) -> None:
    """Says where the template writes a token behind the one that ends a reply, at which training reads the score."""
    rows, form = run.architecture.vocabulary_size, run.corpus.format
    tokenizer = pretrained_tokenizers.load(folder, embedding_rows=rows, format=form)
    written = tokenizer.encode_conversation((Turn("user", "Hello?"),), "Hello.")
    if form == "chat" and written[-1] not in tokenizer.eos_ids:
        say(
            "The chat template does not end where a reply ends in training: give the classifier the tokens of prompt "
            "and response, and not a text that the template has written.",
            style="yellow",
        )


def _beside(run: Run, folder: Path) -> tuple[dict[str, bytes], int | None]:
    """(files beside the weights, the id of the token that pads), so that scores are read where the reply ends."""
    files = {path.name: path.read_bytes() for path in export.beside(folder)}
    ends = run.corpus.tokenizer.eos_ids
    padding = pretrained_tokenizers.padding_token(folder, embedding_rows=run.architecture.vocabulary_size, ends=ends)
    if padding is not None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            settings = json.loads(files.get(name, b"{}"))
            if name == "tokenizer_config.json" or "pad_token" in settings:
                settings["pad_token"] = padding[0]
                files[name] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    if run.corpus.format == "chat" and (template := pretrained_tokenizers.template_source(folder)) is not None:
        # Jinja drops a newline at a source's end.
        files[TEMPLATE] = (_WITHOUT_SPACE_BEHIND % template.removesuffix("\n")).encode()
    return files, None if padding is None else padding[1]


def _rows(run: Run, calibrated: Calibrated) -> bytes:
    prompts = run.corpus.prompts("train", run.experiment.calibration.prompts).prompts
    rewards = np.sort(np.asarray(calibrated.table.rewards), axis=1).tolist()
    rows = [{"prompt": one.asked, "rewards": row} for one, row in zip(run.corpus.asked(prompts), rewards, strict=True)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode(errors="backslashreplace")
