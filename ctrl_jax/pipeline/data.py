"""The data stage: generates, downloads or reads the records, and trains a tokenizer where the model brings none."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from ctrl_jax import config
from ctrl_jax.data import corruption, sources, tokenizers
from ctrl_jax.data.conversations import Record
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.data.forms import FORMS
from ctrl_jax.data.pipelines import Demonstrations, ExampleSet, LongPrompts
from ctrl_jax.data.splits import Loaded
from ctrl_jax.runtime import hosts
from ctrl_jax.runtime.console import say
from ctrl_jax.runtime.stages import DONE, Stage, fingerprint, write_bytes
from ctrl_jax.types import Examples


def prepare(data: config.Data, stage: Stage, tokenizer: tokenizers.Tokenizer | None) -> Corpus:
    """Generates, downloads or reads the records, and trains a tokenizer on them where the model brings none."""
    vocabulary = None
    with stage.exclusive(), hosts.first_then_others():
        if hosts.first() and not stage.complete:
            _discard_unfinished(stage)
        loaded = _corrupted(data, sources.load(data, stage.directory / "tfds"))
        sizes = {split: len(rows) for split, rows in loaded.records.items()}
        origin = _origin(data, loaded, sizes)
        if tokenizer is None:
            tokenizer, vocabulary = _trained(data, loaded, stage)
        if not stage.complete and vocabulary is None:
            if not data.generated:
                say(origin)
            stage.finish({**sizes, "dropped": loaded.dropped})
    return Corpus(
        loaded.records,
        tokenizer,
        prompt_length=data.prompt_length,
        response_length=data.response_length,
        long_prompts=data.long_prompts,
        format=data.format,
        source=data.source,
        origin=origin,
        vocabulary=vocabulary,
    )


def _discard_unfinished(stage: Stage) -> None:
    """Removes all that an earlier process prepared but its downloads: whether the rest is whole is not known."""
    prepared = stage.directory / "tfds"
    if prepared.exists():
        say(f"{stage.directory} was left without its {DONE}: it is prepared anew.", style="yellow")
    for path in [*prepared.glob("*"), stage.directory / tokenizers.FILENAME]:
        if path.is_dir() and path.name != "downloads":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _corrupted(data: config.Data, loaded: Loaded) -> Loaded:
    if not data.corrupted:
        return loaded
    found = corruption.corrupt(loaded.records, share=data.corrupted, prefers=data.corrupted_prefers, seed=data.seed)
    say(
        f"{found.ordered} preference pairs are in the order of {data.corrupted_prefers!r} (`data.corrupted`), "
        f"{found.turned} of them turned round.",
        style="yellow",
    )
    return replace(loaded, records=found.records)


def _origin(data: config.Data, loaded: Loaded, sizes: Mapping[str, int]) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in loaded.dropped.items())
    return (
        f"{data.source}: {loaded.rows} rows gave {sizes['train']} records to train on, {sizes['validation']} for "
        f"validation and {sizes['test']} to test on"
        + (f" ({loaded.origin})" if loaded.origin else "")
        + (f"; dropped: {dropped}." if dropped else ".")
    )


def _trained(data: config.Data, loaded: Loaded, stage: Stage) -> tuple[tokenizers.Tokenizer, str | None]:
    """The tokenizer; or the largest that the data holds, which is not kept, and what is wrong with the size."""
    path = stage.directory / tokenizers.FILENAME
    if not path.exists():
        form = FORMS[data.format]
        texts = [" ".join((form.prompt(record.prompt), *_replies(record))) for record in loaded.records["train"]]
        train = partial(tokenizers.train, texts, format=data.format)
        try:
            trained = train(vocabulary_size=data.vocabulary_size or config.VOCABULARY)
        except tokenizers.VocabularyTooLarge as error:
            trained = train(vocabulary_size=error.bound)
            if data.vocabulary_size is not None:
                return trained, str(error)
            say(f"The vocabulary has {error.bound} pieces instead of {config.VOCABULARY}: the data holds no more.")
        write_bytes(path, trained.model)
    return tokenizers.load(stage.directory, data.format), None


def _replies(record: Record) -> list[str]:
    """What the model may have to write: the response, or the replies of the pair where there is none."""
    if record.response is not None:
        return [record.response]
    return [text or "" for text in (record.chosen, record.rejected)]


def key(corpus: Corpus, *splits: str) -> str:
    """Names all that a stage may take of these splits."""
    return fingerprint(corpus.contents(*splits))


def demonstrations(corpus: Corpus, field: Demonstrations) -> Examples:
    """The demonstrations to learn from. Says which were left out or cut."""
    found = corpus.demonstrations(field)
    _say_left_out("demonstrations", corpus, found)
    return found.examples


def pairs(
    corpus: Corpus, split: str, *, count: int | None = None, long_prompts: LongPrompts | None = None
) -> ExampleSet:
    """The preference pairs of a split to learn from, as `Corpus.pairs`. Says which were left out or cut."""
    found = corpus.pairs(split, count=count, long_prompts=long_prompts)
    _say_left_out(f"{split} preference pairs", corpus, found)
    return found


def _say_left_out(what: str, corpus: Corpus, found: ExampleSet) -> None:
    kept = len(found.examples.prompts.ids)
    if found.dropped:
        say(f"{found.dropped} {what} left out: their prompt has more than {corpus.prompt_length} tokens.")
    if found.cut:
        say(
            f"{found.cut} of {kept} {what} ({found.cut / kept:.1%}) have a prompt of more than {corpus.prompt_length} "
            "tokens: its beginning is cut off."
        )
    if found.equal:
        say(
            f"{found.equal} {what} left out: their replies are equal in the first {corpus.response_length} tokens "
            "(`data.response_length`)."
        )
    if found.empty:
        say(f"{found.empty} {what} left out: a reply has no token.")
    if found.unended:
        say(
            f"{found.unended} of {kept} {what} ({found.unended / kept:.1%}) do not end within "
            f"{corpus.response_length} tokens, and are cut there: what is learned from them has no end "
            "(`data.response_length`)."
        )
