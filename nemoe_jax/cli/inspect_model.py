"""`nemoe inspect`: every array of a model, without its weights."""

import argparse
import json
from pathlib import Path

from nemoe_jax.spec.config import PRESETS, preset
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
    from nemoe_jax.cli.describe import describe, print_description
    from nemoe_jax.spec import sharding

    is_directory = Path(arguments.model).is_dir()
    config = reader.read_config(arguments.model) if is_directory else preset(arguments.model)
    description = describe(config, sharding.parse_mesh(arguments.mesh) if arguments.mesh else {})
    if arguments.json:
        print(json.dumps(description))
    else:
        print_description(arguments.model, description)
