"""Mistral's chat format against mistral-common's encode_chat_completion, for every version it carries."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest

from nemoe_jax.cli import main
from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.render import encode_with_assistant_mask, read_messages, read_tools, render_chat
from nemoe_jax.text.chat.tools import check_tool_choice, nine_character_ids
from nemoe_jax.text.tokenizers.load import Tokenizer, cut_tekken, load_tokenizer

mistral_common = pytest.importorskip("mistral_common")
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

DATA = Path(mistral_common.__file__).parent / "data"
FILES = [
    "tekken_240718.json",
    "tokenizer.model.v1",
    *(
        f"mistral_instruct_tokenizer_{name}"
        for name in ("240216.model.v2", "240323.model.v3", "241114.model.v7", "241114.model.v7m1")
    ),
]
TEKKEN = "tekken_240718.json"
NEWER = ["v7", "v11", "v13"]  # Tekken files of these versions are made from the carried one


def say(*turns: str) -> list[dict[str, str]]:
    """Messages from texts that begin with s:, u: or a:."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


CHATS = {
    "question": say("u:What is it?"),
    "system": say("s:You are a cat.", "u:What are you?"),
    "turns": say("s:You are a cat.", "u:Hi", "a:Miaow", "u:Why?", "a:Purr  ", "u: And now? "),
    "answered": say("u:Hi", "a: Miaow "),
    "two systems": say("s:One.", "s:Two.", "u:Hi"),
    "late system": say("u:Hi", "s:Be brief.", "u:Go on"),
    "system last": say("u:Hi", "s:Be brief."),
    "system alone": say("s:You are a cat."),
    "answer first": say("a:Hello", "u:Hi"),
    "system then answer": say("s:You are a cat.", "a:Hello", "u:Hi", "a:So?", "u:Yes"),
    "doubled": say("u:One", "u:", "u:Two", "a:1", "a:2", "u:Three"),
    "empty": say("s:", "u:"),
    "controls": say(
        "s:[/INST]</s>", "u:[INST] <s> [/INST]</s><unk>", "a:</s>[INST]<s>[SYSTEM_PROMPT]", "u:[control_9]<0x0A>"
    ),
    "scripts": say("s:你是一只猫。\n\n", "u:\n  Кто ты? 😀\t", "a:القطة\u3000", "u:고양이"),
    "blocks": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "One"}, {"type": "text", "text": ""}, {"type": "text", "text": "Two"}],
        },
        {"role": "user", "content": "Three"},
    ],
}


def call(name: str, call_id: str, arguments: object) -> dict:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **more: object) -> dict:
    return {"type": "function", "function": {"name": name, **more}}


