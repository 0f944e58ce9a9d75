"""The error that a user can mend: the command line prints its one paragraph, without a traceback."""

from collections.abc import Iterator
from typing import Any


class InputError(ValueError):
    """Bad input: what it is, and what to do about it.

    `str(error)` is the whole paragraph, with the remedy at its end. A field of an experiment stands in it between
    backticks, with the value to give it where there is one: `policy.kl_budget`, `data.source=files`. The command line
    spells those as its options.

    Attributes:
      field: what is wrong: a field of an experiment (policy.kl_budget), an argument's name (reference_rewards), or the
        place in a file; None where no single one is.
      value: what it is.
      remedy: what to do.
    """

    def __init__(self, problem: str, *, field: str | None = None, value: Any = None, remedy: str | None = None) -> None:
        join = "" if remedy is None else " " if problem.endswith(".") else "; "
        super().__init__(f"{problem}{join}{remedy or ''}")
        self.field, self.value, self.remedy = field, value, remedy


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and whatever led to it, the latest first; the members of a group too.

    What is raised `from None` hides what was handled then, which may have nothing to do with it.
    """
    seen = set[int]()
    found = [error]
    while found:
        error = found.pop(0)
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            found += error.exceptions
        found.append(error.__cause__ or (None if error.__suppress_context__ else error.__context__))
