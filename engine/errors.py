"""The one exception that a person is meant to read."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input. The message is one sentence: what was expected, what was found, what to do.

    The command line prints it without a traceback and exits with code 2.
    """
