"""A directory with `tokenizer.model` and Hugging Face's files beside it, but no `tokenizer.json`.

The files beside it (`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`) add tokens, name the
special ones and bring a chat template. So the SentencePiece model is rewritten as the `tokenizer.json` that
transformers makes of it: BPE with the merges that its tokens imply (or Unigram with their scores), `▁` for spaces, a
token for every byte.
"""

import base64
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from nemoe_jax.checkpoints.gguf.naming import EXACT_SPACES
from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.hf_tokenizer import (
    ALWAYS_CONTROL,
    SIDE_FILES,
    TEMPLATE_FOLDER,
    TokenizerJson,
    read_side_files,
    token_text,
)
from nemoe_jax.text.tokenizers.sentencepiece_tokenizer import SPACE, version_of
from nemoe_jax.utils.json_file import read_json

UNIGRAM, BPE = 1, 2  # trainer_spec.model_type
CONTROL, USER_DEFINED = 3, 4  # the type of a token


class SentencePieceDirectory(TokenizerJson):
    """A SentencePiece model read together with the files beside it, as transformers reads the directory."""

    kind = "sentencepiece"

    def __init__(self, path: Path):
        super().__init__(path, rewritten(path))
        self.version = None if self.chat_templates else version_of(path, self.control)

    def read_spec(self) -> dict[str, Any]:
        return rewritten(self.path)


def has_side_files(path: Path) -> bool:
    """Whether files of Hugging Face's stand beside a `tokenizer.model`, which no file name of Mistral's explains."""
    beside = (*SIDE_FILES, TEMPLATE_FOLDER)
    return path.name == "tokenizer.model" and any((path.parent / name).exists() for name in beside)


def rewritten(path: Path) -> dict[str, Any]:
    """The `tokenizer.json` of a SentencePiece model and the files beside it.

    Raises:
        UserError: not a SentencePiece model, or one of another type than BPE and Unigram.
    """
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
    except Exception as error:  # protobuf's own, of several kinds
        raise UserError(f"{path}: not a SentencePiece model, or corrupted") from error
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (UNIGRAM, BPE) or not proto.pieces:
        raise UserError(f"{path}: expected a SentencePiece model of type BPE or Unigram, got type {trainer.model_type}")
    config = read_side_files(path.parent)
    vocab = {one.piece: i for i, one in enumerate(proto.pieces)}
    model: dict[str, Any] = {"byte_fallback": trainer.byte_fallback}
    if trainer.model_type == BPE:
        model |= {"type": "BPE", "vocab": vocab, "merges": implied_merges(vocab, [one.score for one in proto.pieces])}
        model |= {"unk_token": trainer.unk_piece, "fuse_unk": True}
    else:
        scores = [[one.piece, one.score] for one in proto.pieces]
        model |= {"type": "Unigram", "vocab": scores, "unk_id": trainer.unk_id}
    prefix = config.get("add_prefix_space")
    prefix = rules.add_dummy_prefix if prefix is None else prefix
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    spaces: Any = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    steps_before = normalizers(rules)
    if prefix and config.get(EXACT_SPACES):  # Metaspace adds no space before a space
        steps_before += [{"type": "Prepend", "prepend": SPACE}]
        steps_before += [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
        spaces = None
    added = added_tokens(path.parent, config, vocab, proto)
    return {
        "version": "1.0",
        "model": model,
        "normalizer": sequence(steps_before),
        "pre_tokenizer": spaces,
        "post_processor": post_processor(config, {token["content"]: token["id"] for token in added}),
        "decoder": {"type": "Sequence", "decoders": steps},
        "added_tokens": added,
    }


def implied_merges(vocab: dict[str, int], scores: list[float]) -> list[list[str]]:
    """The merges of a BPE that is known by its tokens: every pair that makes a token, the best score first."""
    merges = []
    for merged, i in vocab.items():
        rank = (-scores[i], i)
        for cut in range(1, len(merged)):
            left, right = merged[:cut], merged[cut:]
            if left in vocab and right in vocab:
                merges.append((rank, len(left), len(right), left, right))
    return [[left, right] for *_, left, right in sorted(merges)]


def normalizers(rules: Any) -> list[dict[str, Any]]:
    """SentencePiece's rules for text: its table of characters, and no spaces but single ones."""
    steps: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        table = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": table})
    if rules.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return steps


def sequence(steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Normalizers one after another; None without any."""
    return {"type": "Sequence", "normalizers": steps} if steps else None


def added_tokens(directory: Path, config: dict[str, Any], vocab: dict[str, int], proto: Any) -> list[dict[str, Any]]:
    """The added tokens: the model's own control and user-defined ones, and those of the files beside it.

    Special tokens that no file gives an id get the next free ones.
    """
    own = {i: one for i, one in enumerate(proto.pieces) if one.type in (CONTROL, USER_DEFINED)}
    tokens = {i: added_token(i, one.piece, one.type == CONTROL) for i, one in own.items()}
    names = {key: token_text(config[key]) for key in ALWAYS_CONTROL if token_text(config.get(key))}
    if "added_tokens_decoder" in config:
        listed = {int(i): token for i, token in config["added_tokens_decoder"].items()}
        tokens |= {i: added_token(i, token_text(token), **flags(token)) for i, token in sorted(listed.items())}
    else:
        file = directory / "added_tokens.json"
        found = read_json(file) if file.is_file() else {}
        extra = [config.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
        special = {*names.values(), *(token_text(token) for group in extra for token in group)}
        for name, i in sorted(found.items(), key=lambda item: item[1]):
            tokens[i] = added_token(i, name, name in special, normalized=name not in special)
    known = {token["content"] for token in tokens.values()}
    for name in names.values():
        if name not in known:
            i = vocab.get(name, max([len(vocab) - 1, *tokens]) + 1)
            tokens[i] = added_token(i, name, True)
            known.add(name)
    return [tokens[i] for i in sorted(tokens)]


def added_token(i: int, content: str, special: bool, normalized: bool = False, **more: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False}
    return {**plain, **more, "id": i, "content": content, "special": special, "normalized": normalized}


def flags(token: Any) -> dict[str, bool]:
    """What `added_tokens_decoder` says of a token."""
    keys = ("single_word", "lstrip", "rstrip", "special", "normalized")
    said = {key: bool(token[key]) for key in keys if key in token} if isinstance(token, dict) else {}
    return {"special": False} | said


def post_processor(config: dict[str, Any], ids: dict[str, int]) -> dict[str, Any] | None:
    """What `add_bos_token` and `add_eos_token` ask for."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single: list[dict[str, Any]] = [text]
    named = {}
    for key, fallback in (("bos_token", "<s>"), ("eos_token", "</s>")):
        name = token_text(config.get(key)) or fallback
        if config.get(f"add_{key}") and name in ids:
            named[name] = {"id": name, "ids": [ids[name]], "tokens": [name]}
            token = {"SpecialToken": {"id": name, "type_id": 0}}
            single = [token, *single] if key == "bos_token" else [*single, token]
    if not named:
        return None
    pair = [text, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": named}
