"""Constrained answers: a model of random logits, kept to a form, against jsonschema and mistral-common."""

import json
import random
import re

import numpy as np
import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.serving.structured.grammar import TokenBytes, json_object, json_schema, regex, tool_calls
from nemoe_jax.serving.structured.validation import schema_violation
from nemoe_jax.text.chat.render import render_chat
from nemoe_jax.text.chat.tool_parser import parse_tool_calls
from nemoe_jax.text.tokenizers.load import Tokenizer, load_tokenizer

pytest.importorskip("mistral_common")
import jsonschema
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from tests.support.call_tokenizers import DATA, tekken_versions, with_tags, with_template
from tests.text.test_tokenizer_json import byte_level, metaspace, save, word_level

IDLE = 9  # rows of the model's embedding that the tokenizer has no token for
LISTED = "{% for m in messages %}[INST]{{ m.content }}[/INST][TOOL_CALLS]{% endfor %}"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """Tekken's chat formats on a small cut, a SentencePiece model, and `tokenizer.json` with and without templates."""
    directory = tmp_path_factory.mktemp("tokenizers")
    made = {"sentencepiece": load_tokenizer(DATA / "mistral_instruct_tokenizer_240323.model.v3")}
    made |= tekken_versions(directory, 1300) | with_tags(directory)
    made["byte level"] = with_template(directory / "byte level", byte_level(), None)
    made["metaspace"] = with_template(directory / "metaspace", metaspace(), None)
    made["listed"] = with_template(directory / "listed", byte_level(), LISTED, ("[TOOL_CALLS]",))
    return made


@pytest.fixture(scope="module")
def vocabularies(tokenizers) -> dict[str, TokenBytes]:
    return {name: TokenBytes(tokenizer, tokenizer.vocab_size + IDLE) for name, tokenizer in tokenizers.items()}


