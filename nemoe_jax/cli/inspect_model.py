"""`nemoe inspect`: every array of a model, without its weights."""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoe_jax.spec.config import PRESETS, ModelConfig, preset
from nemoe_jax.utils.command import Command


def add(command: Command) -> None:
    """Registers `inspect`."""
    parser = command.add(
        "inspect",
        _inspect,
        "show every array of a model: shape, dtype, axes, sharding, bytes",
        f"Presets: {', '.join(PRESETS)}. No weights are read; --mesh needs no devices.",
        reports=True,
    )
    parser.add_argument("model", metavar="PRESET|DIR", help="a preset's name or a model directory")
    parser.add_argument("--mesh", help="show the sharding on a mesh, such as fsdp=4,expert=4")


def _inspect(arguments: argparse.Namespace) -> None:
    from nemoe_jax.checkpoints import reader
    from nemoe_jax.spec.mesh import parse_mesh

    exists = Path(arguments.model).exists()
    config = reader.read_config(arguments.model) if exists else preset(arguments.model)
    description = describe(config, parse_mesh(arguments.mesh) if arguments.mesh else {})
    if arguments.json:
        print(json.dumps(description))
    else:
        print_description(arguments.model, description)


def describe(config: ModelConfig, mesh_shape: Mapping[str, int]) -> dict[str, Any]:
    """Every array with its shape, dtype, logical axes, sharding and bytes; and the totals.

    Raises:
        UserError: the mesh does not fit the model.
    """
    import jax.numpy as jnp

    from nemoe_jax.spec.schema import count, declare, leaves
    from nemoe_jax.spec.sharding import partition_spec

    itemsize = jnp.dtype(config.dtype).itemsize
    arrays = []
    for path, spec in leaves(declare(config)).items():
        # a PartitionSpec gives an axis on one mesh axis as a bare string
        places = [[axes] if isinstance(axes, str) else list(axes or ()) for axes in partition_spec(spec, mesh_shape)]
        parts = math.prod(mesh_shape[name] for axes in places for name in axes)
        size = math.prod(spec.shape) * itemsize
        arrays.append(
            {
                "path": path,
                "shape": list(spec.shape),
                "dtype": config.dtype,
                "axes": list(spec.axes),
                "sharding": places,
                "bytes": size,
                "bytes_per_device": size // parts,
            }
        )
    total, active = count(config)
    cache = 2 * config.layers * config.kv_heads * config.head_dim * itemsize
    return {
        "family": config.family,
        "params_total": total,
        "params_active": active,
        "bytes": sum(array["bytes"] for array in arrays),
        "bytes_per_device": sum(array["bytes_per_device"] for array in arrays),
        "cache_bytes_per_token": cache,
        "mesh": dict(mesh_shape),
        "arrays": arrays,
    }


def print_description(name: str, description: dict[str, Any]) -> None:
    """The same as a table for people; whole lines, however narrow the terminal."""
    meshed = bool(description["mesh"])
    titles = ("path", "shape", "dtype", "axes", *(("sharding", "bytes/device") if meshed else ()), "bytes")
    rows = [titles]
    for array in description["arrays"]:
        placed = " ".join("·".join(axes) or "-" for axes in array["sharding"])
        mesh_cells = (placed, f"{array['bytes_per_device']:,}") if meshed else ()
        shape, axes = "×".join(map(str, array["shape"])), " ".join(array["axes"])
        rows.append((array["path"], shape, array["dtype"], axes, *mesh_cells, f"{array['bytes']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if title.startswith("bytes") else cell.ljust(width)
            for title, cell, width in zip(titles, row, widths, strict=True)
        )
        print("  ".join(cells))
    mesh = ", ".join(f"{axis}={size}" for axis, size in description["mesh"].items())
    print(
        f"\n{name} ({description['family']}): {description['params_total']:,} parameters, "
        f"{description['params_active']:,} active per token; {description['bytes']:,} bytes"
        + (f", {description['bytes_per_device']:,} per device on {mesh}" if meshed else "")
        + f"; cache {description['cache_bytes_per_token']:,} bytes a token"
    )
