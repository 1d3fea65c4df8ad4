"""`mesh: auto`: how a number of devices is divided among the mesh axes for training.

Of the divisions that fit model and batch without a device repeating another's work (`sharding.check`), the best has as
little as possible of

1. tensor, 2. expert, 3. sequence, which send activations in every layer, while fsdp sends weights, and those once a
   layer however long the batch is;
4. data, which keeps copies of the weights.

So while there are rows for all devices, as there are with some 8k tokens a row, fsdp stands alone. Long rows are few:
with 32k tokens and more, the sequence axis takes the devices that rows are missing for. What that cannot take either
(it divides the query heads and the tokens of a row), experts do, and then heads and neurons.
"""

import itertools
import math
from collections.abc import Mapping

from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import MESH_AXES
from nemoe_jax.spec.sharding import check

COSTLY = ("tensor", "expert", "sequence", "data")


def auto_mesh(config: ModelConfig, devices: int, rows: int, sequence_length: int) -> dict[str, int]:
    """Mesh sizes that multiply to `devices`, those above 1 alone; the rules are the module's docstring.

    Args:
        rows: rows of a batch that are computed at once.
        sequence_length: tokens of a row.
    Raises:
        UserError: no division fits.
    """
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    divisions = (
        dict(zip(MESH_AXES, sizes, strict=True))
        for sizes in itertools.product(divisors, repeat=len(MESH_AXES))
        if math.prod(sizes) == devices
    )
    for sizes in sorted(divisions, key=lambda sizes: [sizes[name] for name in COSTLY]):
        if _fits(config, sizes, rows, sequence_length):
            return {name: size for name, size in sizes.items() if size > 1} or {"fsdp": 1}
    raise UserError(
        f"mesh: auto: no division of {devices} devices fits {rows} rows of {sequence_length} tokens, {config.heads} "
        f"heads and a width of {config.hidden}; a power of two of devices, or a batch of {devices} rows, may"
    )


def _fits(config: ModelConfig, sizes: Mapping[str, int], rows: int, sequence_length: int) -> bool:
    if sizes["expert"] > 1 and not config.experts:
        return False  # of a dense model it would cut no more than fsdp does
    try:
        check(config, sizes, rows, sequence_length)
    except UserError:
        return False
    return True
