"""An engine for the commands that generate text: the flags, and loading model and adapter into it."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nemoe_jax.cli import model_flags
from nemoe_jax.text.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from nemoe_jax.serving.engine.engine import Engine


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--adapter`, `--mesh`, `--dtype` and `--kv-cache`, for `start`."""
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in Hugging Face PEFT's form, over the model")
    model_flags.add_model_flags(parser)
    model_flags.add_cache_flag(parser)


@contextlib.contextmanager
def start(
    arguments: argparse.Namespace, tokenizer: Tokenizer, *, rows: int, tokens: int, waiting: int = 64
) -> "Iterator[Engine]":
    """An engine with the model of `arguments.directory`, for as long as the context lasts.

    Its requests name the adapter as the flag does.

    Args:
        rows: answers that are made together.
        tokens: of the cache of keys and values, in all.
        waiting: requests that may wait.

    Raises:
        UserError: a model or an adapter that cannot be loaded.
    """
    from nemoe_jax.adapters import peft_load
    from nemoe_jax.serving.engine.engine import Engine

    config, params, mesh = model_flags.load(arguments)
    adapters = {}
    if arguments.adapter:
        adapters[arguments.adapter] = peft_load.load_adapters(arguments.adapter, config, mesh, progress=True)[1]
    engine = Engine(
        config,
        params,
        tokenizer,
        rows=rows,
        tokens=tokens,
        waiting=waiting,
        mesh=mesh,
        cache_dtype=arguments.kv_cache,
        adapters=adapters or None,
    )
    try:
        yield engine
    finally:
        engine.close(drain=False)
