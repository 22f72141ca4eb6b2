"""Errors that a user can mend: each says what is wrong, where, and what to do; the exit code names the kind."""


class TiltError(Exception):
    """A failure with a cause the user can act on. `str()` is the whole message; the command line prints it without a trace."""

    exit_code = 1


def is_foreign(error: BaseException) -> bool:
    """Whether this came out of a library that could not read what it was given: an exception, or a panic of Rust code, which is none of Python's exceptions."""
    return not isinstance(error, TiltError) and (isinstance(error, Exception) or type(error).__name__ == "PanicException")


class UsageError(TiltError):
    """The configuration or the command is wrong (exit code 2)."""

    exit_code = 2


class DataError(TiltError):
    """A file, a row or a reward is not what it should be (exit code 3)."""

    exit_code = 3


class NumericError(TiltError):
    """A loss, gradient, log-probability or reward is not finite (exit code 4)."""

    exit_code = 4
