"""The one exception for what a user can mend: bad files, bad options, bad recipes."""


class UserError(ValueError):
    """Bad input. The message names the file, tensor or key, what was wanted and what came.

    The commands print it as one `error:` line and exit with status 2; a traceback appears only under `--debug`.
    """
