"""`mesh: auto`: how a number of devices is divided among the mesh axes for training.

Every division that the model and the batch allow is weighed; in this order, the best has

1. no device that repeats another's work: rows are cut over data, fsdp and expert, the tokens of a row over sequence,
   and whatever does not divide is computed twice;
2. as little of tensor, then of expert, then of sequence as that takes. They send activations in every layer, fsdp sends
   weights, and those not more than once per layer however long the batch. So up to some 8k tokens, where there are
   rows enough for all devices, fsdp stands alone; with long rows, which are few, the sequence axis takes over;
3. as little of data as possible, which holds a copy of the weights.

The sequence axis divides the tokens of a row, and the query heads (attention has whole rows of some heads).
"""

import itertools
import math
from collections.abc import Iterator, Mapping

from nemoe_jax import sharding
from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.schema import declare, leaves

AXES = ("data", "fsdp", "expert", "tensor", "sequence")


def auto(config: ModelConfig, devices: int, rows: int, sequence_length: int) -> dict[str, int]:
    """Mesh sizes that multiply to `devices`, those above 1 alone; the rules are the module's docstring.

    Args:
        rows: rows of a batch that are computed at once.
        sequence_length: tokens of a row.
    Raises:
        UserError: no division fits the model.
    """
    possible = (sizes for sizes in _divisions(devices) if _fits(config, sizes, sequence_length))
    best = min(possible, key=lambda sizes: _cost(sizes, rows), default=None)
    if best is None:
        raise UserError(
            f"mesh: auto: {devices} devices divide no axis of the model (hidden {config.hidden}, heads {config.heads}, "
            f"experts {config.experts}) nor rows of {sequence_length} tokens; another number of devices, such as a "
            "power of two, may"
        )
    return {name: size for name, size in best.items() if size > 1} or {"fsdp": 1}


def _divisions(devices: int) -> Iterator[dict[str, int]]:
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    for sizes in itertools.product(divisors, repeat=len(AXES)):
        if math.prod(sizes) == devices:
            yield dict(zip(AXES, sizes, strict=True))


def _fits(config: ModelConfig, sizes: Mapping[str, int], sequence_length: int) -> bool:
    if (sequence_length % sizes["sequence"]) or (config.heads // sizes["tensor"]) % sizes["sequence"]:
        return False
    if sizes["expert"] > 1 and not config.experts:
        return False
    try:
        for spec in leaves(declare(config)).values():
            sharding.partition_spec(spec, sizes)
    except UserError:
        return False
    return True


def _cost(sizes: Mapping[str, int], rows: int) -> tuple[int, ...]:
    """What is to be least, most important first."""
    cut = math.prod(sizes[name] for name in sharding.batch_axes(sizes, rows))
    repeated = math.prod(sizes.values()) // (cut * sizes["tensor"] * sizes["sequence"])
    return repeated, sizes["tensor"], sizes["expert"], sizes["sequence"], sizes["data"]
