"""What every command that runs a model shares: the flags that say where and how, and loading."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from nemoe_jax.checkpoints.reader import Checkpoint
    from nemoe_jax.inference.generation_config import GenerationConfig
    from nemoe_jax.serving.engine.engine import Engine
    from nemoe_jax.spec.config import ModelConfig
    from nemoe_jax.spec.schema import Tree
    from nemoe_jax.text.tokenizers.base import Tokenizer


class Model(NamedTuple):
    """A model on its devices."""

    config: "ModelConfig"
    params: "Tree"
    mesh: "Mesh | None"


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """`--mesh` and `--dtype`, for `load`."""
    parser.add_argument(
        "--mesh",
        help="devices as axes, such as fsdp=4,expert=2 (axes: data, fsdp, expert, tensor, sequence); default: one "
        "device; to generate text, tensor alone is best: fsdp, expert and sequence send weights for every token",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32", "fp8", "nf4"),
        help="dtype of weights and arithmetic (default: the weights' own; those in FP8 stay so, and the others' dtype "
        "is that of the arithmetic); fp8: linear maps are kept in FP8, or rounded to it: half the memory; "
        "nf4: in 4 bits, as `quantize: nf4` trains adapters over them; slow to decode",
    )


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    """`--kv-cache`: the dtype of the cache of keys and values."""
    parser.add_argument(
        "--kv-cache",
        metavar="DTYPE",
        help="how keys and values are kept: float32, bfloat16, or in 8 bits, float8_e4m3fn (what TPUs read fastest) or "
        "int8 (with scales, more exact); by default as the weights are",
    )


def name_of(directory: str) -> str:
    """What a model directory is called: a link by its own name."""
    path = Path(directory)
    return path.resolve().name if path.name in ("", "..") else path.name


def add_generation_config_flag(parser: argparse.ArgumentParser) -> None:
    """`--generation-config`, for `generation_config`."""
    parser.add_argument(
        "--generation-config",
        choices=("auto", "none"),
        default="auto",
        help="whether the model's generation_config.json gives end tokens and sampling defaults (default auto: where "
        "there is one)",
    )


def generation_config(arguments: argparse.Namespace) -> "GenerationConfig":
    """What the generation config of `arguments.directory` gives, as the flags say; told on standard error.

    Raises:
        UserError: values that make no sense.
    """
    from nemoe_jax.cli.sampling_flags import given_names
    from nemoe_jax.inference.generation_config import GenerationConfig, read_generation_config

    if arguments.generation_config == "none":
        return GenerationConfig()
    generation = read_generation_config(arguments.directory)
    if arguments.sampling_preset is not None:  # which was asked for
        generation = GenerationConfig(generation.end_tokens)
    taken = generation.described(given_names(arguments))
    if taken:
        print(f"{taken} (--generation-config none: without it)", file=sys.stderr, flush=True)
    return generation


def load_model_from_args(arguments: argparse.Namespace, checkpoint: "Checkpoint") -> Model:
    """The weights of a checkpoint, as the flags of `add_model_flags` say. Raises UserError."""
    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.spec.mesh import make_mesh, parse_mesh

    mesh = make_mesh(parse_mesh(arguments.mesh)) if arguments.mesh else None
    config, params = pretrained.load_pretrained(checkpoint, mesh=mesh, dtype=arguments.dtype, progress=True)
    return Model(config, params, mesh)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """`--adapter`, `--mesh`, `--dtype`, `--kv-cache` and `--generation-config`, for `engine_from_args`."""
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in Hugging Face PEFT's form, over the model")
    add_model_flags(parser)
    add_cache_flag(parser)
    add_generation_config_flag(parser)


@contextlib.contextmanager
def engine_from_args(
    arguments: argparse.Namespace,
    checkpoint: "Checkpoint",
    tokenizer: "Tokenizer",
    generation: "GenerationConfig",
    *,
    max_num_seqs: int,
    kv_tokens: int,
    max_queued: int = 64,
) -> "Iterator[Engine]":
    """An engine with the weights of a checkpoint, for as long as the context lasts.

    Its requests name the adapter as the flag does. With several slots it is deterministic: a file of responses does not
    depend on where it was interrupted.

    Args:
        generation: its end tokens are the model's.
        max_num_seqs: requests that run at a time.
        kv_tokens: size of the KV cache.
        max_queued: requests that may wait.

    Raises:
        UserError: a model or an adapter that cannot be loaded.
    """
    from nemoe_jax.adapters import peft_load
    from nemoe_jax.serving.engine.engine import Engine

    config, params, mesh = load_model_from_args(arguments, checkpoint)
    adapters = {}
    if arguments.adapter:
        adapters[arguments.adapter] = peft_load.load_adapters(arguments.adapter, config, mesh, progress=True)[1]
    engine = Engine(
        generation.with_end_tokens(config),
        params,
        tokenizer,
        max_num_seqs=max_num_seqs,
        kv_tokens=kv_tokens,
        max_queued=max_queued,
        mesh=mesh,
        cache_dtype=arguments.kv_cache,
        adapters=adapters or None,
        specialize=max_num_seqs == 1,
        deterministic=max_num_seqs > 1,
    )
    try:
        yield engine
    finally:
        engine.close(drain=False)
