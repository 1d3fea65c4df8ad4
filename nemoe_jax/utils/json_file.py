"""JSON files, with errors that name them."""

import json
from pathlib import Path
from typing import Any

from nemoe_jax.errors import UserError


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value of a file, a `kind`. Raises UserError on anything else."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file, or cut short ({error})") from error
    if not isinstance(value, kind):
        raise UserError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value
