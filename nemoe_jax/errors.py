"""The exceptions for what a user can mend: bad files, bad options, bad recipes, a full disk."""

from collections.abc import Sequence

_PROBLEMS_SHOWN = 20


class UserError(ValueError):
    """Bad input. The message names the file, tensor or key, what was expected and what came.

    The commands print it as one `error:` line and exit with status 2; a traceback appears only under `--debug`.
    """


def listed(problems: Sequence[str]) -> str:
    """Problems on one line, the first of them where there are very many."""
    rest = len(problems) - _PROBLEMS_SHOWN
    return "; ".join([*problems[:_PROBLEMS_SHOWN], *([f"and {rest} more"] if rest > 0 else [])])


class ResumableError(UserError):
    """The job had to stop though its input is good (a full disk): what is finished is kept for the next attempt."""
