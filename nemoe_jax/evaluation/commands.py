"""`nemoe perplexity`: how well a model foresees a text."""

import argparse
from typing import Any

from nemoe_jax import running
from nemoe_jax.command import Command, report
from nemoe_jax.errors import UserError


def add(command: Command) -> None:
    """Registers `perplexity`."""
    parser = command.add(
        "perplexity",
        _perplexity,
        "loss and perplexity on text, and how evenly the experts are used",
        "Text is cut into evenly spaced windows; every token after a window's first is scored.",
        reports=True,
    )
    parser.add_argument("directory", metavar="DIR", help="a model directory with a tokenizer")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="text or .jsonl files, directories or globs")
    parser.add_argument(
        "--sequence-length", type=int, help="tokens scored in a window (default 256, or the context if less)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="windows computed together (default 8)")
    parser.add_argument("--batches", type=int, default=16, help="batches at most (default 16)")
    running.add_model_flags(parser)


def _perplexity(arguments: argparse.Namespace) -> None:
    from nemoe_jax import checkpoint
    from nemoe_jax.evaluate import evaluate
    from nemoe_jax.text import find_files, spaced_batches, tokenize
    from nemoe_jax.tokenizer import load_tokenizer

    config = checkpoint.read_config(arguments.directory)
    length = min(256, config.context) if arguments.sequence_length is None else arguments.sequence_length
    if not 1 <= length <= config.context:
        raise UserError(f"--sequence-length: wanted 1 to the context of {config.context}, got {length}")
    for name in ("batch_size", "batches"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: wanted a positive number, got {getattr(arguments, name)}")
    stream = tokenize(find_files(arguments.texts), load_tokenizer(arguments.directory), vocab=config.vocab)
    batches = spaced_batches(stream, length, arguments.batch_size, arguments.batches)
    _, params, mesh = running.load(arguments)
    result = evaluate(config, params, batches, mesh)
    figures: dict[str, Any] = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "seconds": result.seconds,
    }
    if result.load_LE is not None:
        figures["load_max_over_mean"] = result.load_max_over_mean
        if arguments.json:
            figures["expert_load"] = result.load_LE.tolist()
    report(figures, arguments.json)
