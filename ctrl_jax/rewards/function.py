"""A Python function of texts as a reward: prompts as their source writes them, and columns of the data by keyword."""

import copy
import hashlib
import importlib
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ctrl_jax.data.conversations import Record
from ctrl_jax.data.corpus import Corpus
from ctrl_jax.errors import InputError
from ctrl_jax.rewards.reward import Reward
from ctrl_jax.runtime import hosts, imports
from ctrl_jax.runtime.stages import fingerprint
from ctrl_jax.steps import calibration
from ctrl_jax.types import Prompts, Responses

FIELD = "reward_model.function"

TextReward = Callable[..., Sequence[float]]
"""(prompts as they are written, a response to each, and lists of columns by keyword) to a raw reward of each."""


class Function(NamedTuple):
    name: str
    """As in a configuration: module:name."""
    call: TextReward
    sources: dict[str, str]
    """What is known of its source, by module: where any of it differs, it is another reward."""


def found(name: str, at_hand: Mapping[str, Function], *, field: str = FIELD) -> Function:
    """The function of this name that is at hand, or else the one to import."""
    return at_hand[name] if name in at_hand else load(name, field=field)


def load(name: str, *, field: str = FIELD) -> Function:
    """The function called module:name, with the sources of its module and of all that this imports.

    Args:
      name: found as `import` would from the current folder.
      field: of the configuration, which the name is the value of; named in errors.

    Raises:
      InputError: if there is no such function, or its module has no Python source.
    """
    module_name, attribute = name.split(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(
            f"{field} is {name!r}, and {module_name!r} is no name of a module",
            field=field,
            value=name,
            remedy="write it as `import` would, without .py: rewards:brevity for brevity in rewards.py.",
        )
    # As `python -c "import module"` would find it: the command may run from an installed script.
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = _imported(name, module_name, attribute, field)
    except BaseException:
        sys.path.pop(0)
        raise
    # It stays, for what the function imports when it is called.
    if str(Path.cwd()) in sys.path[1:]:
        sys.path.pop(0)
    sources = sources_of(name)
    hosts.check_alike({f"{source} of the reward {name}": known for source, known in sources.items()})
    first = vars(sys.modules[module_name]).setdefault("__ctrl_jax_sources__", sources)
    if first != sources:
        changed = ", ".join(one for one in {**first, **sources} if first.get(one) != sources.get(one))
        raise InputError(
            f"The reward {name} has changed ({changed}) since this process imported it, and would be used as it was.",
            field=name,
            value=changed,
            remedy="Start it again; in a notebook, restart the kernel.",
        )
    return Function(name, function, sources)


def _imported(name: str, module_name: str, attribute: str, field: str) -> TextReward:
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{field} is {name!r}, and the module {module_name!r} cannot be imported from {Path.cwd()} ({error}).",
            field=field,
            value=name,
            remedy="Write module:name of a file there, or of an installed package.",
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise InputError(
            f"{field} is {name!r}, but {module_name} has no function {attribute!r}",
            field=field,
            value=name,
            remedy=f"define {attribute}(prompts, responses) there, which returns a float for each.",
        )
    try:
        inspect.getsource(module)
    except (OSError, TypeError) as error:
        raise InputError(
            f"{field} is {name!r}, and {module_name} has no Python source ({error}), so a change of the reward would "
            "go unnoticed",
            field=field,
            value=name,
            remedy="wrap it in a function of a .py file.",
        ) from error
    return function


def given(function: TextReward, name: str | None = None) -> Function:
    """A function that is at hand, such as one of a notebook, in the form in which `load` gives those of a module.

    It is known by its own source. Where it has none, its name stands for it: give another function another name. What
    else it depends on, as a global variable, shows when its answers are compared with those before (scored.py).

    Args:
      function: (prompts, responses) to a float each. Where it has a dictionary `known_by`, that stands for its source.
      name: in reports and messages; by default its own. It is part of the fingerprint.

    Raises:
      InputError: if it cannot be called, or has neither a source nor a name.
    """
    if not callable(function):
        raise InputError(
            f"The reward is {function!r:.80}, which cannot be called",
            field="reward",
            value=function,
            remedy="give a function of texts.",
        )
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        source = ""
    own = getattr(function, "__name__", None)
    try:
        made_of = getattr(function, "known_by", None)
    except InputError:  # a part of it has neither a source nor a name
        if name is None:
            raise
        made_of = None
    if isinstance(made_of, dict):
        own, source = own or type(function).__name__, ""
    elif name is None and (own is None or not source):
        raise InputError(
            f"The reward {function!r:.80} has no Python source to recognise it by",
            field="reward",
            value=function,
            remedy="give it a name, and another one whenever it changes.",
        )
    module, _, attribute = (name or f"{getattr(function, '__module__', None) or '__main__'}:{own}").rpartition(":")
    known = {"source": hashlib.sha256(source.encode()).hexdigest()[:16] if source else "no source"}
    sources = made_of if isinstance(made_of, dict) else known
    return Function(f"{module or '__main__'}:{attribute}", function, sources)


def sources_of(name: str) -> dict[str, str]:
    """What is known of the module of a function `module:name`, and of those that it imports (imports.py)."""
    return imports.sources(name.partition(":")[0], Path.cwd())


def reward(function: Function, corpus: Corpus) -> Reward:
    """The function as a reward of the corpus's prompts and of responses in its tokens.

    Raises:
      InputError: as `columns_of`; from the score, as `rewards`.
    """
    name = function.name
    columns = columns_of(function.call, name, corpus.columns)
    values = corpus.values(columns)

    def score(prompts: Prompts, responses: Responses) -> np.ndarray:
        prompts, responses = hosts.addressable((prompts, responses))
        # Where hosts divide the work, each response is still scored once: a function need not answer alike twice.
        return hosts.divided(
            lambda rows: of_rows(*jax.tree.map(lambda x: np.asarray(x)[rows], (prompts, responses))),
            len(prompts.lengths),
        )

    def of_rows(prompts: Prompts, responses: Responses) -> np.ndarray:
        ids = np.asarray(prompts.ids).tolist()
        of_prompts = [values.get(prompt_id, dict.fromkeys(columns)) for prompt_id in ids]
        return rewards(function.call, name, corpus.asked(prompts), corpus.texts(responses), of_prompts)

    known = fingerprint({"name": name, "sources": function.sources})
    return Reward(score, f"function-{known}", name=name, columns=columns)


def columns_of(function: TextReward, name: str, known: Sequence[str]) -> tuple[str, ...]:
    """The columns that a function asks for: its parameters behind the first two, or all for `**columns`.

    A parameter with a default asks for its column where the data has it, which are the `known` ones.

    Raises:
      InputError: if it takes no prompts and responses, or asks for a column that the data lacks.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have none
        return ()
    kinds = inspect.Parameter
    if any(p.kind is kinds.VAR_POSITIONAL for p in parameters):
        first: list[str] = []
    else:
        first = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)][:2]
        if len(first) < 2:
            raise InputError(
                f"The reward {name}{inspect.signature(function)} must take prompts and responses, in this order",
                field=name,
                value=function,
                remedy="give it both, and what columns of the data it needs behind them by name.",
            )
    named = [p for p in parameters if p.name not in first and p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is kinds.empty and p.name not in known]
    if missing:
        there = ", ".join(known) or "none"
        raise InputError(
            f"The reward {name} asks for {', '.join(missing)}, which the data lacks; its columns beside prompts and "
            f"replies are {there}.",
            field=name,
            value=missing,
            remedy=f"Rename the parameter, or read it from another column: data.columns {missing[0]}=COLUMN.",
        )
    if any(p.kind is kinds.VAR_KEYWORD for p in parameters):
        return tuple(column for column in known if column not in first)
    return tuple(p.name for p in named if p.name in known)


def rewards(
    function: TextReward, name: str, asked: Sequence[Record], responses: Sequence[Sequence[str]],
    columns: Sequence[Mapping[str, Any]],
) -> np.ndarray:  # fmt: skip
    """Raw rewards [B, N] float32 of N responses to each prompt; `columns` has the values that go with each prompt.

    Raises:
      InputError: if the function raises, or returns anything but a finite float each.
    """
    count = sum(map(len, responses))

    def repeated(values: Sequence[Any]) -> list[Any]:
        # Copies, so that a function may add a reply to the messages of its prompt.
        return [copy.deepcopy(value) for value, row in zip(values, responses, strict=True) for _ in row]

    names = columns[0] if columns else {}
    try:
        returned = function(
            repeated([record.asked for record in asked]),
            [text for row in responses for text in row],
            **{column: repeated([values[column] for values in columns]) for column in names},
        )
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"The reward {name} failed with {type(error).__name__}: {error} ({place.filename}, line {place.lineno}).",
            field=name,
            value=error,
            remedy="Mend it, and run the same command again; `debug` shows the whole traceback.",
        ) from error
    try:
        values = np.asarray(returned, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"The reward {name} returned what are not numbers ({error})",
            field=name,
            value=returned,
            remedy="return a float each.",
        ) from error
    if values.shape != (count,):
        raise InputError(
            f"The reward {name} returned an array of shape {values.shape} for {count} responses",
            field=name,
            value=values.shape,
            remedy="return one float for each.",
        )
    if (out := calibration.out_of_range(values)).any():
        bad = int(np.flatnonzero(out)[0])
        raise InputError(
            f"The reward {name} returned {values[bad]} for response {bad}",
            field=name,
            value=values[bad],
            remedy=f"return finite numbers, of at most {calibration.MOST_REWARD:g}, which float32 can add up.",
        )
    return values.astype(np.float32).reshape(len(responses), -1)


def check(function: Function, corpus: Corpus) -> None:
    """Calls the function on one row of the data, with its reply or an empty one.

    Raises:
      InputError: as `columns_of` and `rewards`.
    """
    values = corpus.values(columns_of(function.call, function.name, corpus.columns))
    record = next(record for of_split in corpus.records.values() for record in of_split)
    reply = record.response or record.chosen or ""
    rewards(function.call, function.name, [record], [[reply]], [values[corpus.id_of(record)]])
