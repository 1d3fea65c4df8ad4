"""The tokenizer of a GGUF file as the files of a model directory.

llama.cpp's `gpt2` is byte-level BPE and becomes tokenizer.json; its `llama` is SentencePiece's BPE by scores and
becomes tokenizer.model, which says it exactly. Both get a tokenizer_config.json and the chat templates. The ids are
those of llama.cpp: what it does not do (the NFC of Qwen's own tokenizer.json) is not done here either.
"""

import json
import re
from typing import Any

import numpy as np
from gguf import TokenType
from sentencepiece import sentencepiece_model_pb2

from nemoe_jax.checkpoints.gguf.config import token_ids
from nemoe_jax.checkpoints.gguf.header import GgufHeader
from nemoe_jax.checkpoints.gguf.naming import EXACT_SPACES
from nemoe_jax.checkpoints.gguf.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer, to_json
from nemoe_jax.errors import UserError

_PREFIX = "tokenizer.ggml."
_BPE = 2  # trainer_spec.model_type
_SPACE = "▁"
_CONTROL = (TokenType.CONTROL, TokenType.UNKNOWN)


def tokenizer_files(header: GgufHeader) -> dict[str, bytes]:
    """{file name: content} of the tokenizer and the chat templates; empty where the file has no tokenizer.

    Raises:
        UserError: a kind of tokenizer that is not known, a list of the wrong length, or more tokens than the embedding
            has rows.
    """
    fields = _Fields(header)
    model = fields.get("model", str, "none")
    if model in ("none", "no_vocab"):
        return {}
    if model not in ("gpt2", "llama"):
        raise UserError(f"{fields.source}: {_PREFIX}model: unknown tokenizer {model!r}; known: gpt2, llama")
    tokens, types = fields.tokens()
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None and len(tokens) > embedding.shape[0]:
        raise UserError(
            f"{fields.source}: {len(tokens)} tokens, but the embedding token_embd.weight has {embedding.shape[0]} rows"
        )
    ids = token_ids(header)
    if model == "gpt2":
        name = fields.get("pre", str, "default")
        rules = pre_tokenizer(name)
        if rules is None:
            known = ", ".join(PRE_TOKENIZERS)
            raise UserError(f"{fields.source}: {_PREFIX}pre: unknown pre-tokenizer {name!r}; known: {known}")
        adds_bos = rules.adds_bos
        files = {"tokenizer.json": b""}
    else:
        adds_bos = True
        files = {"tokenizer.model": _sentencepiece(fields, tokens, types, ids)}
    adds = {
        "add_bos_token": fields.get("add_bos_token", bool, adds_bos) and "bos" in ids,
        "add_eos_token": fields.get("add_eos_token", bool, False) and "eos" in ids,
    }
    if model == "gpt2":
        content = _byte_level(fields, tokens, types, ids, adds)
        files["tokenizer.json"] = json.dumps(content, ensure_ascii=False).encode()
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast" if model == "gpt2" else "LlamaTokenizer",
        **adds,
        **{key: tokens[ids[name]] if name in ids else None for key, name in named.items()},
        "clean_up_tokenization_spaces": False,
    }
    if model == "llama":
        config |= {"legacy": True, EXACT_SPACES: True, "add_prefix_space": fields.get("add_space_prefix", bool, True)}
    files["tokenizer_config.json"] = (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
    return files | _templates(header)


def _templates(header: GgufHeader) -> dict[str, bytes]:
    key = "tokenizer.chat_template"
    files = {}
    for name, text in header.metadata.items():
        if name != key and not name.startswith(key + "."):
            continue
        if not isinstance(text, str):
            raise UserError(f"{header.paths[0]}: {name}: expected a string")
        named = name[len(key) + 1 :]
        if not named:
            files["chat_template.jinja"] = text.encode()
        elif re.fullmatch(r"[\w-]+", named):
            files[f"additional_chat_templates/{named}.jinja"] = text.encode()
        else:
            raise UserError(f"{header.paths[0]}: {name}: not the name of a chat template")
    return files


class _Fields:
    """The metadata of the tokenizer, checked value by value."""

    def __init__(self, header: GgufHeader):
        self.source = str(header.paths[0])
        self._metadata = header.metadata

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self._metadata.get(_PREFIX + name, default)
        if not isinstance(value, kind) or (isinstance(value, str) and not value.isprintable()):
            raise UserError(f"{self.source}: {_PREFIX}{name}: expected a {kind.__name__}, got {value!r}")
        return value

    def tokens(self) -> tuple[list[str], list[int]]:
        """The tokens and their types."""
        tokens = self.get("tokens", list, None)
        types = self.numbers("token_type", len(tokens), np.full(len(tokens), TokenType.NORMAL)).tolist()
        if wrong := set(types) - set(TokenType):
            raise UserError(f"{self.source}: {_PREFIX}token_type: unknown type {min(wrong)}")
        return tokens, types

    def numbers(self, name: str, length: int, default: np.ndarray | None = None) -> np.ndarray:
        """One number for each token."""
        value = self._metadata.get(_PREFIX + name, default)
        if not isinstance(value, np.ndarray) or value.shape != (length,):
            raise UserError(f"{self.source}: {_PREFIX}{name}: expected a list of {length} numbers, one for each token")
        return value


def _byte_level(
    fields: _Fields, tokens: list[str], types: list[int], ids: dict[str, int], adds: dict[str, bool]
) -> dict[str, Any]:
    """The content of tokenizer.json."""
    rules = pre_tokenizer(fields.get("pre", str, "default"))
    assert rules is not None
    merges = [tuple(merge.partition(" ")[::2]) for merge in fields.get("merges", list, [])]
    merged = {part for left, right in merges for part in (left, right, left + right)}
    vocab: dict[str, int] = {}
    added = []
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != TokenType.UNUSED or text in merged:  # the library wants added tokens here, too, if not at the end
            if text in vocab:
                raise UserError(f"{fields.source}: {_PREFIX}tokens: {text!r} is both token {vocab[text]} and {i}")
            vocab[text] = i
        if kind in (*_CONTROL, TokenType.USER_DEFINED) and text:
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
            added.append({"id": i, "content": text, **plain, "special": kind in _CONTROL})
    if lost := [merge for merge in merges if not {*merge, "".join(merge)} <= vocab.keys()]:
        raise UserError(f"{fields.source}: {_PREFIX}merges: {' '.join(lost[0])!r} is not made of tokens, or makes none")
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    bos, eos = (
        [{"SpecialToken": {"id": tokens[ids[name]], "type_id": 0}}] if adds[f"add_{name}_token"] else []
        for name in ("bos", "eos")
    )
    single = [*bos, {"Sequence": {"id": "A", "type_id": 0}}, *eos]
    around = {
        tokens[ids[name]]: {"id": tokens[ids[name]], "ids": [ids[name]], "tokens": [tokens[ids[name]]]}
        for name in ("bos", "eos")
        if adds[f"add_{name}_token"]
    }
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": around,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": to_json(rules.patterns),
        "post_processor": template if around else {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": rules.whole_words,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _sentencepiece(fields: _Fields, tokens: list[str], types: list[int], ids: dict[str, int]) -> bytes:
    """The content of tokenizer.model."""
    scores = fields.numbers("scores", len(tokens))
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    seen: dict[str, int] = {}
    for i, (text, kind, score) in enumerate(zip(tokens, types, scores.tolist(), strict=True)):
        if kind == TokenType.USER_DEFINED:
            text = text.replace(" ", _SPACE)  # llama.cpp looks for these before it replaces spaces
        if not text or text in seen:
            kind, text = TokenType.UNUSED, f"[PAD{i}]"
        seen[text] = i
        model.pieces.add(piece=text, score=score, type=int(kind))
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = _BPE, True, len(tokens)
    trainer.unk_id, trainer.bos_id, trainer.eos_id = (ids.get(name, -1) for name in ("unknown", "bos", "eos"))
    trainer.pad_id = ids.get("padding", -1) if types[ids.get("padding", 0)] in _CONTROL else -1
    for name in ("bos", "eos", "unk"):
        token = ids.get("unknown" if name == "unk" else name)
        if token is not None:
            setattr(trainer, f"{name}_piece", model.pieces[token].piece)
    normalizer.name, normalizer.add_dummy_prefix = "identity", fields.get("add_space_prefix", bool, True)
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model.SerializeToString()