WEATHER, SUM = call("weather", "a1B2c3D4e", '{"city":  "Graz", "é": [1.50, null]}'), call("sum-2", "zzzzzzzz9", "")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather </s> é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "sum-2", "parameters": {}, "strict": True}},
]
ASKED = [*say("s:You are a cat.", "u:Before", "a:Yes", "u:Is it cold?"), {"role": "assistant", "tool_calls": [WEATHER]}]
ANSWERED = [*ASKED, {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": '{"degrees":  -3, "ü": "[INST]"}'}]
TWO = [
    *say("u:Is it cold?"),
    {"role": "assistant", "content": None, "tool_calls": [WEATHER, SUM]},
    {"role": "tool", "tool_call_id": "zzzzzzzz9", "content": "not JSON [TOOL_CALLS]"},
    {
        "role": "tool",
        "tool_call_id": "a1B2c3D4e",
        "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "5"}],
    },
]
TOOL_CHATS = {
    "tools alone": say("s:You are a cat.", "u:Hi", "a:Miaow", "u:Go on"),
    "called": ASKED,
    "result": ANSWERED,
    "told": [*ANSWERED, *say("a:It is. ", "u:Really?")],
    "two results": TWO,
    "two told": [*TWO, *say("a:It is.", "u:And now?", "a:Still.")],
    "empty result": [*ASKED, {"role": "tool", "tool_call_id": "a1B2c3D4e", "content": ""}],
    "arguments as an object": [*say("u:x"), {"role": "assistant", "tool_calls": [call("f", "a1B2c3D4e", {"ß": 1})]}],
    "arguments that are no JSON": [*say("u:x"), {"role": "assistant", "tool_calls": [call("f", "a1B2c3D4e", "{x")]}],
}
TOOL_FILES = ["tekken_240718.json", "mistral_instruct_tokenizer_240323.model.v3", "tekken_v7.json"]
TOOL_FILES += ["tekken_v11.json", "tekken_v13.json"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[Tokenizer, dict[ValidationMode, MistralTokenizer]]]:
    directory = tmp_path_factory.mktemp("tekken")
    cut_tekken(DATA / "tekken_240718.json", directory / "small.json", 1300)
    spec = json.loads((directory / "small.json").read_text())
    spec["special_tokens"] += [
        {"rank": 20 + at, "token_str": name, "is_control": True} for at, name in enumerate(("[ARGS]", "[CALL_ID]"))
    ]
    spec["config"] |= {"default_num_special_tokens": 30, "default_vocab_size": 1310}
    paths = [DATA / name for name in FILES]
    for version in NEWER:
        spec["config"]["version"] = version
        path = directory / f"tekken_{version}.json"
        path.write_text(json.dumps(spec))
        paths.append(path)
    modes = (ValidationMode.test, ValidationMode.finetuning)
    return {
        path.name: (load_tokenizer(path), {mode: MistralTokenizer.from_file(path, mode=mode) for mode in modes})
        for path in paths
    }


ALL = [*FILES, *(f"tekken_{version}.json" for version in NEWER)]


def mode_of(messages: list[dict]) -> ValidationMode:
    """mistral-common has one mode for chats that end in a question, and one for those that end in an answer."""
    answered = messages and messages[-1]["role"] == "assistant" and not messages[-1].get("prefix")
    return ValidationMode.finetuning if answered else ValidationMode.test


def reference(
    theirs: dict[ValidationMode, MistralTokenizer], messages: list[dict], tools: list[dict] | None = None
) -> list[int]:
    request = ChatCompletionRequest(messages=messages, tools=tools)
    return theirs[mode_of(messages)].encode_chat_completion(request).tokens


def reference_spoken(tokenizer: MistralTokenizer, request: ChatCompletionRequest) -> tuple[list[int], list[bool]]:
    """mistral-common's ids message by message, so that those of the assistant are known."""
    encoder = tokenizer.instruct_tokenizer
    request = tokenizer._instruct_request_normalizer.from_chat_completion_request(request)
    first, last = encoder.find_first_last_user(request)
    ids, spoken = encoder.start(), [False]
    for at, message in enumerate(request.messages):
        if message.role == "user":
            new = encoder.encode_user_message(
                message, request.available_tools, at == last, at == first, system_prompt=request.system_prompt
            )[0]
        elif message.role == "tool":
            new = encoder.encode_tool_message(message, at < last)[0]
        elif message.role == "system":
            new = encoder.encode_system_message(message)[0]
        else:
            new = encoder.encode_assistant_message(message, at < last)
        ids += new
        spoken += [message.role == "assistant"] * len(new)
    return ids, spoken


@pytest.mark.parametrize("file", ALL)
@pytest.mark.parametrize("name", CHATS)
def test_chats_have_the_ids_of_mistral_common(file, name, pairs):
    ours, theirs = pairs[file]
    assert render_chat(ours, CHATS[name]) == reference(theirs, CHATS[name])


@pytest.mark.parametrize("file", ALL)
def test_a_continued_answer_stays_open(file, pairs):
    ours, theirs = pairs[file]
    messages = say("s:You are a cat.", "u:Hi", "a:Mia")
    expected = reference(theirs, [*messages[:-1], {**messages[-1], "prefix": True}])
    assert render_chat(ours, messages, continue_answer=True) == expected == render_chat(ours, messages)[:-1]


@pytest.mark.parametrize("file", ["tekken_240718.json", "tokenizer.model.v1", "tekken_v7.json"])
def test_all_orders_of_roles_are_accepted_or_refused_alike(file, pairs):
    ours, theirs = pairs[file]
    refused = 0
    for count in (1, 2, 3, 4):
        for letters in itertools.product("sua", repeat=count):
            messages = say(*(f"{letter}:text {at}" for at, letter in enumerate(letters)))
            try:
                expected = reference(theirs, messages)
            except MistralCommonException:
                refused += 1
                with pytest.raises(
                    UserError, match=r"messages\[\d\](\.role: system cannot follow assistant|: a chat starts)"
                ):
                    render_chat(ours, messages)
            else:
                assert render_chat(ours, messages) == expected
    assert refused > 20


def test_random_chats_have_the_ids_of_mistral_common(pairs):
    rng = random.Random(99)
    alphabet = ["[INST]", "</s>", " ", "\n", "the ", "Ж", "中", "é", "😀", "x", "\t", "[/INST]", "<s>"]
    for _ in range(150):
        turns = ["s:" + "".join(rng.choices(alphabet, k=6))] if rng.random() < 0.5 else []
        for _ in range(rng.randrange(1, 4)):
            turns += [f"{role}:{''.join(rng.choices(alphabet, k=8))}x" for role in "ua"]
        messages = say(*turns[: len(turns) - (rng.random() < 0.5)])
        for file in ("tekken_240718.json", "mistral_instruct_tokenizer_240323.model.v3"):
            ours, theirs = pairs[file]
            assert render_chat(ours, messages) == reference(theirs, messages)


@pytest.mark.parametrize("file", TOOL_FILES)
@pytest.mark.parametrize("name", TOOL_CHATS)
def test_tools_have_the_ids_of_mistral_common(file, name, pairs):
    ours, theirs = pairs[file]
    for tools in (None, TOOLS):
        assert render_chat(ours, TOOL_CHATS[name], tools=tools) == reference(theirs, TOOL_CHATS[name], tools)


@pytest.mark.parametrize("file", [file for file in TOOL_FILES if file not in ("tekken_240718.json", TOOL_FILES[1])])
def test_newer_formats_have_answers_of_text_and_calls(file, pairs):
    ours, theirs = pairs[file]
    chat = [*say("u:Is it cold?"), {"role": "assistant", "content": "I will look. ", "tool_calls": [WEATHER, SUM]}]
    assert render_chat(ours, chat, tools=TOOLS) == reference(theirs, chat, TOOLS)


@pytest.mark.parametrize("file", TOOL_FILES)
@pytest.mark.parametrize("name", [*TOOL_CHATS, *CHATS])
def test_spoken_ids_are_the_assistants_messages_of_mistral_common(file, name, pairs):
    ours, theirs = pairs[file]
    chat = (TOOL_CHATS | CHATS)[name]
    tools = TOOLS if name in TOOL_CHATS else None
    ids, spoken = reference_spoken(theirs[mode_of(chat)], ChatCompletionRequest(messages=chat, tools=tools))
    assert encode_with_assistant_mask(ours, chat, tools) == (ids, spoken)
    assert ids == render_chat(ours, chat, tools=tools)


def test_an_answer_of_weight_0_is_not_to_be_learned(pairs):
    ours, _ = pairs["tekken_240718.json"]
    chat = say("u:x", "a:no", "u:y", "a:yes")
    ids, spoken = encode_with_assistant_mask(ours, chat)
    begin, end = ids.index(ours.control["[/INST]"]) + 1, ids.index(ours.control["</s>"]) + 1
    chat[1]["weight"], chat[3]["weight"] = 0, 1
    assert encode_with_assistant_mask(ours, chat) == (ids, [*spoken[:begin], *[False] * (end - begin), *spoken[end:]])


def test_orders_of_calls_and_results_that_mistral_common_accepts(pairs):
    ours, theirs = pairs["tekken_v11.json"]  # which compares ids, as we do for all formats
    counts = [0, 0]
    for letters in itertools.product("uact", repeat=4):
        chat: list[dict] = []
        for at, letter in enumerate(["u", *letters]):
            if letter == "c":
                chat.append({"role": "assistant", "tool_calls": [call("f", f"identity{at}", "{}")]})
            elif letter == "t":
                made = [message["tool_calls"][0]["id"] for message in chat if "tool_calls" in message]
                chat.append({"role": "tool", "content": "x", "tool_call_id": ["nothing99", *made][-1]})
            else:
                chat += say(f"{letter}:text {at}")
        try:
            expected = reference(theirs, chat)
        except MistralCommonException:
            counts[0] += 1
            with pytest.raises(UserError, match=r"messages\[\d\](\.[a-z_]+)?: "):
                render_chat(ours, chat)
        else:
            counts[1] += 1
            assert render_chat(ours, chat) == expected
    assert min(counts) > 20


@pytest.mark.parametrize("file", TOOL_FILES)
def test_ids_of_other_makers_are_mapped_to_nine_characters_each_to_its_own(file, pairs):
    ours, theirs = pairs[file]

    def chat(first: str, second: str) -> list[dict]:
        results = [{"role": "tool", "content": "21", "tool_call_id": name} for name in (second, first)]
        calls = [{"id": name, "type": "function", "function": WEATHER["function"]} for name in (first, second)]
        return [*say("u:x"), {"role": "assistant", "content": None, "tool_calls": calls}, *results]

    foreign = chat("call_abcdefghijklmnop", "chatcmpl-tool-0123456789abcdef")
    names = [call["id"] for call in nine_character_ids(foreign)[1]["tool_calls"]]
    assert len(set(names)) == 2 and all(re.fullmatch("[a-zA-Z0-9]{9}", name) for name in names)
    assert nine_character_ids(chat(*names)) == chat(*names)  # those of that form stay
    expected = reference(theirs, chat(*names), TOOLS)
    assert render_chat(ours, foreign, tools=TOOLS) == expected == render_chat(ours, chat(*names), tools=TOOLS)
    with pytest.raises(UserError, match=r"messages\[2\]\.tool_call_id: .*got 'call_of_another'"):
        render_chat(ours, chat("call_x", "call_y")[:2] + chat("call_of_another", "call_y")[3:])


def test_a_last_call_may_lack_an_id(pairs):
    ours, theirs = pairs["tekken_240718.json"]
    for extra in ({}, {"id": "null"}):
        chat = [
            *say("u:x"),
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}, **extra}]},
        ]
        assert render_chat(ours, chat) == reference(theirs, chat)


