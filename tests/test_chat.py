"""Mistral's chat format against mistral-common's encode_chat_completion, for every version it carries."""

import itertools
import json
import random
from pathlib import Path

import pytest

from nemoe_jax.chat import read_messages, render_chat
from nemoe_jax.errors import UserError
from nemoe_jax.tokenizer import Tokenizer, cut_tekken, load_tokenizer

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


def reference(theirs: dict[ValidationMode, MistralTokenizer], messages: list[dict]) -> list[int]:
    """mistral-common has one mode for chats that end in a question, and one for those that end in an answer."""
    answered = messages and messages[-1]["role"] == "assistant" and not messages[-1].get("prefix")
    mode = ValidationMode.finetuning if answered else ValidationMode.test
    return theirs[mode].encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens


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
                    UserError, match=r"messages\[\d\]: (role system cannot follow assistant|a chat starts)"
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


def test_the_system_prompt_is_folded_in(pairs):
    tokenizer, _ = pairs["tekken_240718.json"]
    text = tokenizer.decode(render_chat(tokenizer, CHATS["turns"]), skip_special=False)
    assert text == "<s>[INST]Hi[/INST]Miaow</s>[INST]Why?[/INST]Purr</s>[INST]You are a cat.\n\n And now? [/INST]"


def test_only_the_format_makes_control_ids(pairs):
    tokenizer, _ = pairs["tekken_240718.json"]
    control = set(tokenizer.control.values())
    assert [i for i in render_chat(tokenizer, CHATS["controls"]) if i in control] == [1, 3, 4, 2, 3, 4]


BAD = {
    "nothing": ([], "wanted a list of at least one"),
    "a text": ("hello", "wanted a list"),
    "not objects": (["hello"], r"messages\[0\]: wanted an object"),
    "no role": ([{"content": "x"}], r"messages\[0\]: role: wanted one of system.*got None"),
    "strange role": ([*say("u:x"), {"role": "bot", "content": "x"}], r"messages\[1\]: role: .*got 'bot'"),
    "unhashable role": ([{"role": ["user"], "content": "x"}], r"messages\[0\]: role"),
    "tool": ([*say("u:x"), {"role": "tool", "content": "x"}], r"messages\[1\]: role tool is not supported"),
    "tool calls": ([*say("u:x"), {"role": "assistant", "tool_calls": [{}]}], r"messages\[1\]: tool calls"),
    "no content": ([{"role": "user"}], r"messages\[0\]: content: wanted a text .*got None"),
    "number": ([{"role": "user", "content": 3}], r"messages\[0\]: content: wanted a text .*got 3"),
    "image": ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\]: content"),
    "empty answer": (say("u:x", "a:", "u:y"), r"messages\[1\]: an answer .* without content"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_chats_are_one_clear_line(name, pairs):
    messages, message = BAD[name]
    with pytest.raises(UserError, match=message):
        render_chat(pairs["tekken_240718.json"][0], messages)


def test_only_an_answer_can_be_continued(pairs):
    with pytest.raises(UserError, match=r"messages\[0\]: only an answer"):
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
    assert read_messages(path) == CHATS["turns"]
    for content, message in {
        "[": "not a JSON file",
        "{}": "wanted a list",
        '[{"role": "x"}]': r"messages\[0\]: role",
    }.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            read_messages(path)
        assert str(path) in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        read_messages(tmp_path / "missing.json")
