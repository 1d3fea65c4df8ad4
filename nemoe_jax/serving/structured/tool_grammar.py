"""The forms of calls as grammars in llguidance's syntax, which is Lark's with JSON schemas and control tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.serving.structured.schema_limits import check_schema_cost
from nemoe_jax.text.chat.tool_formats import ToolCallFormat

# JSON as Python's json.dumps writes it, which is how chat formats write calls
AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_OPEN = {"additionalProperties", "unevaluatedProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}
MOST_CALLS = 32  # in one answer; a model of little skill may call for ever
_CONTROL = re.compile(r"\\u00(0|1|7f)")  # what a schema can ask for with such an escape alone
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}  # of names to schemas
_VALUES = {"const", "enum", "default", "examples"}
_CALL_ID = "/[a-zA-Z0-9]{9}/"


def json_rule(schema: Mapping[str, Any] | bool, options: Mapping[str, Any]) -> str:
    """JSON by a schema, as part of a rule. Raises UserError where the schema is no JSON itself, or costs too much."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    check_schema_cost(schema)
    own = {key: value for key, value in schema.items() if key != "x-guidance"}  # options are not the client's to set
    own = without_unknown_formats(own)
    try:
        # without \u no letter can be escaped, so that no declared name comes again in another spelling
        escapes = 'nrbtf\\"' + "u" * bool(_CONTROL.search(json.dumps(own, allow_nan=False)))
        return "%json " + json.dumps({"x-guidance": {**options, "json_allowed_escapes": escapes}, **own})
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"not JSON ({error})") from error


def without_unknown_formats(schema: Any) -> Any:
    """A schema whose `format`s are those that can be enforced; others are annotations, as JSON Schema has it."""
    if isinstance(schema, list):
        return [without_unknown_formats(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: {name: without_unknown_formats(one) for name, one in value.items()}
        if key in _MAPS and isinstance(value, Mapping)
        else value
        if key in _VALUES
        else without_unknown_formats(value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str) or value in _FORMATS
    }


def call_rules(
    form: ToolCallFormat, functions: Sequence[tuple[int, Mapping[str, Any]]], several: bool, lead: bool
) -> str:
    """The rule `calls` and those that it needs, for functions with their places among the tools.

    lead: whether the tokenizer writes a space in front of a text.
    Raises UserError on parameters that are no schema.
    """
    space = '" "? ' if lead else ""
    rules = [f"arguments_{at}: {arguments_rule(at, function)}" for at, function in functions]
    if form.kind == "marked":
        ids = f"(<[{form.call_id}]> {_CALL_ID})? " if form.call_id is not None else ""
        rules.append(f"calls: call{{1,{MOST_CALLS if several else 1}}}")
        calls = [
            f'<[{form.start}]> "{function["name"]}" {ids}<[{form.arguments}]> arguments_{at}'
            for at, function in functions
        ]
        return "\n".join([*rules, "call: " + " | ".join(calls)])
    calls = [
        json.dumps(f'{{"name": "{function["name"]}", "arguments": ') + f" arguments_{at}" for at, function in functions
    ]
    named = "named: " + " | ".join(calls)
    if form.kind == "list":
        more = f'(", " call){{0,{MOST_CALLS - 1}}} ' if several else ""
        identity = rf'", \"id\": \"" {_CALL_ID} "\""'
        rules += [f'calls: {mark(form.start)} {space}"[" call {more}"]"', f'call: named ({identity})? "}}"']
    else:
        more = rf"(/\n?/ {mark(form.start)} call){{0,{MOST_CALLS - 1}}}" if several else ""
        before = space if isinstance(form.start, str) else ""
        rules += [f"calls: {before}{mark(form.start)} rest", f"rest: call {more}"]
        rules.append(rf'call: {space}/\n?/ named "}}" /\n?/ {mark(form.end)}')
    return "\n".join([*rules, named])


def after_text(form: ToolCallFormat, control: Sequence[int]) -> str:
    """The rule `start` for tags that are text: anything, these control tokens too, until a tag begins the calls."""
    passing = f"passing: TEXT <[{','.join(map(str, control))}]>\n" if control else ""
    return (
        f"start: {'passing* ' if control else ''}(TEXT | opened rest)\n{passing}"
        f"opened[lazy]: TEXT {mark(form.start)}\nTEXT: /(?s:.*)/\n"
    )


def mark(token: int | str) -> str:
    """A control token or a tag, in a rule."""
    return f"<[{token}]>" if isinstance(token, int) else json.dumps(token)


def arguments_rule(at: int, function: Mapping[str, Any]) -> str:
    """The arguments of a call, as part of a rule.

    Keywords that llguidance lacks are ignored unless the function is `strict`. Parameters that list properties and say
    nothing of others have no others: functions seldom take what they do not name.
    """
    parameters = function.get("parameters")
    schema = {"properties": {}} if parameters is None else dict(parameters)
    if "properties" in schema and not _OPEN & schema.keys():
        schema["additionalProperties"] = False
    try:
        return json_rule({"type": "object", **schema}, {**AS_DUMPED, "lenient": not function.get("strict")})
    except UserError as error:
        raise UserError(f"tools[{at}].function.parameters: {error}") from error


def check_arguments(at: int, function: Mapping[str, Any]) -> None:
    """Raises UserError where it is the parameters of this function that have no grammar."""
    import llguidance

    grammar = f"start: {arguments_rule(at, function)}"
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise UserError(f"tools[{at}].function.parameters: {one_line(messages[0])}")


def one_line(message: str) -> str:
    """llguidance's message without the lines that show where in the grammar it was."""
    message = re.split(r"\n +\d+ \| |\s*<non-verbose", message)[0]
    message = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", message)
    return " ".join(message.split())[:500]
