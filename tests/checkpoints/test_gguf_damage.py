"""Damaged GGUF files and those of other models are refused by name, and nothing of a result stays."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from convert.cli import main
from nemoe_jax.checkpoints.gguf.header import read_header
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.load import load_tokenizer

F32 = gguf.GGMLQuantizationType.F32
LETTERS = list("abcdefghij")
VALUES: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 12,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["<s>", *LETTERS, "ab"],
    "tokenizer.ggml.token_type": [3, *[1] * 11],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}
SHAPES = {
    "token_embd.weight": (12, 8),
    "output_norm.weight": (8,),
    **{f"blk.0.attn_{part}.weight": (8, 8) for part in ("q", "k", "v", "output")},
    "blk.0.attn_norm.weight": (8,),
    "blk.0.ffn_norm.weight": (8,),
    "blk.0.ffn_gate.weight": (12, 8),
    "blk.0.ffn_up.weight": (12, 8),
    "blk.0.ffn_down.weight": (8, 12),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, changes: dict[str, Any] | None = None, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Path:
    """A model of one layer; a value None leaves its key out."""
    values = VALUES | (changes or {})
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        if value is not None:
            add[type(value)](key, value)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, np.float32), raw_dtype=F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(path: Path) -> str | None:
    """What a file is refused with; None where it is not."""
    try:
        Checkpoint(path)
        load_tokenizer(path)
    except UserError as error:
        message = str(error)
        assert message.startswith(str(path)) and message.isprintable(), message
        return message
    return None


def test_the_sound_file_is_read(tmp_path):
    path = write(tmp_path / "model.gguf")
    assert refusal(path) is None
    assert load_tokenizer(path).encode("abc") == [11, 3]


def test_a_file_cut_anywhere_is_refused(tmp_path):
    data = write(tmp_path / "sound.gguf").read_bytes()
    header_ends = min(tensor.offset for tensor in read_header(tmp_path / "sound.gguf").tensors.values())
    path = tmp_path / "model.gguf"
    for size in [*range(0, header_ends, 29), *range(header_ends, len(data) - 31, 501), len(data) - 64]:
        path.write_bytes(data[:size])
        assert refusal(path) is not None, size


def test_flipped_bytes_are_refused_or_harmless(tmp_path):
    """Many leave another sound file: a letter of a name that is not read, another number of tokens of context."""
    data = write(tmp_path / "sound.gguf").read_bytes()
    header_ends = min(tensor.offset for tensor in read_header(tmp_path / "sound.gguf").tensors.values())
    chance = random.Random(0)
    refused = 0
    for round in range(250):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 5])):
            damaged[chance.randrange(header_ends)] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        path = tmp_path / f"{round}.gguf"
        path.write_bytes(damaged)
        refused += refusal(path) is not None
        path.unlink()
    assert refused > 100


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in SHAPES.items() if name not in names}


def other_type(path: Path, number: int) -> None:
    """Another type for the last tensor of the header, whose entry ends in type (4 bytes) and offset (8)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.ffn_down.weight") + len("blk.0.ffn_down.weight") + 4 + 2 * 8
    data[at : at + 4] = number.to_bytes(4, "little")
    path.write_bytes(data)


