"""The exceptions for what a user can mend: bad files, bad options, bad recipes, a full disk."""


class UserError(ValueError):
    """Bad input. The message names the file, tensor or key, what was wanted and what came.

    The commands print it as one `error:` line and exit with status 2; a traceback appears only under `--debug`.
    """


class ResumableError(UserError):
    """The job had to stop though its input is good (a full disk): what is finished is kept for the next attempt."""
