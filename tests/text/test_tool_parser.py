"""Answers read back: known answers of each form, damaged ones, and any tokens at all, whole and piece by piece."""

import json
import re

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("mistral_common")
from hypothesis import given, settings
from hypothesis import strategies as st

from nemoe_jax.text.chat.tool_parser import ParsedAnswer, ToolCallStreamParser, parse_tool_calls
from nemoe_jax.text.tokenizers.load import StreamDecoder, Tokenizer, load_tokenizer
from tests.support.call_tokenizers import DATA, tekken_versions, with_tags

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "sum-2")]
FORMS = ["v1", "v3", "v7", "v11", "v13", "tags", "control tags", "spaced tags"]
ANY = settings(max_examples=150, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("tokenizers")
    made = {"v1": load_tokenizer(DATA / "tokenizer.model.v1")}
    return made | tekken_versions(directory, 600) | with_tags(directory)


def write(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which control tokens are spelled out."""
    names = "|".join(map(re.escape, tokenizer.control))
    parts = [tokenizer.control.get(part, part) for part in re.split(f"({names})", text)]
    return tokenizer.encode_parts(part for part in parts if part != "")


def pieces(tokenizer: Tokenizer, tokens: list[int], sizes: list[int] | None = None) -> list[tuple[str, list[int]]]:
    """An answer as the engine gives it, so many tokens a piece; the last piece alone has what was held back."""
    decoder, made, at = StreamDecoder(tokenizer), [], 0
    for size in [*(sizes or []), *[1] * len(tokens)]:
        some, at = tokens[at : at + size], at + size
        text = "".join(decoder.push(token) for token in some)
        made.append((text, some))
    return [*made, (decoder.flush(), [])]


def streamed(tokenizer: Tokenizer, made: list[tuple[str, list[int]]], tools=TOOLS) -> tuple[str, ParsedAnswer]:
    """The text that could be sent at once, and the rest."""
    stream = ToolCallStreamParser(tokenizer, tools)
    return "".join(stream.push(*one) for one in made), stream.finish()


def plain(answer: ParsedAnswer) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


W, S = ("weather", {"city": "Graz é"}), ("sum-2", {})
LIST = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Graz é"}}'
MARKED = '[TOOL_CALLS]weather[ARGS]{"city": "Graz é"}'
TAG = '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz é"}}\n</tool_call>'
GOOD = [
    ("v3", "Hello", "Hello", []),
    ("v3", "", "", []),
    ("v3", LIST + "]</s>", "", [W]),
    ("v3", LIST + ', {"name": "sum-2", "arguments": "{}", "id": "a1B2c3D4e"}]', "", [W, S]),
    ("v3", '[TOOL_CALLS] {"arguments": {}, "name": "sum-2"} ', "", [S]),
    ("v7", "Let me. " + LIST + "]", "Let me. ", [W]),
    ("v7", LIST + "]" + LIST + "]", "", [W, W]),
    ("v11", "So: " + MARKED + "[TOOL_CALLS]sum-2[CALL_ID]a1B2c3D4e[ARGS]{}</s>", "So: ", [W, S]),
    ("v13", MARKED + "[TOOL_CALLS]sum-2[ARGS]{}", "", [W, S]),
    ("tags", "Let me.\n" + TAG + "\n" + TAG.replace("\n", "") + "</s>", "Let me.\n", [W, W]),
    ("control tags", "Let me.\n" + TAG + "\n" + TAG, "Let me.\n", [W, W]),
    ("spaced tags", "Let me. " + TAG, "Let me. ", [W]),
]


@pytest.mark.parametrize("form, written, text, calls", GOOD)
def test_good_answers(form, written, text, calls, tokenizers):
    tokenizer = tokenizers[form]
    tokens = write(tokenizer, written)
    answer = parse_tool_calls(tokenizer, tokens, TOOLS)
    assert (answer.text, plain(answer), answer.warnings) == (text, calls, ())
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call.id) for call in answer.calls)
    assert ("a1B2c3D4e" in written) == ("a1B2c3D4e" in [call.id for call in answer.calls])
    for sizes in ([], [5, 1, 9], [len(tokens)]):
        sent, rest = streamed(tokenizer, pieces(tokenizer, tokens, sizes))
        assert (sent + rest.text, plain(rest), rest.warnings) == (text, calls, ())
        assert sent == text  # none of it had to wait for the calls


BAD = [
    ("v3", LIST, "", LIST[12:], "not JSON"),
    ("v3", "[TOOL_CALLS]", "", "", "not JSON"),
    *(
        ("v3", "[TOOL_CALLS]" + text, "", text, warning)
        for text, warning in (
            ('[{"name": "two words", "arguments": {}}]', "name: expected"),
            ('[{"name": "sum-2", "arguments": [3]}]', "arguments: expected an object, got list"),
            ('[{"name": "sum-2", "arguments": {"x": NaN}}]', "NaN is not JSON"),
            ('[{"name": "sum-2", "arguments": {"x": 1e999}}]', "arguments: Out of range"),
        )
    ),
    ("v3", "[TOOL_CALLS][3]", "", "[3]", "expected an object"),
    ("v3", "[TOOL_CALLS]" + "[" * 5000, "", "[" * 5000, "not JSON"),
    ("v11", "So [TOOL_CALLS]weather{}", "So ", "weather{}", r"behind one \[ARGS\], got 0"),
    ("v11", "So [TOOL_CALLS]weather[ARGS][ARGS]{}", "So ", "weather{}", r"behind one \[ARGS\], got 2"),
    ("v13", "[TOOL_CALLS][ARGS]{}", "", "{}", "name: expected"),
    ("tags", "So " + TAG[:-1], "So ", TAG[:-1], "no </tool_call>"),
    ("control tags", "So <tool_call>x</tool_call>", "So ", "<tool_call>x</tool_call>", "not JSON"),
]


@pytest.mark.parametrize("form, written, before, text, warning", BAD)
def test_malformed_calls_are_text_with_a_warning(form, written, before, text, warning, tokenizers):
    tokenizer = tokenizers[form]
    tokens = write(tokenizer, written)
    answer = parse_tool_calls(tokenizer, tokens, TOOLS)
    assert answer.text == before + text and answer.calls == ()
    assert len(answer.warnings) == 1 and re.search(f"a tool call was left as text: .*{warning}", answer.warnings[0])
    assert streamed(tokenizer, pieces(tokenizer, tokens)) == (before, ParsedAnswer(text, (), answer.warnings))


def test_what_is_good_among_malformed_calls_is_called(tokenizers):
    answer = parse_tool_calls(tokenizers["v3"], write(tokenizers["v3"], LIST + ", 3]  more"), TOOLS)
    assert (plain(answer), answer.text, len(answer.warnings)) == ([W], "3  more", 2)
    answer = parse_tool_calls(tokenizers["v13"], write(tokenizers["v13"], "[TOOL_CALLS]x" + MARKED), TOOLS)
    assert (plain(answer), answer.text, len(answer.warnings)) == ([W], "x", 1)
    answer = parse_tool_calls(tokenizers["tags"], write(tokenizers["tags"], f"a<tool_call>b{TAG}c"), TOOLS)
    assert (plain(answer), answer.text, len(answer.warnings)) == ([W], "a<tool_call>bc", 1)


def test_an_unknown_function_is_called_with_a_warning(tokenizers):
    answer = parse_tool_calls(tokenizers["v3"], write(tokenizers["v3"], LIST.replace("weather", "wether") + "]"), TOOLS)
    assert plain(answer) == [("wether", W[1])] and answer.warnings == ("call 1: no tool has the name wether",)


def test_ids_are_made_where_they_are_malformed_or_doubled(tokenizers):
    call = '{"name": "sum-2", "arguments": {}, "id": %s}'
    ids = '"a1B2c3D4e"', '"a1B2c3D4e"', '"too long 10"', "7", "null"
    written = f"[TOOL_CALLS][{', '.join(call % identity for identity in ids)}]"
    made = [made.id for made in parse_tool_calls(tokenizers["v3"], write(tokenizers["v3"], written), TOOLS).calls]
    assert made[0] == "a1B2c3D4e" and len(set(made)) == 5
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", identity) for identity in made)


def test_half_a_surrogate_pair_stays_an_escape(tokenizers):
    written = r'[TOOL_CALLS][{"name": "sum-2", "arguments": {"é": "\ud83d"}}]'
    (call,) = parse_tool_calls(tokenizers["v3"], write(tokenizers["v3"], written), TOOLS).calls
    assert call.arguments.encode() and json.loads(call.arguments) == {"é": "\ud83d"}


def test_end_tokens_are_no_part_of_the_text(tokenizers):
    tokenizer = tokenizers["v3"]
    names = len(tokenizer.control)
    assert parse_tool_calls(tokenizer, [names + 97, 2], TOOLS).text == "a"
    assert parse_tool_calls(tokenizer, [names + 97, names + 98], TOOLS, end_tokens=[names + 98]).text == "a"
    calls = write(tokenizer, LIST + "]")
    made = [("", [*calls, names + 98])]
    stream = ToolCallStreamParser(tokenizer, TOOLS, end_tokens=[names + 98])
    assert stream.push(*made[0]) == "" and plain(stream.finish()) == [W] == plain(stream.finish())


@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_everything_is_text(tools, tokenizers):
    tokens = write(tokenizers["v3"], "Hi " + LIST + "]")
    assert parse_tool_calls(tokenizers["v3"], tokens, tools) == ParsedAnswer("Hi " + LIST[12:] + "]")
    made = pieces(tokenizers["v3"], tokens)
    assert streamed(tokenizers["v3"], made, tools) == ("Hi " + LIST[12:] + "]", ParsedAnswer(""))


def test_the_stream_ends_where_a_stop_text_cut_it(tokenizers):
    tokens = write(tokenizers["v3"], "Hello you")
    assert streamed(tokenizers["v3"], [("Hel", tokens)]) == ("Hel", ParsedAnswer(""))


def test_a_tag_is_held_back_while_it_may_be_one(tokenizers):
    stream = ToolCallStreamParser(tokenizers["tags"], TOOLS)
    sent = [stream.push(text, []) for text in ("a<", "b <tool", "_x<tool_ca", "ll>{", "}")]
    assert sent == ["a", "<b ", "<tool_x", "", ""]
    assert stream.finish().text == "<tool_call>{}"


def test_answers_are_messages(tokenizers):
    answer = parse_tool_calls(tokenizers["v11"], write(tokenizers["v11"], "So" + MARKED), TOOLS)
    (call,) = answer.calls
    called = {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": '{"city": "Graz é"}'}}
    assert answer.as_message() == {"role": "assistant", "content": "So", "tool_calls": [called]}
    assert ParsedAnswer("", (call,)).as_message()["content"] is None
    assert ParsedAnswer("").as_message() == {"role": "assistant", "content": ""}


def holds(tokenizer: Tokenizer, tokens: list[int], sizes: list[int]) -> None:
    """What is true of any answer, whole or streamed."""
    answer = parse_tool_calls(tokenizer, tokens, TOOLS)
    assert answer.text.encode() is not None
    for call in answer.calls:
        assert re.fullmatch("[a-zA-Z0-9]{9}", call.id) and re.fullmatch("[a-zA-Z0-9_-]{1,64}", call.name)
        assert isinstance(json.loads(call.arguments), dict) and call.arguments.encode()
    assert len({call.id for call in answer.calls}) == len(answer.calls)
    known = [token for token in tokens if 0 <= token < tokenizer.vocab_size]
    if not answer.calls and "<tool_call>" not in tokenizer.control:
        while known and known[-1] == tokenizer.eos_id:
            known.pop()
        assert answer.text == tokenizer.decode(known)
    sent, rest = streamed(tokenizer, pieces(tokenizer, known, sizes))
    if "\ufffd" not in tokenizer.decode(known) or tokenizer.kind == "tekken":  # others replace whole runs of bytes
        assert (plain(rest), rest.warnings) == (plain(answer), answer.warnings)
    assert sent + rest.text == answer.text or tokenizer.kind != "tekken"  # others strip a space from each text's begin


@pytest.mark.parametrize("form", FORMS)
def test_any_tokens_are_an_answer(form, tokenizers):
    tokenizer = tokenizers[form]
    token = st.one_of(st.integers(-2, tokenizer.vocab_size + 20), st.sampled_from(sorted(tokenizer.control.values())))

    @ANY
    @given(st.lists(token, max_size=40), st.lists(st.integers(1, 9), max_size=4))
    def check(tokens, sizes):
        holds(tokenizer, tokens, sizes)

    check()


@pytest.mark.parametrize("form", FORMS)
def test_damaged_calls_are_an_answer(form, tokenizers):
    tokenizer = tokenizers[form]
    good = [write(tokenizer, written) for name, written, _, calls in GOOD if name == form and calls] or [[5, 6, 7]]
    harm = st.tuples(st.integers(0, 99), st.integers(0, 3), st.integers(0, tokenizer.vocab_size - 1))

    @ANY
    @given(st.sampled_from(good), st.lists(harm, max_size=4), st.lists(st.integers(1, 9), max_size=4))
    def check(tokens, harms, sizes):
        tokens = list(tokens)
        for at, length, token in harms:  # so many tokens are replaced by another one
            at %= len(tokens) + 1
            tokens[at : at + length] = [token]
        holds(tokenizer, tokens, sizes)

    check()
