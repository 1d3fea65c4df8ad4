#!/usr/bin/env bash
# llguidance 1.9.1
#
# In an object that allows further properties a declared name cannot come twice as it stands, but it can come again with
# a letter as \uXXXX, and then for a value of any type. Undeclared names can repeat, and count each time. JSON's readers
# take both spellings for one name and keep the last value.
#
# Seen ({"properties": {"a": {"type": "integer"}}, "required": ["a"]}): {"a": 1, "a": "x"} is refused and
# {"a": 1, "\u0061": "x"} accepted, which json.loads reads as {"a": "x"}; minProperties 2 is met by {"b": 1, "b": 2}.
# With additionalProperties false the escaped name is refused.
#
# Why it matters: an answer that the grammar allowed may not be valid by its schema once it is parsed. Answers still have
# to be validated, or schemas closed.
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


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
cases = [
    (SCHEMA, r'{"a": 1, "a": "x"}', False),
    (SCHEMA, r'{"a": 1, "\u0061": "x"}', True),
    (SCHEMA | {"additionalProperties": False}, r'{"a": 1, "\u0061": "x"}', False),
    ({"type": "object", "minProperties": 2}, r'{"b": 1, "b": 2}', True),
]
for schema, text, expected in cases:
    found = accepts(schema, text)
    print(f"{json.dumps(schema)}: {text} {'accepted' if found else 'refused'}, parsed {json.loads(text)}")
    assert found == expected, "names are compared otherwise now"
PY
"$work/venv/bin/python" "$work/look.py"
