"""How a conversion runs, whatever it does, and what it leaves beside the weights."""

import dataclasses

from nemoe_jax.utils.output_path import SHARD_BYTES

MANIFEST = "conversion.json"
REPORT = "conversion.html"


@dataclasses.dataclass(frozen=True)
class ConversionSettings:
    """What every conversion is told besides its own options."""

    shard_bytes: int = SHARD_BYTES  # whole layers up to this size share a weight file
    dry_run: bool = False  # plan, and time one layer; write nothing
