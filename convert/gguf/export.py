"""GGUF: a model directory as the one file that llama.cpp and what is built on it run.

The tensors are the directory's own. For `llama` (Llama, Mistral, Mixtral) llama.cpp turns neighboring rows of a head by
RoPE where Hugging Face turns rows half a head apart, so the rows of q and k change places; a layer's experts are one
tensor; norms and routers stay in float32.

Header and tensor infos are the `gguf` package's; the data goes block by block from the mapped source to its place in
the file, in a few threads. Blocks whose bytes are the same are written straight from the mapping.
"""

import concurrent.futures
import itertools
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import jax.numpy as jnp
import numpy as np
from gguf.quants import quant_shape_to_byte_shape, quantize

from convert.gguf.header import ARCHITECTURES, header, rope_factors
from convert.gguf.tokenizer import read_vocabulary
from convert.options import GgufOptions
from convert.streaming import MOST_THREADS, ConversionSettings, Figures
from nemoe_jax.checkpoints.gguf.config import ROPE_FREQS
from nemoe_jax.checkpoints.gguf.weights import interleaved, tensor_names
from nemoe_jax.checkpoints.reader import Checkpoint, TensorRef, units
from nemoe_jax.checkpoints.safetensors_file import is_finite
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.utils.file_copy import is_mapped_whole, write_at
from nemoe_jax.utils.output_path import atomic_write, check_room, refuse_existing
from nemoe_jax.utils.progress import progress_bar

