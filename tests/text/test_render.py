"""Documents as ids and masks: texts, chats in Mistral's format against mistral-common, and chat templates."""

import json
from pathlib import Path

import numpy as np
import pytest

from nemoe_jax.text.chat.render import render_chat
from nemoe_jax.text.data.formats import BadRow, Chat, Completion, to_document
from nemoe_jax.text.data.render import encode_document
from nemoe_jax.text.tokenizers.load import cut_tekken, load_tokenizer
from tests.support.configs import write_tokenizer
from tests.text.test_chat_template import make

mistral_common = pytest.importorskip("mistral_common")
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
CHAT = {
    "conversations": [
        {"from": "system", "value": "Be brief. </s>"},
        {"from": "human", "value": "Why? [/INST]"},
        {"from": "gpt", "value": "So it is [INST] "},
        {"from": "human", "value": "And then?"},
        {"from": "gpt", "value": "The end 終"},
    ]
}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
CALLS = {
    "messages": [
        {"role": "user", "content": "Is it cold?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_0123456789abcdef",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Graz"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_0123456789abcdef", "content": '{"degrees": -3}'},
        {"role": "assistant", "content": "It is."},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "description": "W", "parameters": PARAMETERS}}],
}


@pytest.fixture(scope="module")
def tekken():
    return load_tokenizer(TEKKEN)


@pytest.mark.parametrize("row, answers", [(CHAT, 2), (CALLS, 2)])
def test_chats_are_mistral_commons_ids_and_only_answers_are_learned(tekken, row, answers):
    document = to_document(row)
    ids_N, mask_N, is_chat = encode_document(tekken, document)
    theirs = MistralTokenizer.from_file(str(TEKKEN), mode=ValidationMode.finetuning)
    request = ChatCompletionRequest(messages=document.messages, tools=document.tools)
    assert is_chat and ids_N.tolist() == theirs.encode_chat_completion(request).tokens
    assert ids_N.dtype == np.uint32 and mask_N.dtype == bool and ids_N.shape == mask_N.shape
    # a stretch that is learned begins after the end of a question or of a tool's result, and ends with </s>
    opening = {tekken.control["[/INST]"], tekken.control["[/TOOL_RESULTS]"]}
    edges = np.flatnonzero(np.diff(mask_N.astype(int), append=0))
    starts, ends = edges[0::2], edges[1::2]
    assert len(starts) == len(ends) == answers
    assert set(ids_N[starts].tolist()) <= opening and set(ids_N[ends].tolist()) == {tekken.eos_id}


def test_what_is_learned_of_calls(tekken):
    ids_N, mask_N, _ = encode_document(tekken, to_document(CALLS))
    learned = tekken.decode(ids_N[mask_N], skip_special=False)
    call, answer, rest = learned.split("</s>")
    assert (answer, rest) == ("It is.", "") and call.startswith("[TOOL_CALLS]")
    (made,) = json.loads(call.removeprefix("[TOOL_CALLS]"))
    assert made["arguments"] == {"city": "Graz"} and len(made["id"]) == 9
    given = tekken.decode(ids_N[~mask_N], skip_special=False)
    assert given.startswith("<s>[AVAILABLE_TOOLS][{") and f'"call_id": "{made["id"]}"}}[/TOOL_RESULTS]' in given


def test_texts_are_learned_as_a_whole_and_closed(tekken):
    ids_N, mask_N, is_chat = encode_document(tekken, "A text. </s>")
    assert ids_N.tolist() == [tekken.bos_id, *tekken.encode("A text. </s>"), tekken.eos_id]
    assert mask_N.all() and not is_chat