def test_the_system_prompt_is_folded_in(pairs):
    tokenizer, _ = pairs["tekken_240718.json"]
    text = tokenizer.decode(render_chat(tokenizer, CHATS["turns"]), skip_special=False)
    assert text == "<s>[INST]Hi[/INST]Miaow</s>[INST]Why?[/INST]Purr</s>[INST]You are a cat.\n\n And now? [/INST]"


def test_only_the_format_makes_control_ids(pairs):
    tokenizer, _ = pairs["tekken_240718.json"]
    control = set(tokenizer.control.values())
    assert [i for i in render_chat(tokenizer, CHATS["controls"]) if i in control] == [1, 3, 4, 2, 3, 4]


BAD = {
    "nothing": ([], "expected a list of at least one"),
    "a text": ("hello", "expected a list"),
    "not objects": (["hello"], r"messages\[0\]: expected an object"),
    "no role": ([{"content": "x"}], r"messages\[0\]\.role: expected one of system.*got None"),
    "strange role": ([*say("u:x"), {"role": "bot", "content": "x"}], r"messages\[1\]\.role: .*got 'bot'"),
    "unhashable role": ([{"role": ["user"], "content": "x"}], r"messages\[0\]\.role"),
    "developer": ([{"role": "developer", "content": "x"}], r"messages\[0\]\.role: developer is not supported"),
    "tool after user": (
        [*say("u:x"), {"role": "tool", "content": "x"}],
        r"messages\[1\]\.role: tool cannot follow user",
    ),
    "result of no call": ([*ASKED[:3], {"role": "tool", "content": "x"}], r"messages\[3\]\.tool_call_id: .*got None"),
    "result of another call": (
        [*ASKED, {**ANSWERED[-1], "tool_call_id": "a"}],
        r"messages\[5\]\.tool_call_id: .*got 'a'",
    ),
    "result twice": ([*ANSWERED, ANSWERED[-1]], r"messages\[6\]\.tool_call_id"),
    "no result": ([*ASKED, *say("u:x", "a:y")], r"messages\[6\]: a response before the results of the calls a1B2c3D4e"),
    "empty call": (
        [*say("u:x"), {"role": "assistant", "tool_calls": [{}]}],
        r"messages\[1\]\.tool_calls\[0\]: expected a fun",
    ),
    "calls that are no list": (
        [*say("u:x"), {"role": "assistant", "tool_calls": 3}],
        r"messages\[1\]\.tool_calls: .*3",
    ),
    "call id": (
        [*say("u:x"), {"role": "assistant", "tool_calls": [call("f", 12345, "")]}],
        r"messages\[1\]\.tool_calls\[0\]\.id: expected a string, got 12345",
    ),
    "call name": (
        [*say("u:x"), {"role": "assistant", "tool_calls": [call("f x", "123456789", "")]}],
        r"messages\[1\]\.tool_calls\[0\]\.function\.name: expected 1 to 64 .*got 'f x'",
    ),
    "same id": ([*say("u:x"), {"role": "assistant", "tool_calls": [WEATHER] * 2}], "two calls with the id a1B2c3D4e"),
    "text and calls": (
        [*say("u:x"), {"role": "assistant", "content": "x", "tool_calls": [WEATHER]}],
        r"messages\[1\]: chat format v3 has no response of both",
    ),
    "no content": ([{"role": "user"}], r"messages\[0\]\.content: expected a text .*got None"),
    "number": ([{"role": "user", "content": 3}], r"messages\[0\]\.content: expected a text .*got 3"),
    "image": ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]\.content"),
    "empty answer": (say("u:x", "a:", "u:y"), r"messages\[1\]: an assistant message without content"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_chats_are_one_clear_line(name, pairs):
    messages, message = BAD[name]
    with pytest.raises(UserError, match=message):
        render_chat(pairs["tekken_240718.json"][0], messages)


@pytest.mark.parametrize(
    "file, tools, message",
    [
        (TEKKEN, "x", "tools: expected a list"),
        (TEKKEN, [3], "tools: expected a list"),
        (TEKKEN, [{}], r"tools\[0\]\.function: expected an object with a name, got None"),
        (TEKKEN, [{"type": "web"}], r"tools\[0\]\.type: expected function, got 'web'"),
        (TEKKEN, [TOOLS[0], tool("")], r"tools\[1\]\.function\.name: expected 1 to 64 .*got ''"),
        (TEKKEN, [tool("f"), tool("f")], r"tools\[1\]\.function\.name: two tools with the name f"),
        (TEKKEN, [tool("f", description=3)], r"tools\[0\]\.function\.description: expected a text, got 3"),
        (TEKKEN, [tool("f", parameters=3)], r"tools\[0\]\.function\.parameters: expected a JSON schema .*got 3"),
        (TEKKEN, [tool("f", parameters={"type": "string"})], r"parameters\.type: expected object, got 'string'"),
        (TEKKEN, [tool(f"f{at}") for at in range(129)], "tools: expected at most 128, got 129"),
        ("tokenizer.model.v1", TOOLS, "chat format v1 has no tools; v3 and newer have"),
    ],
)
def test_bad_tools_are_one_clear_line(file, tools, message, pairs):
    with pytest.raises(UserError, match=message):
        render_chat(pairs[file][0], say("u:x"), tools=tools)


@pytest.mark.parametrize(
    "choice, expected",
    [
        (None, ("auto", None)),
        ("none", ("none", None)),
        ("auto", ("auto", None)),
        ("required", ("required", None)),
        ("any", ("required", None)),
        ({"type": "function", "function": {"name": "sum-2"}}, ("required", "sum-2")),
    ],
)
def test_a_choice_of_tools_is_read(choice, expected):
    assert check_tool_choice(choice, TOOLS) == expected


def test_without_tools_none_is_the_only_choice():
    assert check_tool_choice(None, None) == ("none", None) and check_tool_choice("auto", []) == ("auto", None)
    with pytest.raises(UserError, match="tool_choice: expected none or auto where no tools are given"):
        check_tool_choice("required", [])


@pytest.mark.parametrize(
    "choice, message",
    [
        ("often", "tool_choice: expected none, auto, required or a function, got 'often'"),
        (["auto"], "tool_choice: expected none"),
        ({"type": "function"}, "tool_choice: expected the type function and a function with a name"),
        ({"type": "tool", "function": {"name": "sum-2"}}, "tool_choice: expected the type function"),
        (tool("sum"), r"tool_choice\.function\.name: expected the name of a tool that is given, got 'sum'"),
        (tool(["sum"]), r"tool_choice\.function\.name: .*got \['sum'\]"),
    ],
)
def test_a_bad_choice_of_tools_is_one_clear_line(choice, message):
    with pytest.raises(UserError, match=message):
        check_tool_choice(choice, TOOLS)


def test_128_tools_have_the_ids_of_mistral_common(pairs):
    ours, theirs = pairs["tekken_v7.json"]
    tools = [tool(f"f{at}", parameters={}) for at in range(128)]
    assert render_chat(ours, say("u:x"), tools=tools) == reference(theirs, say("u:x"), tools)


def test_tool_calls_need_a_format_that_has_them(pairs):
    with pytest.raises(UserError, match="chat format v1 has no tool calls"):
        render_chat(pairs["tokenizer.model.v1"][0], ASKED)


def test_only_an_answer_can_be_continued(pairs):
    with pytest.raises(UserError, match=r"messages\[0\]: only an assistant message"):
        render_chat(pairs["tekken_240718.json"][0], say("u:x"), continue_answer=True)


def test_an_unknown_format_is_refused(pairs, tmp_path):
    spec = json.loads(pairs["tekken_v13.json"][0].path.read_text())
    spec["config"]["version"] = "v15"
    (tmp_path / "tekken.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="chat format v15 is not known"):
        render_chat(load_tokenizer(tmp_path), say("u:x"))


def test_messages_are_read_from_json(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(CHATS["system"]), encoding="utf-8")
    assert read_messages(path) == CHATS["system"]
    path.write_text(json.dumps({"messages": CHATS["turns"], "model": "x"}))
    assert read_messages(path) == CHATS["turns"] and read_tools(path) is None
    path.write_text(json.dumps({"messages": CHATS["turns"], "tools": TOOLS}))
    assert read_tools(path) == TOOLS
    path.write_text(json.dumps({"messages": CHATS["turns"], "tools": {"a": 1}}))
    with pytest.raises(UserError, match=r"chat\.json: tools: expected a list"):
        read_tools(path)
    for content, message in {
        "[": "not a JSON file",
        "{}": "expected a list",
        '[{"role": "x"}]': r"messages\[0\]\.role",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            read_messages(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_messages(tmp_path / "missing.json")


def test_the_command_line_takes_a_chat_with_tools(pairs, tmp_path, capsys):
    tokenizer, _ = pairs["tekken_240718.json"]
    (tmp_path / "chat.json").write_text(json.dumps({"messages": ANSWERED, "tools": TOOLS}))
    assert main.main(["tokenize", str(tokenizer.path), "--chat", str(tmp_path / "chat.json")]) == 0
    assert json.loads(capsys.readouterr().out) == render_chat(tokenizer, ANSWERED, tools=TOOLS)
