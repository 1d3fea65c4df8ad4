"""Whether a finished response fits its schema, where the grammar alone cannot see to it.

The grammar holds each token to JSON and to most keywords. What it cannot express is looked at in the end: names that
come twice, `uniqueItems`, `if`/`then`, `dependentRequired`, a `oneOf` of which several fit.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import jsonschema
import referencing

LONGEST = 300  # characters of a message


class _NotJson(ValueError):
    pass


def schema_violation(text: str, schema: Any) -> str | None:
    """What is wrong with a JSON text by a schema; None where it fits, or where the schema cannot be evaluated."""
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except _NotJson as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    if not isinstance(schema, Mapping):
        return None
    try:
        kind = _without_patterns(jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator))
        # an empty registry: nothing is fetched
        found = jsonschema.exceptions.best_match(kind(schema, registry=referencing.Registry()).iter_errors(value))
    except Exception:  # the library raises whatever a bad schema makes it: the grammar has refused what is none
        return None
    if found is None:
        return None
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found.absolute_path).lstrip(".")
    return re.sub(r"\s+", " ", f"{where}: {found.message}" if where else found.message)[:LONGEST]


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        raise _NotJson(f"the name {twice!r:.80} comes twice")
    return dict(pairs)


def _without_patterns(kind: Any) -> Any:
    """A validator that leaves regular expressions to the grammar: Python's may take forever."""

    def passed(validator: Any, value: Any, instance: Any, schema: Any) -> None:
        return None

    named = ("pattern", "patternProperties", "additionalProperties", "unevaluatedProperties")
    return jsonschema.validators.extend(
        kind,
        {
            **dict.fromkeys(named[:2], passed),
            **{name: _unless_patterns(kind.VALIDATORS[name]) for name in named[2:] if name in kind.VALIDATORS},
        },
    )


def _unless_patterns(keyword: Any) -> Any:
    def check(validator: Any, value: Any, instance: Any, schema: Mapping[str, Any]) -> Any:
        return () if "patternProperties" in schema else keyword(validator, value, instance, schema)

    return check
