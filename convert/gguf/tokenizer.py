"""The tokenizer of a model directory as llama.cpp keeps it inside a GGUF file.

llama.cpp has its own tokenizers and knows two kinds that matter here. `gpt2` is byte-level BPE: pieces are spelled with
one printable character for each byte, merges are listed in order of rank, and the regular expression that cuts a text
into words is not in the file but goes by a name, so only expressions whose name is known can be written. `llama` is
SentencePiece's BPE by scores, with a token for every byte.

Tekken lists no merges, only ranks. Inside a piece no merge crosses the piece's border, so byte-pair encoding it alone
goes the way it goes in any text, and the last step is the one merge that makes this piece.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gguf import GGUFWriter, TokenType
from gguf.vocab import bytes_to_unicode
from sentencepiece import sentencepiece_model_pb2

from convert.gguf.chat_template import mistral_template
from convert.gguf.rewritten import Piece, has_space_prefix, rewritten_pieces
from nemoe_jax.checkpoints.gguf.pre_tokenizers import DIGIT, GPT2, PRE_TOKENIZERS, QWEN2
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.text.tokenizers.base import Tokenizer
from nemoe_jax.text.tokenizers.hf_tokenizer import TokenizerJson, read_side_files, read_templates
from nemoe_jax.text.tokenizers.load import load_tokenizer
from nemoe_jax.text.tokenizers.sentencepiece_tokenizer import SPACE, VERSION
from nemoe_jax.text.tokenizers.tekken import control_names, mergeable_ranks
from nemoe_jax.utils.json_file import read_json

SPM_BPE = 2  # trainer_spec.model_type


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """All that a GGUF file says about its tokenizer."""

    tokenizer: Tokenizer
    model: Literal["gpt2", "llama"]
    pre: str
    pieces: list[Piece]
    merges: list[str]
    space_prefix: bool
    chat_templates: Mapping[str, str]

    def add_to(self, writer: GGUFWriter, config: ModelConfig) -> None:
        """Adds the keys, the vocabulary padded to the rows of the embedding, and the config's end tokens with ours."""
        unused = [_unused(i) for i in range(len(self.pieces), config.vocab)]
        texts, types, scores = zip(*self.pieces, *unused, strict=True)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(texts)
        writer.add_token_types(types)
        if self.model == "llama":
            writer.add_token_scores(scores)
        writer.add_token_merges(self.merges)
        if self.tokenizer.bos_id is not None:
            writer.add_bos_token_id(self.tokenizer.bos_id)
        stops = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
        ends = dict.fromkeys(end for end in (self.tokenizer.eos_id, *stops) if end is not None and end < config.vocab)
        kinds = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
        for end, add in zip(ends, kinds, strict=False):
            add(end)
        named = {piece.text: i for i, piece in enumerate(self.pieces) if piece.type != TokenType.NORMAL}
        for key, add in {"unk_token": writer.add_unk_token_id, "pad_token": writer.add_pad_token_id}.items():
            token = named.get(self.tokenizer.template_variables.get(key, f"<{key[:3]}>"))
            if token is not None:
                add(token)
        writer.add_add_bos_token(bool(self.tokenizer.before))
        writer.add_add_eos_token(bool(self.tokenizer.after))
        writer.add_add_space_prefix(self.space_prefix)
        if self.chat_templates:
            writer.add_chat_template([{"name": name, "template": one} for name, one in self.chat_templates.items()])


def read_vocabulary(directory: Path, rows: int) -> Vocabulary:
    """The tokenizer of a model directory whose embedding has `rows` rows.

    The chat template is the directory's own, or says Mistral's format where it has none.

    Raises:
        UserError: no tokenizer, one that llama.cpp does not have, or one with more tokens than the embedding has rows.
    """
    tokenizer = load_tokenizer(directory)
    if isinstance(tokenizer, TokenizerJson):
        vocabulary = _from_json(tokenizer, tokenizer.chat_templates or _own_format(tokenizer))
    else:
        templates = read_templates(directory, read_side_files(directory)) or _own_format(tokenizer)
        make = _from_tekken if tokenizer.kind == "tekken" else _from_sentencepiece
        vocabulary = make(tokenizer, templates)
    if len(vocabulary.pieces) > rows:
        raise UserError(
            f"{tokenizer.path}: {len(vocabulary.pieces)} tokens, but the embedding of {directory} has {rows} rows"
        )
    return vocabulary


def _own_format(tokenizer: Tokenizer) -> dict[str, str]:
    template = mistral_template(tokenizer.version)
    return {"default": template} if template else {}


def _from_tekken(tokenizer: Tokenizer, templates: Mapping[str, str]) -> Vocabulary:
    spec = read_json(tokenizer.path)
    names = control_names(tokenizer.path, spec)
    ranks = mergeable_ranks(tokenizer.path, spec["vocab"], tokenizer.vocab_size - len(names))
    pieces = [Piece(name, TokenType.CONTROL) for name in names]
    pieces += [Piece(_spelled(piece), TokenType.NORMAL) for piece in ranks]
    merges = [" ".join(map(_spelled, merge)) for piece in ranks if (merge := last_merge(piece, ranks))]
    pre = _name_of((spec["config"]["pattern"],), tokenizer.path)
    return Vocabulary(tokenizer, "gpt2", pre, pieces, merges, False, templates)