TEMPLATES = {
    "blocks": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}word0 "
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}word1 {{ m.content }} {% endif %}"
    "{% endfor %}",
    "differences": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}word0 "
    "{{ m.content }}{{ eos_token }}{% else %}word1 {{ m.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}word0 {% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_with_and_without_generation_blocks(tmp_path, name):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    tokenizer = load_tokenizer(tmp_path)
    document = to_document({"query": "word7 word8", "response": "word9 word5"})
    ids_N, mask_N, _ = encode_document(tokenizer, document)
    word = lambda number: 3 + number  # noqa: E731
    assert ids_N.tolist() == [1, word(1), word(7), word(8), word(0), word(9), word(5), 2]
    assert mask_N.tolist() == [False] * 5 + [True] * 3
    assert ids_N.tolist() == render_chat(tokenizer, document.messages)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no chats') }}", "no chats"),
        ("{{ bos_token }}", "leaves out every answer"),
        ("{{ messages | length }} {{ messages[0].content }}", "changes with what follows"),
    ],
)
def test_chats_that_a_template_does_not_take_are_bad_rows(tmp_path, template, message):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(BadRow, match=message):
        encode_document(load_tokenizer(tmp_path), to_document({"query": "word7", "response": "word9"}))


def test_chats_that_the_format_does_not_take_are_bad_rows(tmp_path, tekken):
    cut_tekken(TEKKEN, tmp_path / "tekken.json", 600)
    calls = Chat([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"id": "short"}]}])
    with pytest.raises(BadRow, match=r"messages\[1\]\.tool_calls\[0\]: expected a function"):
        encode_document(load_tokenizer(tmp_path), calls)


@pytest.mark.parametrize("depth", [300, 10**5])
def test_nesting_beyond_reason_is_a_bad_row(tekken, depth):
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": "[" * depth + "]" * depth}}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}
    assert encode_document(tekken, to_document(row)).mask_N.any()  # as the text that it is


def test_of_a_prompt_with_its_completion_the_completion_is_learned(tekken):
    ids_N, mask_N, whole = encode_document(tekken, Completion("Once upon", " a time"))
    prompt, text = tekken.encode_prompt("Once upon"), tekken.encode_prompt("Once upon a time")
    assert text[: len(prompt)] == prompt and ids_N.tolist() == [*text, tekken.eos_id] and whole
    assert mask_N.tolist() == [False] * len(prompt) + [True] * (len(text) - len(prompt) + 1)


DETAILS = [
    {"begin_offset": 0, "end_offset": 8, "train": True},
    {"begin_offset": 9, "end_offset": 19, "train": False},
    {"begin_offset": 20, "end_offset": 26, "train": True},
]
DETAILED = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "It is so, wrong wrong, right.", "train_detail": DETAILS},
    {"role": "user", "content": "y"},
    {"role": "assistant", "content": "word4"},
]
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("kind", ["tekken", "sentencepiece", "differences", "blocks"])
def test_stretches_of_an_answer_are_left_out(kind, tmp_path, tekken):
    if kind == "tekken":
        tokenizer = tekken
    elif kind == "sentencepiece":
        tokenizer = load_tokenizer(TEKKEN.parent / "tokenizer.model.v1")
    else:
        template = CHATML
        if kind == "blocks":
            inner = "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}"
            template = CHATML.replace(
                "{{ m.content | trim }}<|im_end|>", inner + "{% else %}{{ m.content }}{% endif %}"
            )
        tokenizer, _ = make(tmp_path, "byte level", template)
    row = {"messages": DETAILED}
    ids_N, mask_N, _ = encode_document(tokenizer, to_document(row))
    assert ids_N.tolist() == encode_document(tokenizer, to_document(row))[0].tolist()
    assert ids_N.tolist() == render_chat(tokenizer, [{**one, "train_detail": None} for one in DETAILED])
    learned = tokenizer.decode(ids_N[mask_N])
    assert "wrong" not in learned and "wro" not in learned
    assert learned.startswith("It is so") and "ight." in learned and "word4" in learned
    assert mask_N[-1 if kind in ("tekken", "sentencepiece") else -2]  # the end token


def test_an_answer_that_a_template_changes_cannot_have_stretches(tmp_path):
    tokenizer, _ = make(tmp_path, "byte level", CHATML.replace("trim", "upper"))
    with pytest.raises(BadRow, match="train_detail: the chat format does not keep the text of the response"):
        encode_document(tokenizer, to_document({"messages": DETAILED}))
