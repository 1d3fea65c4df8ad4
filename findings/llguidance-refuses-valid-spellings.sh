#!/usr/bin/env bash
# llguidance 1.9.1
#
# Values that a schema allows are refused in some of their spellings, and which ones depends on other keywords. A number
# loses its exponent as soon as it has a bound, a multipleOf or a const; a whole number is never 1.0 or 1e2; a string
# may not have \uXXXX or \/. Declared properties must come in the order of the schema.
#
# Seen: {"type": "number"} accepts 1e-7, with "minimum": 0 only 0.0000001; json.dumps writes 1e-07 for the constant
# 1e-07, which {"const": 1e-07} refuses; {"type": "string"} refuses "\u00e4"; {"b": 1, "a": 2} is refused for
# properties a, b.
#
# Why it matters: what json.dumps writes (escapes for all but ASCII by default, exponents for small numbers) cannot
# always be replayed through a grammar of its own schema, as a forced prefix or a few-shot answer; and a model whose
# habit is another order or spelling is led away from its likeliest tokens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet llguidance==1.9.1
cat > "$work/look.py" <<'PY'
import json

from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def accepts(schema, text):
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


PAIR = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
cases = [
    ({"type": "number"}, "1e-7", True),
    ({"type": "number", "minimum": 0}, "1e-7", False),
    ({"type": "number", "minimum": 0}, "0.0000001", True),
    ({"const": 1e-07}, json.dumps(1e-07), False),
    ({"type": "number", "multipleOf": 0.5}, "1.5", True),
    ({"type": "number", "multipleOf": 0.5}, "1.50", False),
    ({"type": "integer"}, "1.0", False),
    ({"type": "string"}, '"ä"', True),
    ({"type": "string"}, json.dumps("ä"), False),
    ({"type": "string"}, r'"\/"', False),
    (PAIR, '{"a": 2, "b": 1}', True),
    (PAIR, '{"b": 1, "a": 2}', False),
]
for schema, text, expected in cases:
    found = accepts(schema, text)
    print(f"{json.dumps(schema)}: {text} {'accepted' if found else 'refused'}")
    assert found == expected, "other spellings are accepted now"
PY
"$work/venv/bin/python" "$work/look.py"
