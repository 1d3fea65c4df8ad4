"""`nemoe logits`: what the model makes of a token sequence, as a NumPy file."""

import argparse
from pathlib import Path

from nemoe_jax.cli import model_flags
from nemoe_jax.errors import UserError
from nemoe_jax.utils.command import Command
from nemoe_jax.utils.output_path import atomic_write


def add(command: Command) -> None:
    """Registers `logits`."""
    parser = command.add(
        "logits",
        _logits,
        "write the logits of a token sequence, to compare with anything else",
        "The file holds float32 of shape (tokens, vocabulary).",
    )
    parser.add_argument("directory", metavar="DIR", help="a model directory")
    parser.add_argument("--tokens", required=True, metavar="1,2,3", help="token ids, separated by commas")
    parser.add_argument("--out", required=True, metavar="FILE.npy", help="where to write them, a NumPy file")
    model_flags.add_model_flags(parser)


def _logits(arguments: argparse.Namespace) -> None:
    import jax
    import numpy as np

    from nemoe_jax.checkpoints.reader import Checkpoint
    from nemoe_jax.model.transformer import forward
    from nemoe_jax.spec.mesh import use_mesh

    try:
        tokens = np.array([[int(token) for token in arguments.tokens.split(",")]], np.int32)
    except ValueError as error:
        raise UserError(f"--tokens: expected numbers separated by commas, got {arguments.tokens!r}") from error
    checkpoint = Checkpoint(arguments.directory)
    config = checkpoint.config
    if tokens.min() < 0 or tokens.max() >= config.vocab:
        raise UserError(f"--tokens: expected ids from 0 to {config.vocab - 1}, got {arguments.tokens}")
    if tokens.shape[1] > config.context:
        raise UserError(f"--tokens: {tokens.shape[1]} tokens exceed the context of {config.context}")
    _, params, mesh = model_flags.load_model_from_args(arguments, checkpoint)
    with use_mesh(mesh):
        logits = jax.jit(lambda params, tokens: forward(config, params, tokens).logits)(params, tokens)
    with (
        atomic_write(Path(arguments.out)) as partial,
        partial.open("wb") as file,
    ):  # by name, NumPy would add its own suffix
        np.save(file, np.asarray(logits[0]))
    print(f"{arguments.out}: float32 {logits.shape[1]} × {logits.shape[2]}")