Kind = gguf.GGMLQuantizationType
FileType = gguf.LlamaFileType
KINDS = {
    "f32": (Kind.F32, FileType.ALL_F32),
    "f16": (Kind.F16, FileType.MOSTLY_F16),
    "bf16": (Kind.BF16, FileType.MOSTLY_BF16),
    "q8_0": (Kind.Q8_0, FileType.MOSTLY_Q8_0),
    "q5_1": (Kind.Q5_1, FileType.MOSTLY_Q5_1),
    "q5_0": (Kind.Q5_0, FileType.MOSTLY_Q5_0),
    "q4_1": (Kind.Q4_1, FileType.MOSTLY_Q4_1),
    "q4_0": (Kind.Q4_0, FileType.MOSTLY_Q4_0),
}
UNQUANTIZED = {"q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}  # the gguf package reads them, but makes none
DTYPES = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
BLOCK = 1 << 22  # elements converted at once


class Tensor(NamedTuple):
    """A tensor of the GGUF file."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    sources: list[TensorRef]  # one, or all experts of a layer; none of the factors of RoPE
    size: int  # bytes


def to_gguf(
    source: str | Path, destination: str | Path, options: GgufOptions, run: ConversionSettings = ConversionSettings()
) -> Figures:
    """Writes a model directory as one GGUF file; returns its figures.

    Raises:
        UserError: a family or tokenizer that llama.cpp does not have, an existing destination, no room for it, NaN or
            infinite weights.
    """
    if options.type in UNQUANTIZED:
        raise UserError(
            f"--type {options.type}: the gguf package does not quantize to {UNQUANTIZED[options.type]}; expected one "
            f"of {', '.join(KINDS)}, or write bf16 and let llama.cpp's llama-quantize make {options.type} of it"
        )
    checkpoint, target = Checkpoint(source), Path(destination)
    config = checkpoint.config
    _refuse_other_mathematics(config, str(source))
    refuse_existing(target)
    vocabulary = read_vocabulary(checkpoint.directory, config.vocab)
    kind, file_type = KINDS[options.type if options.type != "auto" else _type_of(config.dtype)]
    by_unit = plan(config, kind)
    tensors = list(itertools.chain.from_iterable(by_unit))
    check_room(target, sum(tensor.size for tensor in tensors))
    report = {
        "type": kind.name.lower(),
        "tensors": len(tensors),
        "tokens": len(vocabulary.pieces),
        "chat_template": bool(vocabulary.chat_templates),
        "not_quantized": sum(tensor.kind is Kind.F16 for tensor in tensors) if kind not in DTYPES else 0,
        "bytes": sum(tensor.size for tensor in tensors),
        "written": not options.dry_run,
    }
    if not options.dry_run:
        writer = header(checkpoint, vocabulary, file_type)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.kind)
        with atomic_write(target, parents=True) as partial:
            _write(writer, partial, checkpoint, by_unit)
    return report


def _refuse_other_mathematics(config: ModelConfig, source: str) -> None:
    """Raises on a model whose logits would be others in llama.cpp."""
    family = FAMILIES[config.family]
    if family.gguf not in ARCHITECTURES:
        able = [other.name for other in FAMILIES.values() if other.gguf in ARCHITECTURES]
        raise UserError(f"{source}: gguf writes models of family {', '.join(able)}, not {config.family}")
    if config.dense_layers:
        raise UserError(f"{source}: llama.cpp's {family.gguf} has no dense layers before its MoE layers")
    if family.gguf in ("qwen2", "qwen2moe") and config.heads * config.head_dim != config.hidden:
        raise UserError(
            f"{source}: llama.cpp's {family.gguf} expects heads that fill the width of {config.hidden}, got "
            f"{config.heads} heads of {config.head_dim}"
        )
    # over all experts the weights sum to 1 anyway
    if config.experts > config.top_k and config.normalize_top_k != family.gguf_normalizes:
        does = "divides" if family.gguf_normalizes else "does not divide"
        raise UserError(
            f"{source}: llama.cpp's {family.gguf} always {does} the weights of the chosen experts by their sum; this "
            f"model has norm_topk_prob = {str(config.normalize_top_k).lower()}"
        )


def plan(config: ModelConfig, kind: Kind) -> list[list[Tensor]]:
    """The tensors of a model by the units in which they are read: embedding, each layer, norm and head."""
    names = tensor_names(config)
    by_unit = []
    for refs in units(config):
        grouped = itertools.groupby(refs, lambda ref: names[ref.key][0])
        by_unit.append([_tensor(name, list(group), config, kind) for name, group in grouped])
    if config.rope_scaling and config.rope_scaling.type == "llama3":
        by_unit[0].append(Tensor(ROPE_FREQS, (config.head_dim // 2,), Kind.F32, [], 4 * (config.head_dim // 2)))
    return by_unit


def _tensor(name: str, sources: list[TensorRef], config: ModelConfig, kind: Kind) -> Tensor:
    spec = sources[0].spec
    shape = (config.experts, *spec.torch_shape) if "experts" in spec.stacked else spec.torch_shape
    if spec.produced == ("scalar",):
        shape = shape[1:]
    is_head = not config.tied if name == "output.weight" else config.tied and spec.lookup
    if len(shape) == 1 or spec.produced == ("experts",):
        kind = Kind.F32
    elif kind not in DTYPES:
        if is_head:
            kind = Kind.Q8_0
        if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Kind.F16  # as llama.cpp does
    return Tensor(name, shape, kind, sources, math.prod(quant_shape_to_byte_shape(shape, kind)))


def _type_of(dtype: str) -> str:
    return next(name for name, (kind, _) in KINDS.items() if DTYPES.get(kind) == dtype)


def _write(writer: gguf.GGUFWriter, path: Path, checkpoint: Checkpoint, by_unit: list[list[Tensor]]) -> None:
    """Writes the header and then, in threads, each block of data to its place."""
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    at = path.stat().st_size
    alone = threading.Lock()  # the kernel lets one thread write to a file, and others spin
    with (
        path.open("r+b") as file,
        concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool,
        progress_bar() as bar,
    ):
        for tensors in bar.track(by_unit, description=f"gguf {checkpoint.directory.name}"):
            blocks = []
            for tensor in tensors:
                at = writer.ggml_pad(at, writer.data_alignment)
                if not tensor.sources:
                    factors = rope_factors(checkpoint.config)
                    blocks.append(
                        pool.submit(_write_block, file.fileno(), alone, at, factors, tensor.kind, tensor.name)
                    )
                    at += tensor.size
                for ref in tensor.sources:
                    for block in _blocks(checkpoint, ref.key, jnp.dtype(DTYPES.get(tensor.kind, "float32"))):
                        where = f"{checkpoint.path}: {ref.key}"
                        blocks.append(pool.submit(_write_block, file.fileno(), alone, at, block, tensor.kind, where))
                        at += block.size * tensor.size // math.prod(tensor.shape)
            for done in blocks:
                done.result()
        file.truncate(writer.ggml_pad(at, writer.data_alignment))


def _blocks(checkpoint: Checkpoint, key: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A tensor as runs of rows, in the order that llama.cpp has them."""
    rows = checkpoint.view(key)
    if FAMILIES[checkpoint.config.family].gguf_permutes:
        rows = interleaved(key, rows, checkpoint.config.head_dim)
    if is_mapped_whole(rows) and rows.dtype == dtype:
        yield rows  # the system copies it, whatever its size
        return
    step = max(1, BLOCK * len(rows) // rows.size)
    yield from (rows[start : start + step] for start in range(0, len(rows), step))


def _write_block(descriptor: int, alone: threading.Lock, at: int, block: np.ndarray, kind: Kind, where: str) -> None:
    dtype = jnp.dtype(DTYPES.get(kind, "float32"))
    with np.errstate(over="ignore"):  # refused below
        values = block if block.dtype == dtype else np.ascontiguousarray(block, dtype)
    if not is_finite(values):
        raise UserError(f"{where}: NaN or infinite values in {kind.name.lower()}")
    data = values if kind in DTYPES else quantize(values, kind)
    with alone:
        write_at(descriptor, at, data)


def printed_figures(report: Figures) -> Figures:
    figures = {name: value for name, value in report.items() if name != "bytes"}
    return {**figures, "gigabytes": report["bytes"] / 1e9}