def allowed(vocabulary: TokenBytes, constraint) -> np.ndarray:
    """Which tokens may come next, as booleans."""
    words = constraint.allowed()
    assert words.dtype == np.uint32 and words.shape == (-(-vocabulary.vocab_size // 32),)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little").astype(bool)
    assert not bits[vocabulary.vocab_size :].any()
    return bits[: vocabulary.vocab_size]


class RandomModel:
    """Random logits, with a liking for tokens that come to an end."""

    def __init__(self, vocabulary: TokenBytes, seed: int):
        self.rng = np.random.default_rng(seed)
        tokenizer = vocabulary.tokenizer
        self.liking = np.zeros(vocabulary.vocab_size)
        ends = [tokenizer.encode(text)[-1] for text in ('a"', "a}", "a]", "a,")]
        self.liking[[*ends, *vocabulary.end_tokens]] = 6, 5, 6, 4, 3

    def __call__(self) -> np.ndarray:
        return self.liking + 2 * self.rng.normal(size=self.liking.size)


def drive(vocabulary: TokenBytes, constraint, seed: int, check=None, limit: int = 1500) -> list[int]:
    """An answer of a random model, to its end."""
    model, tokens = RandomModel(vocabulary, seed), []
    while not tokens or tokens[-1] not in vocabulary.end_tokens:
        assert len(tokens) < limit, vocabulary.tokenizer.decode(tokens)
        possible = allowed(vocabulary, constraint)
        if check:
            check(tokens, possible)
        tokens.append(int(np.where(possible, model(), -np.inf).argmax()))
        constraint.accept(tokens[-1])
    return tokens


def spell(vocabulary: TokenBytes, constraint, *parts: str | int) -> bool:
    """Whether a constraint lets these texts and control tokens pass."""
    for token in vocabulary.tokenizer.encode_parts(parts):
        if not allowed(vocabulary, constraint)[token]:
            return False
        constraint.accept(token)
    return True


def random_schema(rng: random.Random, depth: int = 3) -> dict:
    """A schema of what is in common use."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern"] + ["object", "array", "any"] * (
        depth > 0
    )
    kind = rng.choice(kinds) if depth < 3 else rng.choice(["object", "object", "array", "any"])
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 9)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{2}-[0-9]+$", "^(é|Ж)?x$"])}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randrange(-50, 0), "maximum": rng.randrange(99)}
    if kind == "enum":
        return {"enum": rng.sample(["a", "ab", 'q"\n', "Ж", 1, 1.5, None, True, {"x": [1]}, "</s>"], 3)}
    if kind == "array":
        least = rng.randrange(3)
        items = random_schema(rng, depth - 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(3)}
    if kind == "any":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    if kind == "object":
        names = rng.sample(["a", "b", "ab", "city é", 'q"', "_"], rng.randrange(1, 4))
        open_ended = rng.choice([False, {"type": "integer", "maximum": 9}])
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth - 1) for name in names},
            "required": rng.sample(names, rng.randrange(len(names) + 1)),
            "additionalProperties": open_ended,
        }
    return {"type": kind}


@pytest.mark.parametrize("kind", ["v3", "sentencepiece", "byte level", "metaspace"])
def test_answers_of_random_schemas_are_valid_and_end_when_complete(kind, vocabularies):
    vocabulary, rng = vocabularies[kind], random.Random(11)
    for seed in range(20 if kind == "sentencepiece" else 40):
        schema = random_schema(rng)
        validator = jsonschema.Draft202012Validator(schema)

        def check(tokens, possible, validator=validator):
            try:
                complete = validator.is_valid(json.loads(vocabulary.tokenizer.decode(tokens)))
            except ValueError:
                complete = False
            assert possible[list(vocabulary.end_tokens)].all() == complete

        tokens = drive(vocabulary, json_schema(vocabulary, schema), seed, check)
        validator.validate(json.loads(vocabulary.tokenizer.decode(tokens)))


def test_a_schema_may_refer_to_itself(vocabularies):
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}, "additionalProperties": False}
    schema = {"$ref": "#/$defs/tree", "$defs": {"tree": tree}}
    for seed in range(5):
        tokens = drive(vocabularies["v3"], json_schema(vocabularies["v3"], schema), seed)
        jsonschema.validate(json.loads(vocabularies["v3"].tokenizer.decode(tokens)), schema)


@pytest.mark.parametrize("kind", ["v3", "sentencepiece"])
def test_multiples_hold(kind, vocabularies):
    schema = {
        "type": "array",
        "items": {"type": "number", "multipleOf": 0.25, "minimum": 0},
        "minItems": 2,
        "maxItems": 9,
    }
    numbers = json.loads(
        vocabularies[kind].tokenizer.decode(drive(vocabularies[kind], json_schema(vocabularies[kind], schema), 3))
    )
    assert all(4 * number == int(4 * number) for number in numbers) and len(numbers) > 1


def test_a_schema_may_have_a_thousand_properties(vocabularies):
    schema = {"type": "object", "properties": {f"p{at}": {"type": "integer"} for at in range(1000)}}
    assert spell(vocabularies["v3"], json_schema(vocabularies["v3"], schema), '{"p7": 1, "p901": 2, "p999": 3}')


def test_letters_of_names_are_not_escaped(vocabularies):
    """So that a declared name cannot come again in another spelling."""
    vocabulary = vocabularies["v3"]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True}
    for text in ('{"a":1,"\\u0061":', '{"\\u0061":', '{"b":{"\\u0061":'):
        assert not spell(vocabulary, json_schema(vocabulary, schema), text), text
    assert spell(vocabulary, json_schema(vocabulary, schema), '{"a":1,"b\\n\\"é":"\\t😀"}')
    strange = {"const": "\x01\x7f"}  # what has no other spelling
    assert spell(vocabulary, json_schema(vocabulary, strange), json.dumps(strange["const"]))


def test_unknown_formats_are_annotations(vocabularies):
    vocabulary = vocabularies["v3"]
    schema = {
        "type": "object",
        "properties": {"format": {"type": "string", "format": "password"}, "day": {"type": "string", "format": "date"}},
        "required": ["format", "day"],
        "$defs": {"p": {"format": "file-path"}},
        "additionalProperties": False,
    }
    assert spell(vocabulary, json_schema(vocabulary, schema), '{"format":"x/y","day":"2026-01-02"}')
    assert not spell(vocabulary, json_schema(vocabulary, schema), '{"format":"x/y","day":"x')
    assert spell(vocabulary, json_schema(vocabulary, {"enum": [{"format": "z"}]}), '{"format":"z"}')


VIOLATIONS = [
    ({"uniqueItems": True}, "[1, 2, 1]", "non-unique elements"),
    ({"type": "object"}, '{"b": 1, "b": 2}', "the name 'b' comes twice"),
    ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, '{"a": 1}', "'b' is a required property"),
    ({"dependentRequired": {"a": ["b"]}}, '{"a": 1}', "'b' is a dependency of 'a'"),
    ({"items": {"oneOf": [{"type": "number"}, {"minimum": 3}]}}, "[1, 4]", r"\[1\]: 4 is valid under each of"),
    ({"type": "object"}, '{"a"', "not JSON"),
]


@pytest.mark.parametrize(("schema", "text", "message"), VIOLATIONS)
def test_what_no_grammar_can_express_is_found_in_the_end(schema, text, message):
    assert re.search(message, schema_violation(text, schema))
    if "twice" not in message and "JSON" not in message:
        assert not jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"pattern": "^(a+)+$"}, json.dumps("a" * 40 + "b")),  # the grammar's: Python would never end
        ({"patternProperties": {"^(a+)+$": False}, "additionalProperties": False}, json.dumps({"a" * 40 + "b": 1})),
        ({"$ref": "http://127.0.0.1:1/schema"}, "1"),  # which is not fetched
        ({"$ref": "#"}, "1"),
        ({"properties": {"a": {"type": "integer"}}, "uniqueItems": True}, '{"a": 1, "b": [1, 2]}'),
        (None, "{}"),
    ],
)
def test_what_fits_or_is_the_grammar_s_alone_is_no_violation(schema, text):
    assert schema_violation(text, schema) is None


@pytest.mark.parametrize("kind", ["v3", "sentencepiece"])
def test_a_json_object_is_an_object(kind, vocabularies):
    for seed in range(5):
        tokens = drive(vocabularies[kind], json_object(vocabularies[kind]), seed)
        assert isinstance(json.loads(vocabularies[kind].tokenizer.decode(tokens)), dict)


def test_a_regular_expression_holds(vocabularies):
    vocabulary = vocabularies["v3"]
    for seed in range(5):
        text = vocabulary.tokenizer.decode(drive(vocabulary, regex(vocabulary, "(yes|no), [a-z]{3,5}!"), seed))
        assert re.fullmatch("(yes|no), [a-z]{3,5}!", text)


def test_several_end_tokens_are_allowed_alike(tokenizers):
    vocabulary = TokenBytes(tokenizers["v3"], tokenizers["v3"].vocab_size, end_tokens=[4, 5])
    constraint = json_schema(vocabulary, {"const": "x"})
    assert not allowed(vocabulary, constraint)[[2, 4, 5]].any() and spell(vocabulary, constraint, '"x"')
    assert np.flatnonzero(allowed(vocabulary, constraint)).tolist() == [2, 4, 5]


def test_a_model_with_fewer_rows_than_its_tokenizer_is_never_led_beyond_them(tokenizers):
    vocabulary = TokenBytes(tokenizers["v3"], 301)
    tokens = drive(vocabulary, json_schema(vocabulary, {"type": "object", "maxProperties": 1}), 1)
    assert max(tokens) < 301 and json.loads(tokenizers["v3"].decode(tokens)) is not None


@pytest.mark.parametrize(
    "text, possible",
    [
        ('{"a": 1}', True),
        ('{"a":1,"b" : [ 1 ]}', True),
        (json.dumps({"a": [{}, {"b": [1, None]}]}, indent=4), True),
        ("{\n" + " " * 40 + '"', True),
        ("{\n" + " " * 41, False),
        ("{\n\n", False),
        ("{  ", False),
        ("{}\n", False),
    ],
)
def test_white_space_is_bounded(text, possible, vocabularies):
    assert spell(vocabularies["v3"], json_object(vocabularies["v3"]), text) == possible


BAD_SCHEMAS = [
    (3, "schema: expected a JSON schema"),
    ({"type": "text"}, "schema: Invalid type: text"),
    ({"not": {}}, "schema: Unimplemented keys"),
    ({"$ref": "http://x.org/schema"}, "schema: .*not present"),
    ({"type": "string", "pattern": "("}, "schema: regex parse error: .* unclosed group$"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "schema: Unsatisfiable schema"),
    ({"minimum": float("nan")}, "schema: not JSON"),
    ({"enum": [object()]}, "schema: not JSON"),
    (False, "schema: "),
    ({"$ref": "#"}, "schema: no text of the model's tokens can fulfill it"),
    ({"multipleOf": 99999989}, r"schema: multipleOf: expected at most 10000 .* got 1\.00000e\+8"),
    ({"allOf": [{"multipleOf": 997}, {"multipleOf": 0.11}]}, r"schema: multipleOf: .* got 1\.09670e\+6"),
    ({"items": {"patternProperties": {f"a{at}": {} for at in range(65)}}}, "schema: patternProperties: .* got 65"),
]


@pytest.mark.parametrize("schema, message", BAD_SCHEMAS)
def test_a_bad_schema_is_one_clear_line(schema, message, vocabularies):
    with pytest.raises(UserError, match=message) as caught:
        json_schema(vocabularies["v3"], schema)
    assert "\n" not in str(caught.value)


def test_a_client_cannot_change_how_json_is_written(vocabularies):
    schema = {"x-guidance": {"item_separator": ";", "lenient": True}, "type": "array", "items": {"const": 1}}
    assert spell(vocabularies["v3"], json_schema(vocabularies["v3"], schema), "[1,1]")
    assert not spell(vocabularies["v3"], json_schema(vocabularies["v3"], schema), "[1;")


def test_what_cannot_be_constrained_is_one_clear_line(vocabularies, tokenizers, tmp_path):
    with pytest.raises(UserError, match=r"regular expression: .* unclosed group$"):
        regex(vocabularies["v3"], "(")
    constraint = json_object(vocabularies["v3"])
    with pytest.raises(UserError, match="schema: Parser Error: token"):
        constraint.accept(7)
    words = load_tokenizer(save(word_level(), tmp_path))
    assert TokenBytes(words, 9).token_bytes(words.encode("fox")[0]) == b"fox"
    with pytest.raises(UserError, match=r"tokenizer\.json: its tokens do not spell a text byte by byte"):
        json_object(TokenBytes(words, words.vocab_size))
    with pytest.raises(UserError, match="schema: no text of the model's tokens can fulfill it"):
        json_object(TokenBytes(tokenizers["v3"], 25))


@pytest.mark.parametrize("kind", ["v3", "sentencepiece", "byte level", "metaspace"])
def test_the_bytes_of_tokens_join_to_the_text(kind, vocabularies):
    vocabulary = vocabularies[kind]
    text = '{"é": "Ж 中 😀\n\t"}'
    joined = b"".join(map(vocabulary.token_bytes, vocabulary.tokenizer.encode(text, bos=True, eos=True)))
    assert joined.decode().removeprefix(" ") == text
    assert vocabulary.token_bytes(vocabulary.vocab_size - 1) == b""


WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["city"],
        "$defs": {"name": {"type": "string", "maxLength": 8}},
    },
}
AT = {"name": "at-weather", "parameters": {"type": "object", "properties": {"at": {"enum": ["now", "é"]}}}}
PLAIN = {"name": "weather_2"}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, AT, PLAIN)]
SCHEMAS = {function["name"]: function.get("parameters", {"maxProperties": 0}) for function in (WEATHER, AT, PLAIN)}
FORMS = ["v3", "v7", "v11", "v13", "sentencepiece", "listed", "tags", "control tags", "spaced tags"]
CONTROL = [form for form in FORMS if form not in ("tags", "spaced tags")]  # which begin calls with a control token


def begin(tokenizer: Tokenizer) -> int:
    """The control token that calls begin with."""
    return next(tokenizer.control[name] for name in ("[TOOL_CALLS]", "<tool_call>") if name in tokenizer.control)


@pytest.mark.parametrize("form", FORMS)
def test_required_calls_are_calls_of_the_tools(form, vocabularies):
    vocabulary, seen = vocabularies[form], set()
    for seed in range(8):
        tokens = drive(vocabulary, tool_calls(vocabulary, vocabulary.tokenizer, TOOLS, "required"), seed)
        answer = parse_tool_calls(vocabulary.tokenizer, tokens, TOOLS)
        assert answer.calls and not answer.warnings and not answer.text
        for call in answer.calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        seen |= {len(answer.calls), *(call.name for call in answer.calls)}
    assert {1, "weather", "at-weather"} < seen  # and more calls than one


@pytest.mark.parametrize("form", ["v3", "v7", "v11", "v13", "sentencepiece"])
def test_called_answers_are_taken_by_mistral_common(form, vocabularies):
    vocabulary = vocabularies[form]
    tokenizer = vocabulary.tokenizer
    theirs = MistralTokenizer.from_file(tokenizer.path, mode=ValidationMode.test)
    for seed in range(4):
        tokens = drive(vocabulary, tool_calls(vocabulary, tokenizer, TOOLS, "required"), seed)
        answer = parse_tool_calls(tokenizer, tokens, TOOLS).as_message()
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "ok"} for call in answer["tool_calls"]]
        chat = [{"role": "user", "content": "How is it?"}, answer, *results]
        request = ChatCompletionRequest(messages=chat)
        assert render_chat(tokenizer, chat) == theirs.encode_chat_completion(request).tokens


@pytest.mark.parametrize("form", ["v3", "v7", "v11", "v13", "sentencepiece"])
def test_calls_as_the_chat_format_writes_them_are_allowed(form, vocabularies):
    vocabulary = vocabularies[form]
    question = [{"role": "user", "content": "How is it?"}]
    calls = [("weather", {"city": "Graz é", "days": 3}), ("at-weather", {"at": "now"}), ("weather_2", {})]
    for some in (calls[:1], calls):
        for identity in ({"id": "abcDEF12"}, {}):
            made = [
                {
                    **{key: f"{text}{at}" for key, text in identity.items()},
                    "function": {"name": name, "arguments": given},
                }
                for at, (name, given) in enumerate(some)
            ]
            chat = [*question, {"role": "assistant", "tool_calls": made}]
            written = render_chat(vocabulary.tokenizer, chat)[len(render_chat(vocabulary.tokenizer, question)) :]
            assert written[-1] == vocabulary.tokenizer.eos_id
            for choice in ("auto", "required"):
                constraint = tool_calls(vocabulary, vocabulary.tokenizer, TOOLS, choice)
                for token in written:
                    assert allowed(vocabulary, constraint)[token]
                    constraint.accept(token)


@pytest.mark.parametrize("form", FORMS)
def test_a_named_function_is_called_once(form, vocabularies):
    vocabulary = vocabularies[form]
    for seed in range(4):
        tokens = drive(vocabulary, tool_calls(vocabulary, vocabulary.tokenizer, TOOLS, TOOLS[1]), seed)
        (call,) = parse_tool_calls(vocabulary.tokenizer, tokens, TOOLS).calls
        assert call.name == "at-weather"


@pytest.mark.parametrize("form", FORMS)
def test_calls_that_are_not_parallel_are_one(form, vocabularies):
    vocabulary = vocabularies[form]
    for seed in range(6):
        constraint = tool_calls(vocabulary, vocabulary.tokenizer, TOOLS, "required", parallel=False)
        assert len(parse_tool_calls(vocabulary.tokenizer, drive(vocabulary, constraint, seed), TOOLS).calls) == 1


@pytest.mark.parametrize("form", ["v3", "v13", "tags"])
def test_calls_come_to_an_end(form, vocabularies):
    vocabulary, call = vocabularies[form], '{"name": "f", "arguments": {}}'
    start, arguments = (vocabulary.tokenizer.control.get(name) for name in ("[TOOL_CALLS]", "[ARGS]"))
    parts, more = {
        "v3": ([start, "[" + ", ".join([call] * 32)], ", "),
        "v13": ([start, "f", arguments, "{}"] * 32, start),
        "tags": ([f"<tool_call>{call}</tool_call>" * 32], "<"),
    }[form]
    constraint = tool_calls(vocabulary, vocabulary.tokenizer, function(None), "required")
    assert spell(vocabulary, constraint, *parts) and not spell(vocabulary, constraint, more)


@pytest.mark.parametrize("form", CONTROL)
def test_auto_is_free_until_a_call_begins(form, vocabularies):
    vocabulary = vocabularies[form]
    start = begin(vocabulary.tokenizer)
    constraint = tool_calls(vocabulary, vocabulary.tokenizer, TOOLS, "auto")
    assert allowed(vocabulary, constraint).all()
    constraint.accept(start)
    tokens = [start, *drive(vocabulary, constraint, 5)]
    answer = parse_tool_calls(vocabulary.tokenizer, tokens, TOOLS)
    assert answer.calls and not answer.warnings and not answer.text

    constraint = tool_calls(vocabulary, vocabulary.tokenizer, TOOLS)
    for token in vocabulary.tokenizer.encode("Let me see"):
        constraint.accept(token)
    free = allowed(vocabulary, constraint)
    assert np.delete(free, start).all()
    assert free[start] == (form not in ("v3", "sentencepiece"))  # which have no answers of both text and calls


@pytest.mark.parametrize("form", ["tags", "spaced tags"])
def test_auto_holds_from_a_tag_on_that_is_text(form, vocabularies):
    vocabulary = vocabularies[form]
    control = vocabulary.tokenizer.control
    calls = '<tool_call>{"name": "weather_2", "arguments": {}}</tool_call>'
    for before in ("", "Let <me ", "é<tool_call"):
        constraint = tool_calls(vocabulary, vocabulary.tokenizer, TOOLS)
        assert spell(vocabulary, constraint, before, control["[INST]"], " see " + calls)
        assert allowed(vocabulary, constraint)[list(vocabulary.end_tokens)].all()
    assert not spell(vocabulary, tool_calls(vocabulary, vocabulary.tokenizer, TOOLS), "So: <tool_call>\n[")
    free = allowed(vocabulary, tool_calls(vocabulary, vocabulary.tokenizer, TOOLS))
    assert free[list(control.values())].all() and free.mean() > 0.6  # bytes that begin no character are missing


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_that_calls_nothing_may_have_a_schema(form, vocabularies):
    vocabulary, schema = (
        vocabularies[form],
        {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
    )
    schema["additionalProperties"] = False
    for tools, choice in ((TOOLS, "auto"), (TOOLS, "none"), (None, None)):
        constraint = tool_calls(vocabulary, vocabulary.tokenizer, tools, choice, schema=schema)
        assert not spell(vocabulary, constraint, "So")
        constraint = tool_calls(vocabulary, vocabulary.tokenizer, tools, choice, schema=schema)
        assert (
            spell(vocabulary, constraint, '{"a": null}') and allowed(vocabulary, constraint)[vocabulary.end_tokens[0]]
        )
    begun = set()
    for seed in range(20):
        constraint = tool_calls(vocabulary, vocabulary.tokenizer, TOOLS, "auto", schema=schema)
        answer = parse_tool_calls(vocabulary.tokenizer, drive(vocabulary, constraint, seed), TOOLS)
        assert not answer.warnings and (answer.calls or json.loads(answer.text) == {"a": None})
        begun.add(bool(answer.calls))
    assert begun == {True, False}
    with pytest.raises(UserError, match="schema: expected a JSON schema"):
        tool_calls(vocabulary, vocabulary.tokenizer, TOOLS, "auto", schema=3)
    with pytest.raises(UserError, match="schema: Invalid type: text"):
        tool_calls(vocabulary, vocabulary.tokenizer, TOOLS, "auto", schema={"type": "text"})


@pytest.mark.parametrize("form", CONTROL)
def test_none_forbids_the_token_that_begins_a_call(form, vocabularies):
    vocabulary = vocabularies[form]
    constraint = tool_calls(vocabulary, vocabulary.tokenizer, TOOLS, "none")
    for token in vocabulary.tokenizer.encode("Let me"):
        assert np.flatnonzero(~allowed(vocabulary, constraint)).tolist() == [begin(vocabulary.tokenizer)]
        constraint.accept(token)


def test_without_tools_nothing_is_constrained(vocabularies):
    vocabulary = vocabularies["v3"]
    assert (
        tool_calls(vocabulary, vocabulary.tokenizer, None) is tool_calls(vocabulary, vocabulary.tokenizer, []) is None
    )
    assert tool_calls(vocabularies["tags"], vocabularies["tags"].tokenizer, TOOLS, "none") is None


def function(parameters: dict | None, **more: object) -> list[dict]:
    return [TOOLS[0], {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}]


def test_functions_take_what_they_name_and_no_more_unless_they_say_so(vocabularies):
    vocabulary = vocabularies["v13"]
    named = {"properties": {"a": {"type": "null"}}}
    for parameters, others in (
        (named, False),
        (None, False),
        ({}, True),
        ({**named, "additionalProperties": {"type": "null"}}, True),
    ):
        constraint = tool_calls(vocabulary, vocabulary.tokenizer, function(parameters), "required")
        call = (begin(vocabulary.tokenizer), "f", vocabulary.tokenizer.control_id("[ARGS]"), '{"other": null}')
        assert spell(vocabulary, constraint, *call) == others


def test_keywords_that_cannot_be_enforced_matter_to_strict_functions_only(vocabularies):
    vocabulary = vocabularies["v3"]
    parameters = {"properties": {"a": {"type": "string", "format": "color"}}, "not": {"required": ["b"]}}
    assert tool_calls(vocabulary, vocabulary.tokenizer, function(parameters))
    with pytest.raises(UserError, match=r'tools\[1\]\.function\.parameters: Unimplemented keys: \["not"\]'):
        tool_calls(vocabulary, vocabulary.tokenizer, function(parameters, strict=True))


@pytest.mark.parametrize(
    "kind, tools, choice, message",
    [
        (
            "v3",
            function({"properties": {"a": {"type": "text"}}}),
            "auto",
            r"tools\[1\]\.function\.parameters: Invalid type",
        ),
        ("v3", function({"minProperties": float("inf")}), "auto", r"tools\[1\]\.function\.parameters: not JSON"),
        ("v3", [{"function": {}}], "auto", r"tools\[0\]\.function\.name"),
        ("v3", TOOLS, "always", "tool_choice: expected none, auto"),
        ("byte level", TOOLS, "auto", r"no control token \[TOOL_CALLS\]"),
        ("plain template", TOOLS, "none", "its chat template writes calls of tools in no known form"),
    ],
)
def test_tools_that_cannot_be_called_are_one_clear_line(kind, tools, choice, message, vocabularies, tmp_path):
    if kind == "plain template":
        config = {"chat_template": "<tool_call><function={{ messages[0].content }}>"}
        tokenizer = load_tokenizer(save(byte_level(), tmp_path, tokenizer_config=config))
        vocabulary = TokenBytes(tokenizer, tokenizer.vocab_size)
    else:
        vocabulary = vocabularies[kind]
    with pytest.raises(UserError, match=message):
        tool_calls(vocabulary, vocabulary.tokenizer, tools, choice)
