#!/usr/bin/env bash
# llguidance 1.9.1
#
# With {"x-guidance": {"lenient": true}} keywords that llguidance lacks are no error. They are then not enforced, and the
# matcher says so only where it is asked (`get_grammar_warnings`). Some that seem basic are among them. Without `lenient`
# annotations it does not enforce either (contentEncoding) and keywords that do not exist pass without any word.
#
# Seen, lenient: uniqueItems, contains, propertyNames, not, if/then, dependentRequired, unevaluatedProperties, unknown
# formats and oneOf (taken as anyOf) let an invalid instance through; minProperties, patternProperties and format "date"
# are enforced. Strict: all of the former are errors; {"contentEncoding": "base64"} accepts "%", with no warning.
#
# Why it matters: a schema made by a tool often has one of these. Lenient answers need validating; strict ones refuse
# the request.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet llguidance==1.9.1
cat > "$work/look.py" <<'PY'
import json

from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def attempt(schema, text, lenient):
    """(whether the text is accepted, the warnings), or an error."""
    if lenient:
        schema = schema | {"x-guidance": {"lenient": True}}
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    if matcher.is_error():
        return "error"
    tokens = tokenizer.tokenize_str(text)
    accepted = matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
    return accepted, len(matcher.get_grammar_warnings())


AB = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
ignored = [
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 1]"),
    ({"type": "array", "contains": {"type": "integer"}}, '["x"]'),
    ({"type": "object", "propertyNames": {"pattern": "^x"}}, '{"a": 1}'),
    ({"not": {"type": "integer"}}, "1"),
    (AB | {"if": {"required": ["a"]}, "then": {"required": ["b"]}}, '{"a": 1}'),
    (AB | {"dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
    (AB | {"unevaluatedProperties": False}, '{"a": 1, "c": 2}'),
    ({"type": "string", "format": "regex"}, '"("'),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1"),
]
for schema, text in ignored:
    strict, lenient = attempt(schema, text, False), attempt(schema, text, True)
    print(f"{json.dumps(schema)} with {text}: strict {strict}, lenient {lenient}")
    assert strict == "error" and lenient[0], "this is enforced now"
enforced = [
    ({"type": "object", "minProperties": 2}, '{"a": 1}'),
    ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, '{"x": "s"}'),
    ({"type": "string", "format": "date"}, '"x"'),
]
for schema, text in enforced:
    found = attempt(schema, text, True)
    print(f"{json.dumps(schema)} with {text}: lenient {found}")
    assert found == (False, 0), "this is not enforced any more"
assert attempt({"type": "string", "contentEncoding": "base64"}, '"%"', False) == (True, 0), "contentEncoding is known now"
PY
"$work/venv/bin/python" "$work/look.py"
