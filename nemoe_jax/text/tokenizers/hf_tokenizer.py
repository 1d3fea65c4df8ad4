"""Hugging Face's `tokenizer.json`, on the tokenizers library.

The library reads control tokens out of any text, and some models (Unigram, merged BPE) even form them from tokens. So
the tokenizer is loaded with its control tokens renamed to strings that cannot be typed: a random number between
private-use characters. A text that spells `</s>` then finds no such token, and `encode_parts` writes the secret name
where a control id is meant, so that the library still sees the whole text at once, with each token's stripping rules.

Control tokens are those marked special, bos, eos and unk, and any other added token that a chat template itself
writes (`<|im_start|>` is not always marked): transformers' `sanitize_control_tokens` draws the line at the same
place.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.base import MarkedPart, Tokenizer, is_learned, replace_surrogates
from nemoe_jax.utils.json_file import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ALWAYS_CONTROL = ("bos_token", "eos_token", "unk_token")
FALLBACK = {"bos_token": "<s>", "eos_token": "</s>"}  # for a tokenizer.json alone
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", TEMPLATE_FILE)


class TokenizerJson(Tokenizer):
    """A tokenizer from the parsed JSON of a `tokenizer.json` and the files beside it.

    Attributes:
        read_spec: reads that JSON again, which is too large to keep.
    """

    kind = "tokenizer.json"

    def __init__(self, path: Path, spec: dict[str, Any]):
        vocab, added = read_vocabulary(path, spec)
        config = read_side_files(path.parent)
        ids = {**vocab, **{token["content"]: token["id"] for token in added}}
        if not config.keys() & FALLBACK.keys():
            config |= {key: name for key, name in FALLBACK.items() if name in ids}
        self.path = path
        self.chat_templates = read_templates(path.parent, config)
        self.before, self.after = surroundings(path, spec)
        self.template_variables = {key: token_text(config[key]) for key in NAMED if token_text(config.get(key))}
        self.bos_id, self.eos_id = (ids.get(self.template_variables.get(key, "")) for key in FALLBACK)
        self._special = {token["content"] for token in added if token.get("special")} | marked_special(config)
        self._special |= {self.template_variables[key] for key in ALWAYS_CONTROL if key in self.template_variables}
        written = "\0".join(map(template_text, self.chat_templates.values()))
        names = self._special | {token["content"] for token in added if in_template(token["content"], written)}
        self.control = {name: ids[name] for name in sorted(names & ids.keys(), key=ids.__getitem__)}
        self.version = "v3" if not self.chat_templates and {"[INST]", "[/INST]"} <= self.control.keys() else None
        self.vocab_size = 1 + max(ids.values())
        self.gaps = set(range(self.vocab_size)) - set(ids.values())

        secret = secrets.token_hex(8)
        hidden = {name: f"\U000f0000{secret}.{i}\U000f0001" for name, i in self.control.items()}
        self._hidden = {self.control[name]: alias for name, alias in hidden.items()}
        self._names = {alias: name for name, alias in hidden.items()}
        self._alias = re.compile(rf"\U000f0000{secret}\.\d+\U000f0001")
        self._skipped = {self.control[name] for name in self._special & self.control.keys()}
        try:
            self._model = tokenizers.Tokenizer.from_str(json.dumps(hide(spec, hidden, self.control)))
        except Exception as error:  # the library raises no narrower type
            raise UserError(f"{path}: not a tokenizer that the tokenizers library reads ({error})") from error
        moved = [name for name, i in self.control.items() if self._model.token_to_id(hidden[name]) != i]
        if moved:
            raise UserError(f"{path}: added_tokens: the id of {moved[0]} disagrees with the vocabulary")

    def read_spec(self) -> dict[str, Any]:
        return read_json(self.path)

    @property
    def files(self) -> list[Path]:
        directory = self.path.parent
        beside = [directory / name for name in SIDE_FILES] + sorted(directory.glob(f"{TEMPLATE_FOLDER}/*.jinja"))
        return [self.path, *filter(Path.is_file, beside)]

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """As in the base class, except that the library sees all parts as one text, as it would see a rendered chat."""
        return self._encode_text("".join(map(self._written, parts)))

    def encode_marked(self, parts: Iterable[MarkedPart]) -> tuple[list[int], list[bool]]:
        """As in the base class; an id that joins characters of two parts is marked if one of them is."""
        written = [(self._written(part), mark) for part, mark in parts]
        marks = b"".join(mark if isinstance(mark, bytes) else bytes([mark]) * len(text) for text, mark in written)
        encoding = self._model.encode("".join(text for text, _ in written), add_special_tokens=False)
        return encoding.ids, [is_learned(marks, start, end) for start, end in encoding.offsets]

    def _written(self, part: str | int) -> str:
        """A part as the library reads it: a control id by its secret name."""
        if isinstance(part, str):
            return replace_surrogates(part)
        if part not in self._hidden:
            raise UserError(f"{self.path}: no control token with id {part}")
        return self._hidden[part]

    def _piece(self, token: int) -> str:
        name = self._model.id_to_token(token) or ""
        if name in self._names:
            return self._names[name]
        if "▁" in name:  # decoding would strip a leading space
            return name.replace("▁", " ")
        text = self._model.decode([token], skip_special_tokens=False)
        return name if "\ufffd" in text or not text else text

    def _encode_text(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def _decode(self, ids: list[int], skip_special: bool) -> str:
        if skip_special:
            ids = [i for i in ids if i not in self._skipped]
        text = self._model.decode(ids, skip_special_tokens=False)
        return self._alias.sub(lambda match: self._names[match[0]], text)


def hide(spec: dict[str, Any], hidden: Mapping[str, str], ids: Mapping[str, int]) -> dict[str, Any]:
    """The same tokenizer with control tokens renamed: in its added tokens, its vocabulary and its unknown token.

    Merges that would form a control token from text are left out, and so is what this interface does not use.
    """
    model = dict(spec["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if "merges" in model:
        model["merges"] = [
            merge
            for merge in model["merges"]
            if ("".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)) not in hidden
        ]
    added = {token["content"]: token for token in spec.get("added_tokens") or []}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    renamed = [
        {**token, "content": hidden[name], "normalized": False} if name in hidden else token
        for name, token in added.items()
    ]
    unlisted = [{**plain, "id": ids[name], "content": hidden[name]} for name in hidden if name not in added]
    unused = {"truncation": None, "padding": None, "post_processor": None}
    return {**spec, **unused, "model": model, "added_tokens": renamed + unlisted}


def read_vocabulary(path: Path, spec: dict[str, Any]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Ids of the model's pieces, and the added tokens. Raises UserError where the file has another form."""
    model, added = spec.get("model"), spec.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    try:
        pieces = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab or [])}
        if not pieces or not all(isinstance(token["content"], str) and token["id"] >= 0 for token in added):
            raise ValueError("the vocabulary is empty, or an added token has no content")
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a tokenizer.json: expected model.vocab and added_tokens ({error!r})") from error
    return pieces, added


