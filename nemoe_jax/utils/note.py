"""What a user should know though nothing is wrong: a line on standard error."""

import functools
import sys


@functools.cache
def note(message: str) -> None:
    """Prints a line, once in a process."""
    print(f"note: {message}", file=sys.stderr)