def last_merge(piece: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two pieces whose merge makes this one; None for a byte, and for a piece that no merges lead to."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        pairs = (ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts))
        rank, at = min((rank, at) for at, rank in enumerate(pairs))
        if rank == len(ranks):
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _spelled(piece: bytes) -> str:
    return piece.decode("latin-1").translate(_alphabet())


_alphabet = functools.cache(bytes_to_unicode)  # {byte: its printable character}


def _name_of(patterns: tuple[str, ...], path: Path) -> str:
    for name, rules in PRE_TOKENIZERS.items():
        if rules.patterns == patterns:
            return name
    known = ", ".join(PRE_TOKENIZERS)
    raise UserError(
        f"{path}: llama.cpp has no name for its way to cut words ({known} are known): {' then '.join(patterns)}"
    )


def _from_json(tokenizer: TokenizerJson, templates: Mapping[str, str]) -> Vocabulary:
    spec = tokenizer.read_spec()
    added = {token["id"]: token["content"] for token in spec.get("added_tokens") or []}
    added_pieces = {
        i: Piece(text, TokenType.CONTROL if text in tokenizer.control else TokenType.USER_DEFINED)
        for i, text in added.items()
    }
    patterns = _byte_level_patterns(spec)
    merges = [
        tuple(merge if isinstance(merge, list) else merge.split(" ")) for merge in spec["model"].get("merges", [])
    ]
    if patterns is None:  # as Llama 2 and Mixtral have it: SentencePiece's, rewritten; where it is there, the original
        originals = sorted(file for file in tokenizer.path.parent.glob("*.model*") if VERSION.search(file.name))
        if not originals:
            pieces = _in_order(rewritten_pieces(tokenizer.path, spec, merges) | added_pieces)
            return Vocabulary(tokenizer, "llama", "default", pieces, [], has_space_prefix(spec), templates)
        original = _from_sentencepiece(load_tokenizer(originals[-1]), templates)
        pieces = _in_order(added_pieces | dict(enumerate(original.pieces)))
        return dataclasses.replace(original, tokenizer=tokenizer, pieces=pieces)
    normal = {i: Piece(text, TokenType.NORMAL) for text, i in spec["model"]["vocab"].items()}
    name = _name_of(patterns, tokenizer.path)
    return Vocabulary(
        tokenizer, "gpt2", name, _in_order(normal | added_pieces), list(map(" ".join, merges)), False, templates
    )


def _byte_level_patterns(spec: dict[str, Any]) -> tuple[str, ...] | None:
    """The regular expressions of a byte-level BPE; None for any other tokenizer."""
    pre = spec.get("pre_tokenizer") or {}
    *splits, last = pre.get("pretokenizers") or [pre]
    if spec["model"].get("type", "BPE") != "BPE" or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    isolated = {"type": "Split", "behavior": "Isolated", "invert": False}
    patterns = []
    for split in splits:
        if split.get("type") == "Digits" and split.get("individual_digits"):
            patterns.append(DIGIT)
        elif isolated.items() <= split.items() and "Regex" in split["pattern"]:
            patterns.append(split["pattern"]["Regex"])
        else:
            return None
    if last.get("use_regex", True):
        patterns.append(GPT2)
    # Qwen's tokenizer composes characters first; llama.cpp has never done so, and goes by the name all the same
    normalizer = spec.get("normalizer")
    if normalizer and not (normalizer == {"type": "NFC"} and patterns == [QWEN2]):
        return None
    return tuple(patterns) or None


def _from_sentencepiece(tokenizer: Tokenizer, templates: Mapping[str, str]) -> Vocabulary:
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())  # type: ignore[attr-defined]
    if model.trainer_spec.model_type != SPM_BPE or not model.trainer_spec.byte_fallback:
        raise UserError(f"{tokenizer.path}: gguf wants a SentencePiece model of type BPE with byte fallback")
    rules = model.normalizer_spec
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise UserError(f"{tokenizer.path}: normalizes text ({rules.name}), which llama.cpp's tokenizer cannot")
    pieces = [  # SentencePiece numbers the types as GGUF does
        Piece(_searched(piece.piece) if piece.type == TokenType.USER_DEFINED else piece.piece, piece.type, piece.score)
        for piece in model.pieces
    ]
    return Vocabulary(tokenizer, "llama", "default", pieces, [], rules.add_dummy_prefix, templates)


def _searched(text: str) -> str:
    """llama.cpp looks for user-defined tokens in a text as it stands, before spaces become ▁."""
    return text.replace(SPACE, " ")


def _in_order(pieces: Mapping[int, Piece]) -> list[Piece]:
    return [pieces.get(i) or _unused(i) for i in range(1 + max(pieces))]


def _unused(token: int) -> Piece:
    return Piece(f"[PAD{token}]", TokenType.UNUSED, -1000.0)
