"""Schemas that would keep llguidance busy for minutes or for ever: a server refuses them."""

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from nemoe_jax.errors import UserError

MOST_PATTERNS = 64  # patternProperties: each is compared with each other; 400 take 20 s
LARGEST_MULTIPLE = 10_000  # multipleOf: an automaton with as many states; 100 000 take seconds


def check_schema_cost(schema: Any) -> None:
    """Raises UserError on more patterns, or multiples of larger numbers, than can be compiled in about a second."""
    multiples = []
    for part in objects(schema):
        patterns, multiple = part.get("patternProperties"), part.get("multipleOf")
        if isinstance(patterns, Mapping) and len(patterns) > MOST_PATTERNS:
            raise UserError(f"patternProperties: expected at most {MOST_PATTERNS}, got {len(patterns)}")
        if isinstance(multiple, int | float):
            multiples.append(multiple)
    together = common_multiple(multiples)
    if together > LARGEST_MULTIPLE:
        raise UserError(
            f"multipleOf: expected at most {LARGEST_MULTIPLE} (in units of the last decimal, all multiples together), "
            f"got {Decimal(together):.6g}"
        )


def objects(schema: Any) -> Iterator[Mapping[str, Any]]:
    """All objects in a schema, however deep."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield value
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value


def common_multiple(numbers: list[int | float]) -> int:
    """The least common multiple of positive numbers, in units of the last decimal that any of them has."""
    try:
        decimals = [Decimal(str(number)) for number in numbers]
        places = max([0, *(-int(number.as_tuple().exponent) for number in decimals)])
        return math.lcm(*(int(number.scaleb(places)) for number in decimals))
    except (InvalidOperation, ValueError, OverflowError):  # NaN and the infinite, which are refused as no JSON
        return 0