def read_side_files(directory: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` and `special_tokens_map.json` say together; empty where there is neither.

    As in transformers, the map goes before a config that lists no `added_tokens_decoder`, and behind one that does.
    """
    files = [directory / "tokenizer_config.json", directory / "special_tokens_map.json"]
    config, names = (read_json(file) if file.is_file() else {} for file in files)
    return names | config if "added_tokens_decoder" in config else config | names


def read_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """The chat templates of a directory by name, as transformers finds them.

    `chat_template.jinja` (named default) and the files of `additional_chat_templates/` go before those of
    `tokenizer_config.json`, which holds a single template or a list of named ones.

    Raises:
        UserError: something else is there, or a file that is not UTF-8.
    """
    files = {file.stem: file for file in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (directory / TEMPLATE_FILE).is_file():
        files["default"] = directory / TEMPLATE_FILE
    if files:
        return {name: _text(file) for name, file in files.items()}
    found = config.get("chat_template")
    if found is None:
        return {}
    try:
        named = {one["name"]: one["template"] for one in found} if isinstance(found, list) else {"default": found}
    except (KeyError, TypeError):
        named = {"": None}
    if not all(isinstance(text, str) for one in named.items() for text in one):
        raise UserError(
            f"{directory / 'tokenizer_config.json'}: chat_template: expected a string, or a list of objects with name "
            f"and template, got {found!r:.80}"
        )
    return named


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: expected UTF-8 text ({error})") from error


def surroundings(path: Path, spec: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor of a `tokenizer.json` puts before and behind a text.

    Found by a tokenizer with that post-processor and the single word `a`, whose id no other can be mistaken for.
    """
    processor = spec.get("post_processor")
    if not processor:
        return (), ()
    word = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    try:
        alone = tokenizers.Tokenizer.from_str(
            json.dumps({"version": "1.0", "model": word, "post_processor": processor})
        )
        encoding = alone.encode("a")
        at = list(encoding.special_tokens_mask).index(0)
    except Exception as error:  # the library raises no narrower type
        raise UserError(f"{path}: post_processor: not one that the tokenizers library reads ({error})") from error
    return tuple(encoding.ids[:at]), tuple(encoding.ids[at + 1 :])


def marked_special(config: dict[str, Any]) -> set[str]:
    """Added tokens that `tokenizer_config.json` marks as special, in any of its spellings."""
    decoder = config.get("added_tokens_decoder") or {}
    extra = [config.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    tokens = [token for token in decoder.values() if token.get("special")]
    tokens += [token for group in extra for token in (group.values() if isinstance(group, dict) else group)]
    return {token_text(token) for token in tokens}


def token_text(token: Any) -> str:
    """A token written as a text, or as an object with its content."""
    return str((token.get("content") if isinstance(token, dict) else token) or "")


def template_text(template: str) -> str:
    """What a template may write of its own: its plain text and string literals, joined so that none run together."""
    try:
        return "\0".join(text for _, kind, text in jinja2.Environment().lex(template) if kind in ("data", "string"))
    except jinja2.TemplateSyntaxError:  # reported when the template is used
        return template


def in_template(token: str, written: str) -> bool:
    """Whether a template writes this token; a token of white space is ordinary text there."""
    return token in written and not token.isspace()
