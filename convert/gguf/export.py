"""GGUF: a model directory as the one file that llama.cpp and what is built on it run.

The tensors are the directory's own. llama.cpp turns neighboring rows of a head by RoPE where Hugging Face turns rows
half a head apart, so the rows of q and k change places; a layer's experts lie one after another in one tensor; norms
and routers stay in float32. Mixtral and its dense relatives are all `llama` there.

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

from convert.gguf.tokenizer import Vocabulary, read_vocabulary
from convert.options import GgufOptions
from convert.streaming import MOST_THREADS, ConversionSettings, Figures, Manifest
from nemoe_jax.checkpoints.mistral_format import to_mistral_rows
from nemoe_jax.checkpoints.reader import Checkpoint, TensorRef, units
from nemoe_jax.checkpoints.safetensors_file import is_finite
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.utils.file_copy import is_mapped_whole, write_at
from nemoe_jax.utils.output_path import atomic_write, check_room, refuse_existing
from nemoe_jax.utils.progress import progress_bar

Kind = gguf.GGMLQuantizationType
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
DTYPES = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
BLOCK = 1 << 22  # elements converted at once


class Tensor(NamedTuple):
    """A tensor of the GGUF file."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    sources: list[TensorRef]  # one, or all experts of a layer
    size: int  # bytes


def to_gguf(
    source: str | Path, destination: str | Path, options: GgufOptions, run: ConversionSettings = ConversionSettings()
) -> Manifest:
    """Writes a model directory as one GGUF file; returns its figures.

    Raises:
        UserError: a family or tokenizer that llama.cpp does not have, an existing destination, no room for it, NaN or
            infinite weights.
    """
    checkpoint, target = Checkpoint(source), Path(destination)
    config = checkpoint.config
    if FAMILIES[config.family].gguf != "llama":
        able = [family.name for family in FAMILIES.values() if family.gguf == "llama"]
        raise UserError(f"{source}: gguf writes models of family {', '.join(able)}, not {config.family}")
    refuse_existing(target)
    vocabulary = read_vocabulary(checkpoint.directory, config.vocab)
    kind = KINDS[options.type] if options.type != "auto" else _kind_of(config.dtype)
    by_unit = plan(config, kind)
    tensors = list(itertools.chain.from_iterable(by_unit))
    check_room(target, sum(tensor.size for tensor in tensors))
    report = {
        "type": kind.name.lower(),
        "tensors": len(tensors),
        "tokens": len(vocabulary.pieces),
        "chat_template": bool(vocabulary.chat_templates),
        "bytes": sum(tensor.size for tensor in tensors),
        "written": not options.dry_run,
    }
    if not options.dry_run:
        writer = _header(checkpoint, config, vocabulary, kind, tensors)
        with atomic_write(target, parents=True) as partial:
            _write(writer, partial, checkpoint, by_unit)
    return report


def plan(config: ModelConfig, kind: Kind) -> list[list[Tensor]]:
    """The tensors of a model by the units in which they are read: embedding, each layer, norm and head."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)

    def name_of(ref: TensorRef) -> str:
        layer = ref.place[0] + ref.spec.first_layer if ref.place else 0
        key = ref.spec.key.replace("{expert}.", "").format(layer=layer)
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None, key
        return name

    by_unit = []
    for refs in units(config):
        grouped = itertools.groupby(refs, name_of)
        by_unit.append([_tensor(name, list(group), config, kind) for name, group in grouped])
    return by_unit


def _tensor(name: str, sources: list[TensorRef], config: ModelConfig, kind: Kind) -> Tensor:
    spec = sources[0].spec
    shape = (config.experts, *spec.torch_shape) if "experts" in spec.stacked else spec.torch_shape
    if len(shape) == 1 or spec.produced == ("experts",):
        kind = Kind.F32
    try:
        size = math.prod(quant_shape_to_byte_shape(shape, kind))
    except ValueError as error:
        raise UserError(f"--type {kind.name.lower()}: {sources[0].key}: {error}") from error
    return Tensor(name, shape, kind, sources, size)


def _kind_of(dtype: str) -> Kind:
    return next(kind for kind, known in DTYPES.items() if known == dtype)


def _header(
    checkpoint: Checkpoint, config: ModelConfig, vocabulary: Vocabulary, kind: Kind, tensors: list[Tensor]
) -> gguf.GGUFWriter:
    """All of the file but its data."""
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(checkpoint.directory.resolve().name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.expert_ffn or config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.experts:
        writer.add_expert_count(config.experts)
        writer.add_expert_used_count(config.top_k)
    vocabulary.add_to(writer, config)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.kind)
    return writer


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
                for ref in tensor.sources:
                    for block in _blocks(checkpoint, ref.key, jnp.dtype(DTYPES.get(tensor.kind, "float32"))):
                        where = f"{checkpoint.path}: {ref.key}"
                        blocks.append(pool.submit(_write_block, file.fileno(), alone, at, block, tensor.kind, where))
                        at += block.size * tensor.size // math.prod(tensor.shape)
            for done in blocks:
                done.result()
        file.truncate(writer.ggml_pad(at, writer.data_alignment))


def _blocks(checkpoint: Checkpoint, key: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    """A tensor as runs of rows, in the order that llama.cpp shares with Mistral's own code."""
    rows = to_mistral_rows(key, checkpoint.view(key), checkpoint.config.head_dim)
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
    data = quantize(values, kind) if kind is Kind.Q8_0 else values
    with alone:
        write_at(descriptor, at, data)


def printed_figures(report: Manifest) -> Figures:
    figures = {name: value for name, value in report.items() if name != "bytes"}
    return {**figures, "gigabytes": report["bytes"] / 1e9}
