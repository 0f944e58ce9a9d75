"""The error a user can mend: the command line prints its one paragraph, without a traceback."""


class InputError(ValueError):
    """Bad input. The message names the offending value and the fix."""
