"""The tables that `nemoe inspect` prints: every array of a model, where it lies on a mesh, and what it costs."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from nemoe_jax.config import ModelConfig
from nemoe_jax.schema import count, declare, leaves
from nemoe_jax.sharding import partition_spec


def describe(config: ModelConfig, mesh_shape: Mapping[str, int]) -> dict[str, Any]:
    """Every array with its shape, dtype, logical axes, sharding and bytes; and the totals.

    Raises:
        UserError: the mesh does not fit the model.
    """
    itemsize = jnp.dtype(config.dtype).itemsize
    arrays = []
    for path, spec in leaves(declare(config)).items():
        places = partition_spec(spec, mesh_shape)
        parts = math.prod(mesh_shape[name] for axes in places if axes for name in axes)
        size = math.prod(spec.shape) * itemsize
        arrays.append(
            {
                "path": path,
                "shape": list(spec.shape),
                "dtype": config.dtype,
                "axes": list(spec.axes),
                "sharding": [list(axes) if axes else None for axes in places],
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
    """The same as a table for people."""
    meshed = bool(description["mesh"])
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("path", "shape", "dtype", "axes", *(["sharding", "bytes/device"] if meshed else []), "bytes"):
        table.add_column(column, justify="right" if column.startswith("bytes") else "left", no_wrap=True)
    for array in description["arrays"]:
        placed = " ".join("·".join(axes) if axes else "-" for axes in array["sharding"])
        table.add_row(
            array["path"],
            "×".join(map(str, array["shape"])),
            array["dtype"],
            " ".join(array["axes"]),
            *([placed, f"{array['bytes_per_device']:,}"] if meshed else []),
            f"{array['bytes']:,}",
        )
    console = Console()
    # a pipe gets whole lines, whatever width the terminal would have
    console.print(table, soft_wrap=True, width=None if console.is_terminal else 200)
    mesh = ", ".join(f"{axis}={size}" for axis, size in description["mesh"].items())
    console.print(
        f"\n{name} ({description['family']}): {description['params_total']:,} parameters, "
        f"{description['params_active']:,} active per token; {description['bytes']:,} bytes"
        + (f", {description['bytes_per_device']:,} per device on {mesh}" if meshed else "")
        + f"; cache {description['cache_bytes_per_token']:,} bytes a token",
        highlight=False,
        soft_wrap=True,
    )
