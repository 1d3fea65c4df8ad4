#!/usr/bin/env bash
# llguidance 1.9.1
#
# Numbers in a JSON schema go through float64. A whole number above 2^53 that float64 lacks is replaced by its neighbour:
# `const` and `enum` then allow only a wrong value, bounds are off by one, and an upper bound of 2^64 - 1 is cut to
# less than 2^63.
#
# Seen: {"const": 9007199254740993} accepts 9007199254740992 and not 9007199254740993; {"minimum": 9007199254740993}
# accepts 9007199254740992; {"minimum": 0, "maximum": 18446744073709551615} refuses 10000000000000000000.
#
# Why it matters: ids and counters of 64 bits are common arguments of tools. The model is forced to write a wrong one.
# Such values belong in strings.
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


odd = 2**53 + 1
cases = [
    ({"const": odd}, odd, False),
    ({"const": odd}, odd - 1, True),
    ({"enum": [odd]}, odd - 1, True),
    ({"type": "integer", "minimum": odd}, odd - 1, True),
    ({"type": "integer", "maximum": odd}, odd, False),
    ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, 10**18, True),
    ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, 10**19, False),
]
for schema, value, expected in cases:
    found = accepts(schema, str(value))
    print(f"{json.dumps(schema)}: {value} {'accepted' if found else 'refused'}")
    assert found == expected, "large whole numbers are read otherwise now"
PY
"$work/venv/bin/python" "$work/look.py"
