"""OpenAI's Responses API as its official client sees it, beside the same chats."""

import json
from typing import Literal

import pydantic
import pytest

pytest.importorskip("mistral_common")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")
from openai.types.responses import Response, ResponseStreamEvent

from nemoe_jax.serving.engine.request import RequestOutput, ScoredToken
from tests.serving.test_server import CHAT, TOOLS, Scripted, ask, openai_client
from tests.support.served_models import serve, started, tekken

INPUT = {"instructions": CHAT[0]["content"], "input": CHAT[1]["content"]}
FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


class Paint(pydantic.BaseModel):
    color: Literal["red", "blue"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tekken(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def address(tokenizer):
    with started(tokenizer) as engine, serve(engine, tokenizer) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai_client(address) as client:
        yield client


def body_of(**params):
    return {"model": "nano", "temperature": 0, "max_output_tokens": 8, **INPUT, **params}


def respond(address, status=200, **params):
    """The raw answer, as whole as the client's own types want it."""
    reply = httpx.post(f"{address}/v1/responses", json=body_of(**params), trust_env=False, timeout=60)
    assert reply.status_code == status, reply.text
    if status == 200:
        Response.model_validate_json(reply.text)
    return reply.json()


def stream(address, **params):
    """The events, as whole as the client's own types want them."""
    reply = httpx.post(f"{address}/v1/responses", json=body_of(stream=True, **params), trust_env=False, timeout=60)
    events = []
    for block in reply.text.strip().split("\n\n"):
        kind, data = block.split("\n")
        events.append(EVENT.validate_json(data.removeprefix("data: ")))
        assert kind == f"event: {events[-1].type}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events


def test_a_response_is_that_of_the_chat(client, address):
    chat = ask(client)
    whole = client.responses.create(**body_of(store=False, metadata={"a": "b"}))
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 8)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert whole.metadata == {"a": "b"} and whole.output[0].status == "incomplete"
    items = [{"role": "developer", "content": [{"type": "input_text", "text": CHAT[0]["content"]}]}, CHAT[1]]
    listed = respond(address, instructions=None, input=items)
    assert listed["output"][0]["content"][0]["text"] == whole.output_text
    other = respond(address, temperature=2.0, top_p=0.0)
    assert (other["temperature"], other["top_p"]) == (2, 0)
    assert other["output"][0]["content"] == listed["output"][0]["content"]  # top_p leaves the likeliest alone


def test_a_stream_of_text_joins_to_the_whole(client, address):
    whole = client.responses.create(**body_of())
    events = stream(address)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert "".join(event.delta for event in events[4:-4]) == events[-4].text == whole.output_text
    assert events[-1].response.usage == whole.usage
    with client.responses.stream(**body_of()) as managed:
        assert (
            "".join(event.delta for event in managed if event.type == "response.output_text.delta") == events[-4].text
        )


def test_json_by_a_schema(client):
    params = body_of(max_output_tokens=60)
    parsed = client.responses.parse(text_format=Paint, **params)
    assert parsed.status == "completed" and parsed.output_parsed.color in ("red", "blue")
    with client.responses.stream(text_format=Paint, **params) as managed:
        assert managed.get_final_response().output_parsed == parsed.output_parsed
    anything = client.responses.create(**params, text={"format": {"type": "json_object"}})
    assert anything.output_text.lstrip().startswith("{")


def test_functions_are_called_and_answered(client, address):
    params = {"tools": FUNCTIONS, "parallel_tool_calls": False, "max_output_tokens": 120}
    whole = client.responses.create(**body_of(tool_choice="required", **params))
    (call,) = whole.output
    assert whole.status == "completed" and call.name in ("paint", "wash")
    Paint.model_validate_json(call.arguments)
    chosen = {"type": "function", "name": "wash"}
    events = stream(address, tool_choice=chosen, **params)
    assert [event.type.removeprefix("response.") for event in events[2:]] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    (item,) = events[-1].response.output
    assert item.name == "wash" and item.arguments == events[3].delta == events[4].arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    items = [CHAT[1], call.model_dump(exclude_none=True), result]
    then = client.responses.create(**body_of(input=items, tools=FUNCTIONS))
    function = {"name": call.name, "arguments": call.arguments}
    told = [
        *CHAT,
        {"role": "assistant", "tool_calls": [{"id": call.call_id, "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "done"},
    ]
    same = ask(client, told, tools=TOOLS)
    assert then.usage.input_tokens == same.usage.prompt_tokens
    assert then.output_text == same.choices[0].message.content


def test_text_before_calls_has_its_own_item(tokenizer):
    text = '[{"name": "paint", "arguments": {"color": "red"}}]'
    tokens = [*tokenizer.encode("Hi"), tokenizer.control_id("[TOOL_CALLS]"), *tokenizer.encode(text)]
    engine = Scripted(RequestOutput("Hi" + text, tuple(map(ScoredToken, tokens)), "stop"))
    with serve(engine, tokenizer) as address:
        events = stream(address, tools=FUNCTIONS)
        whole = respond(address, tools=FUNCTIONS)
    assert [item["type"] for item in whole["output"]] == ["message", "function_call"]
    assert whole["output"][0]["content"][0]["text"] == "Hi"
    assert [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1]


def test_an_engine_that_fails(tokenizer):
    engine = Scripted(RequestOutput("Hi", (ScoredToken(5),)), RequestOutput("", (), "error", "NaN in the logits"))
    with serve(engine, tokenizer) as address:
        assert "NaN in the logits" in respond(address, status=500)["error"]["message"]
        last = stream(address)[-1]
    assert last.type == "response.failed" and last.response.error.message == "NaN in the logits"


BAD = {
    "previous_response_id": ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored here"),
    "store": ({"store": True}, "store", "nothing is stored here"),
    "background": ({"background": True}, "background", "nothing is stored here"),
    "other tools": ({"tools": [{"type": "web_search"}]}, "tools[0].type", "should be 'function'"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
        "should be 'input_text'",
    ),
    "a tool's name": (
        {"tools": FUNCTIONS, "tool_choice": {"type": "function", "name": "f"}},
        "tool_choice.name",
        "expected the name of a tool",
    ),
    "a schema": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}}},
        "text.format",
        "schema",
    ),
    "too much": ({"max_output_tokens": 512}, "input", "exceed the context"),
    "an order": ({"input": [CHAT[1], {"role": "assistant", "content": "It"}]}, "input[1]", "the last one is an answer"),
    "an output of nothing": (
        {"input": [{"type": "function_call_output", "call_id": "a1b2c3d4e", "output": "x"}]},
        "input[0].role",
        "",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_says_why(address, name):
    params, param, message = BAD[name]
    error = respond(address, status=400, **params)["error"]
    assert error["param"] == param and message in error["message"], error
    assert "continue_final_message" not in json.dumps(error)
