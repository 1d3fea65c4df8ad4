"""What llama.cpp's names of pre-tokenizers mean, as tokenizer.json says it.

A GGUF file has the vocabulary and the merges of a byte-level BPE; the regular expressions that cut a string into words
are in llama.cpp, under a name. Each rule here is a pattern that splits what the rules before it left whole.
"""

from typing import Any, NamedTuple

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = _LLAMA3.replace("DIGITS", "{1,3}")
QWEN2 = _LLAMA3.replace("DIGITS", "")


class PreTokenizer(NamedTuple):
    """A pre-tokenizer by llama.cpp's name, and what else goes by that name."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is that token, whatever the merges say
    adds_bos: bool = False  # where the file does not say


_SMOLLM = PreTokenizer((DIGIT, GPT2))
PRE_TOKENIZERS = {
    "tekken": PreTokenizer((TEKKEN,), True, True),
    "llama-bpe": PreTokenizer((LLAMA3,), True, True),
    "qwen2": PreTokenizer((QWEN2,)),
    "smollm": _SMOLLM,
    "gpt-2": PreTokenizer((GPT2,)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
_OTHER_NAMES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "gpt2": "gpt-2",
}


def pre_tokenizer(name: str) -> PreTokenizer | None:
    """The pre-tokenizer of that name; None where it is not known."""
    return PRE_TOKENIZERS.get(_OTHER_NAMES.get(name, name))


def to_json(patterns: tuple[str, ...]) -> dict[str, Any]:
    """`pre_tokenizer` of a tokenizer.json that splits by these patterns, one after another."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if patterns == (GPT2,):
        return {**byte_level, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    if patterns == _SMOLLM.patterns:
        return {"type": "Sequence", "pretokenizers": [digits, {**byte_level, "use_regex": True}]}
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}
