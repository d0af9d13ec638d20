"""The one exception family, and the exit codes that every command and every step share.

Exit codes: 0 done, 2 the user's mistake, 3 the gate said no, 75 try again later, anything else a bug.
A `TuneloopError` is printed as one line, without a traceback; every other exception keeps its traceback.
"""

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_GATE_REFUSED = 3
EXIT_TRY_AGAIN = 75  # sysexits.h EX_TEMPFAIL; Argo's retryStrategy matches on it


class TuneloopError(Exception):
    """Base of the errors that have a clear message and an exit code of their own."""

    exit_code: int = 1

    def __str__(self) -> str:
        return " ".join(super().__str__().split())  # always one line


class UserError(TuneloopError):
    """The user's mistake: the message says what is wrong and what to change."""

    exit_code = EXIT_USER_ERROR


class GateRefused(TuneloopError):
    """The candidate was not proven better; nothing was promoted."""

    exit_code = EXIT_GATE_REFUSED


class TryAgain(TuneloopError):
    """Nothing is wrong with the request: the same command may succeed later (preempted, storage unavailable)."""

    exit_code = EXIT_TRY_AGAIN
