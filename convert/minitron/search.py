"""`minitron --target`: shapes of about as many parameters, deeper or wider, compared by their loss on held-out text.

For each of a few depths the widths are as large as the target allows, in three ways: narrower FFNs, a narrower stream,
or both alike. What is compared is the pruned model before any repair.
"""

import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from convert.layerwise import LayerwiseModel
from convert.minitron.kept import NEURON_AXES, PrunedCheckpoint
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import count
from nemoe_jax.utils.progress import progress_bar

DEPTHS = (1.0, 0.9, 0.8, 0.7)  # shares of the layers
NARROWEST = 0.25  # share of a width
NEAR = 0.9  # a shape of fewer parameters than this share of the target is no candidate
ROUND = 64  # widths are multiples of it, or of what it has in common with the source's
WAYS = (NEURON_AXES, ("hidden",), ("hidden", *NEURON_AXES))


def candidate_shapes(config: ModelConfig, target: float, source: str) -> list[ModelConfig]:
    """The shapes to compare, each smaller than the model.

    Args:
        target: parameters; up to 1, their share.

    Raises:
        UserError: not fewer than the model has, or so few that no candidate has them.
    """
    whole = count(config)[0]
    wanted = target * whole if target <= 1 else target
    if not 0 < wanted < whole:
        raise UserError(f"{source}: --target: expected fewer than the source's {whole:,} parameters, got {wanted:,.0f}")
    shapes = []
    for layers in dict.fromkeys(max(round(share * config.layers), 1) for share in DEPTHS):
        dense = min(config.dense_layers, layers - 1)
        for way in WAYS:
            shape = _widest(config.replace(layers=layers, dense_layers=dense), way, wanted)
            if shape and shape not in shapes and shape != config and count(shape)[0] >= NEAR * wanted:
                shapes.append(shape)
    if not shapes:
        raise UserError(f"{source}: --target: no shape of {wanted:,.0f} parameters keeps a quarter of each width")
    return shapes


def _widest(config: ModelConfig, axes: Sequence[str], parameters: float) -> ModelConfig | None:
    """The widest shape along those axes, all by the same share, with at most so many parameters."""
    steps = {axis: math.gcd(size, ROUND) for axis in axes if (size := getattr(config, axis))}
    finest = max(getattr(config, axis) // step for axis, step in steps.items())

    def narrowed(parts: int) -> ModelConfig:
        sizes = {axis: max(getattr(config, axis) * parts // finest // step, 1) * step for axis, step in steps.items()}
        return config.replace(**sizes)

    fitting = [
        parts for parts in range(math.ceil(NARROWEST * finest), finest + 1) if _fits(narrowed(parts), parameters)
    ]
    return narrowed(fitting[-1]) if fitting else None


def _fits(config: ModelConfig, parameters: float) -> bool:
    return count(config)[0] <= parameters


def compared(candidates: Sequence[PrunedCheckpoint], batches: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Of each candidate its sizes and its loss on the batches (B, T + 1); the table is printed on standard error."""
    rows = []
    with progress_bar() as bar:
        for candidate in bar.track(candidates, description="comparing"):
            config = candidate.config
            sizes = {
                name: getattr(config, name) for name in ("layers", "hidden", *NEURON_AXES) if getattr(config, name)
            }
            loss = round(held_out_loss(candidate, batches), 4)
            rows.append({"parameters": count(config)[0], **sizes, "held_out_loss": loss})
    print("\n".join(_lines(rows)), file=sys.stderr)
    return rows


def held_out_loss(model: PrunedCheckpoint, batches: Sequence[np.ndarray]) -> float:
    """Nats per token, run layer by layer."""
    stream = LayerwiseModel(model)
    streams = [stream.embed(tokens_BS[:, :-1]) for tokens_BS in batches]
    for layer in range(model.config.layers):
        weights = stream.weights(layer)
        streams = [stream.through(layer, weights, x_BTD) for x_BTD in streams]
    return stream.next_token(streams, streams, batches, 0.0).loss


def _lines(rows: Sequence[dict[str, float]]) -> Iterator[str]:
    names = list(rows[0])
    table = [names, *([f"{row[name]:,}" for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