def changed(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: write(path, {key.replace("__", "."): value for key, value in changes.items()})


LISTS = "tokenizer__ggml__"
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda path: path.write_bytes(b""), "not a GGUF file|empty"),
    "another file": (lambda path: path.write_bytes(b"PK" * 40), "not a GGUF file"),
    "version 1": (lambda path: path.write_bytes(b"GGUF\1\0\0\0" + bytes(64)), "version 2 or 3, got version 1"),
    "big endian": (lambda path: path.write_bytes(b"GGUF\0\0\0\3" + bytes(64)), "little-endian .* got a big-endian"),
    "architecture": (changed(general__architecture="gemma3"), "unknown GGUF architecture 'gemma3'; known: llama, mis"),
    "type unknown": (lambda path: other_type(write(path), 99), "tensor blk.0.ffn_down.weight: unknown type 99"),
    "no blocks": (lambda path: other_type(write(path), 12), r"blk.0.ffn_down.weight: shape \(8, 12\) of Q4_K"),
    "integers": (lambda path: other_type(write(path), 26), "down_proj.weight has type I32; expected one of F32, F16"),
    "a key": (changed(llama__context_length=None), "llama.context_length is missing"),
    "a kind": (changed(llama__embedding_length="8"), "llama.embedding_length: expected an integer .* got '8'"),
    "layers": (changed(llama__block_count=2**30), "block_count = 1073741824, but the file has 11 tensors"),
    "rope": (changed(llama__rope__scaling__type="longrope"), "llama.rope.scaling.type: unknown type 'longrope'"),
    "scale": (changed(llama__logit_scale=3.0), "llama.logit_scale = 3.0 is not supported"),
    "partial": (changed(llama__rope__dimension_count=2), "rope.dimension_count: expected the key length 4"),
    "embedding": (lambda path: write(path, shapes=without("token_embd.weight")), "no tensor token_embd.weight"),
    "missing": (lambda path: write(path, shapes=without("blk.0.ffn_up.weight")), "missing .*mlp.up_proj.weight"),
    "more": (lambda path: write(path, shapes=SHAPES | {"blk.0.more.weight": (8,)}), "unexpected blk.0.more.weight"),
    "misshapen": (lambda path: write(path, shapes=SHAPES | {"blk.0.attn_q.weight": (6, 8)}), r"got \(6, 8\)"),
    "tokenizer": (changed(tokenizer__ggml__model="t5"), "unknown tokenizer 't5'; known: gpt2, llama"),
    "words": (changed(tokenizer__ggml__pre="poro"), "unknown pre-tokenizer 'poro'; known: tekken, llama-bpe"),
    "too many tokens": (
        changed(tokenizer__ggml__tokens=["<s>", *LETTERS, "ab", "x"], tokenizer__ggml__token_type=[3, *[1] * 12]),
        "13 tokens, but the embedding token_embd.weight has 12 rows",
    ),
    "types": (changed(tokenizer__ggml__token_type=[3, 1]), "token_type: expected a list of 12 numbers"),
    "twice": (changed(tokenizer__ggml__tokens=["<s>", *LETTERS, "a"]), "'a' is both token 1 and 11"),
    "merge": (changed(tokenizer__ggml__merges=["a c"]), "merges: 'a c' is not made of tokens, or makes none"),
    "end": (changed(tokenizer__ggml__eos_token_id=12), "eos_token_id: expected a token id below 12, got 12"),
    "template": (changed(tokenizer__chat_template=3), "tokenizer.chat_template: expected a string"),
    "scores": (changed(tokenizer__ggml__model="llama"), "tokenizer.ggml.scores: expected a list of 12 numbers"),
}


@pytest.mark.parametrize("case", CASES)
def test_other_files_are_refused_by_name(case, tmp_path, capsys):
    make, message = CASES[case]
    path = tmp_path / "model.gguf"
    make(path)
    before = set(tmp_path.iterdir())
    assert main(["from-gguf", str(path), str(tmp_path / "new" / "model")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and error.count("\n") == 1
    assert re.search(message, error), error
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "cache"}


def test_values_that_are_not_finite_are_refused(tmp_path, capsys):
    path = write(tmp_path / "model.gguf")
    place = read_header(path).tensors["blk.0.ffn_up.weight"].offset
    with path.open("r+b") as file:
        file.seek(place + 4)
        file.write(np.float32(np.nan).tobytes())
    assert main(["from-gguf", str(path), str(tmp_path / "model")]) == 2
    assert f"{path}: model.layers.0.mlp.up_proj.weight: NaN or infinite" in capsys.readouterr().err
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.gguf", "cache"}


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    path = write(tmp_path / "model.gguf")
    assert Checkpoint(path).config.context == 64
    write(path, {"llama.context_length": 32})
    os.utime(path, ns=(1, 1))
    assert Checkpoint(path).config.context == 32


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path / "none-00001-of-00002.gguf"):
        assert "No such file" in (refusal(path) or "")
