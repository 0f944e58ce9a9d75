"""The error a user can mend: the command line prints its one paragraph, without a traceback."""

from collections.abc import Iterator


class InputError(ValueError):
    """Bad input. The message names the offending value and the fix."""


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
