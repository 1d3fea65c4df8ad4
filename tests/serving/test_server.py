"""The HTTP API as its official client sees it, over a small model of random weights."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("mistral_common")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.cli import main, model_flags
from nemoe_jax.inference import sampling
from nemoe_jax.serving.api import streaming
from nemoe_jax.serving.api.requests import CompletionRequest
from nemoe_jax.serving.api.served_model import ServedModel
from nemoe_jax.serving.engine.engine import Busy
from nemoe_jax.serving.engine.request import RequestOutput, ScoredToken
from nemoe_jax.text.chat.render import render_chat
from tests.support.compiled import forward
from tests.support.served_models import CONFIG, ROWS, WAITING, adapter, serve, started, tekken, weights

PROMPT = "The weather in Graz is"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it cold?"}]
COLORS = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": name, "parameters": COLORS | {"additionalProperties": False}},
    }
    for name in ("paint", "wash")
]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": TOOLS[0]["function"]["parameters"]}}
ADAPTERS = ("red", "blue")
NO_END = {"2": -100}  # so that an answer goes on as long as it may


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tekken(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def engine(tokenizer):
    with started(tokenizer, {name: adapter(seed) for seed, name in enumerate(ADAPTERS, 5)}) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine, tokenizer):
    with serve(engine, tokenizer) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai_client(address) as client:
        yield client


def openai_client(address, key="none"):
    # no proxy of the environment between us and ourselves
    return openai.OpenAI(
        base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
    )


def complete(client, prompt=PROMPT, **params):
    return client.completions.create(**{"model": "nano", "prompt": prompt, "max_tokens": 8, "temperature": 0, **params})


def ask(client, messages=CHAT, **params):
    params = {"model": "nano", "max_tokens": 8, "temperature": 0, **params}
    return client.chat.completions.create(messages=messages, **params)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def greedy(prompt, count):
    """The likeliest tokens and their log-probabilities, by whole forward passes."""
    params, tokens = weights(), list(prompt)
    run = jax.jit(lambda params, tokens: forward(CONFIG, params, tokens).logits[0])
    for _ in range(count):
        padded = jnp.asarray([tokens + [0] * (len(prompt) + count - len(tokens))])
        tokens.append(int(np.asarray(run(params, padded))[len(tokens) - 1].argmax()))
    log_p = jax.nn.log_softmax(run(params, jnp.asarray([tokens])))
    made = tokens[len(prompt) :]
    return made, np.asarray(log_p)[np.arange(len(prompt) - 1, len(tokens) - 1), made]


def test_models_are_the_model_and_its_adapters(client):
    assert [(model.id, model.parent) for model in client.models.list()] == [
        ("nano", None),
        ("red", "nano"),
        ("blue", "nano"),
    ]
    assert client.models.retrieve("blue").max_model_len == CONFIG.context


def test_a_completion_is_the_model_s(client, tokenizer):
    ids = tokenizer.encode(PROMPT, bos=True)
    made, log_p = greedy(ids, 8)
    answer = complete(client, logprobs=2)
    (choice,) = answer.choices
    assert choice.text == tokenizer.decode(made)
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        len(ids),
        8,
        len(ids) + 8,
    )
    np.testing.assert_allclose(choice.logprobs.token_logprobs, log_p, atol=1e-4)
    for token, likely in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True):
        assert next(iter(likely)) == token and len(likely) == 2
    lengths = [len(token) for token in choice.logprobs.tokens]
    assert choice.logprobs.text_offset == [sum(lengths[:at]) for at in range(8)]
    several = complete(client, prompt=[ids, ids])
    assert [one.text for one in several.choices] == [choice.text] * 2
    assert [one.text for one in complete(client, prompt=[PROMPT]).choices] == [choice.text]
    assert complete(client, prompt=ids, echo=True).choices[0].text == tokenizer.decode(ids) + choice.text
    assert complete(client, echo=True).choices[0].text == PROMPT + choice.text


def test_a_chat_is_the_rendered_prompt_continued(client, tokenizer):
    ids = render_chat(tokenizer, CHAT)
    answer = ask(client, logprobs=True, top_logprobs=3)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == complete(client, prompt=ids).choices[0].text
    assert answer.usage.prompt_tokens == len(ids)
    data = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert data.decode("utf-8", "replace") == choice.message.content
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].logprob == token.logprob and len(token.top_logprobs) == 3
    begun = [*CHAT, {"role": "assistant", "content": "It"}]
    going_on = ask(client, begun, extra_body={"continue_final_message": True})
    assert going_on.usage.prompt_tokens == len(render_chat(tokenizer, begun, continue_answer=True))


@pytest.mark.parametrize("params", [{}, {"n": 3, "temperature": 1, "seed": 3, "logprobs": 1}])
def test_a_streamed_completion_joins_to_the_whole(client, params):
    whole = complete(client, **params)
    texts, tokens, reasons, usage = {}, {}, {}, None
    for chunk in complete(client, stream=True, stream_options={"include_usage": True}, **params):
        assert usage is None
        usage = chunk.usage
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens if choice.logprobs else [])
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert usage == whole.usage
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert tokens == {choice.index: choice.logprobs.tokens if choice.logprobs else [] for choice in whole.choices}


def test_a_streamed_chat_joins_to_the_whole(client):
    whole = ask(client, n=2, logprobs=True)
    chunks = list(ask(client, n=2, logprobs=True, stream=True))
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].id != whole.id
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.usage is None for chunk in chunks)
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        tokens = [token for one in own if one.logprobs for token in one.logprobs.content]
        assert tokens == choice.logprobs.content
        assert [one.finish_reason for one in own][-1] == choice.finish_reason


def test_several_answers_have_seeds_of_their_own(client):
    several = complete(client, n=3, seed=5, temperature=1)
    alone = [complete(client, seed=seed, temperature=1).choices[0].text for seed in (5, 6, 7)]
    assert [choice.text for choice in several.choices] == alone and len(set(alone)) == 3
    free = {complete(client, temperature=1, max_tokens=8).choices[0].text for _ in range(4)}
    assert len(free) > 1  # without a seed, each is another


def test_stop_texts_and_tokens_end_an_answer(client, tokenizer):
    whole = complete(client, logprobs=0).choices[0]
    stop = whole.text[len(whole.text) // 2 :][:2]
    cut = complete(client, stop=["never that", stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert complete(client, stop=stop).choices[0].text == cut.text
    made, _ = greedy(tokenizer.encode(PROMPT, bos=True), 4)
    ended = complete(client, extra_body={"stop_token_ids": [made[3]]}).choices[0]
    assert (ended.text, ended.finish_reason) == (tokenizer.decode(made[: made.index(made[3])]), "stop")


def test_wishes_reach_the_choice_of_tokens(client, tokenizer):
    first = complete(client, max_tokens=1, logprobs=5).choices[0]
    hot = {"temperature": 2, "max_tokens": 1}
    for params in ({"top_p": 0}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1}}):
        assert complete(client, **hot, **params).choices[0].text == first.text, params
    made, _ = greedy(tokenizer.encode(PROMPT, bos=True), 1)
    assert complete(client, max_tokens=1, logit_bias={str(made[0]): -100}).choices[0].text != first.text


def test_answers_of_a_form(client):
    for stream in (False, True):
        answer = ask(client, response_format=SCHEMA, max_tokens=40, stream=stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer) if stream else None
        text = text if stream else answer.choices[0].message.content
        assert json.loads(text)["color"] in ("red", "blue")
    started = ask(client, response_format={"type": "json_object"}).choices[0].message.content
    assert started.lstrip().startswith("{")


def test_tools_are_called_and_answered(client):
    answer = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=120)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert re.fullmatch("[a-zA-Z0-9]{9}", call.id) and call.function.name in ("paint", "wash")
    assert json.loads(call.function.arguments)["color"] in ("red", "blue")
    told = [*CHAT, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    assert ask(client, told, tools=TOOLS).choices[0].finish_reason == "length"

    chosen = {"type": "function", "function": {"name": "wash"}}
    chunks = [chunk.choices[0] for chunk in ask(client, tools=TOOLS, tool_choice=chosen, max_tokens=120, stream=True)]
    assert not any(chunk.delta.content for chunk in chunks) and chunks[-1].finish_reason == "tool_calls"
    (streamed,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert streamed.function.name == "wash" and streamed.index == 0
    assert json.loads(streamed.function.arguments)["color"] in ("red", "blue")

    free = ask(client, tools=TOOLS, tool_choice="none").choices[0]
    assert free.message.tool_calls is None and free.message.content


@pytest.mark.parametrize("name", [None, "red"])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_lm_eval_s_local_completions_reads_the_model_s_own_scores(client, tokenizer, name, max_tokens):
    """Echoed prompts with log-probabilities, as lm-eval asks for them, beside a forward pass."""
    api = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    ids = tokenizer.encode_prompt("The weather in Graz is cold, and it rains. And rains. And it goes on and on.")
    given = {"logprobs": 2, "max_tokens": max_tokens, "seed": 1234}
    answer = complete(client, prompt=[ids, ids[:1]], echo=True, model=name or "nano", **given)
    tree = None if name is None else adapter(5)
    logits_TV = forward(CONFIG, weights(), jnp.asarray([ids]), adapters=tree).logits[0]
    expected_TV = np.asarray(jax.nn.log_softmax(logits_TV))[:-1]
    expected_T = expected_TV[np.arange(len(ids) - 1), ids[1:]]
    choice = answer.choices[0]
    own = choice.logprobs
    assert own.token_logprobs[0] is own.top_logprobs[0] is None
    np.testing.assert_allclose(own.token_logprobs[1 : len(ids)], expected_T, atol=1e-4)
    best_TN = np.sort(expected_TV, axis=1)[:, :-3:-1]
    for top, best_N in zip(own.top_logprobs[1 : len(ids)], best_TN, strict=True):
        np.testing.assert_allclose(sorted(top.values(), reverse=True), best_N[: len(top)], atol=1e-4)
    assert len(own.tokens) == len(ids) + max_tokens == answer.usage.total_tokens - 1 - max_tokens
    assert choice.text.startswith(tokenizer.decode(ids)) and (choice.text == tokenizer.decode(ids)) == (not max_tokens)
    if max_tokens:
        whole = [one.model_dump() for one in answer.choices]
        ((scored, greedy),) = api.parse_logprobs({"choices": whole[:1]}, ctxlens=[5])
        assert scored == pytest.approx(expected_T[4:].sum(), abs=1e-3)
        assert greedy == bool((expected_TV[4:].argmax(1) == ids[5:]).all())
    streamed = list(complete(client, prompt=ids, echo=True, stream=True, model=name or "nano", **given))
    scores = [one for chunk in streamed for one in chunk.choices[0].logprobs.token_logprobs]
    assert scores[0] is None and scores[1:] == pytest.approx(own.token_logprobs[1:], abs=1e-4)


def test_what_usual_clients_send(client, tokenizer):
    """A history of another model's calls, Mistral's and vLLM's words, more stop strings than OpenAI allows."""
    foreign = "call_PTLP8xhu3uwZk4l3nlnrJha"
    call = {"id": foreign, "type": "function", "function": {"name": "wash", "arguments": '{"color": "red"}'}}
    told = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": foreign, "content": "1"},
    ]
    assert ask(client, told, tools=TOOLS).usage.prompt_tokens == len(render_chat(tokenizer, told, tools=TOOLS))
    chosen = ask(client, tools=TOOLS, tool_choice="any", max_tokens=120).choices[0]
    assert chosen.finish_reason in ("tool_calls", "length")
    stops = [f"never {number}" for number in range(20)]
    assert complete(client, stop=stops).choices[0].text == complete(client).choices[0].text
    begun = [*CHAT, {"role": "assistant", "content": "It"}]
    params = {"continue_final_message": True, "add_generation_prompt": False, "chat_template_kwargs": {"x": 1}}
    assert ask(client, begun, extra_body=params).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="add_generation_prompt"):
        ask(client, begun, extra_body=params | {"add_generation_prompt": True})
    push = {"logit_bias": {"2": 100}, "max_tokens": 4}
    assert complete(client, **push).choices[0].finish_reason == "stop"
    assert complete(client, **push, extra_body={"ignore_eos": True}).usage.completion_tokens == 4
    answer = client.chat.completions.with_raw_response.create(
        model="nano", messages=CHAT, max_tokens=2, reasoning_effort="low"
    )
    assert "reasoning_effort" in answer.headers["warning"]
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        complete(client, max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="stop: list should have at most 64 items"):
        complete(client, stop=["x"] * 65)


def test_adapters_are_chosen_by_model_within_a_batch(client, engine):
    names = ("nano", *ADAPTERS)
    params = {"max_tokens": 24, "logit_bias": NO_END}
    alone = {name: complete(client, model=name, **params).choices[0].text for name in names}
    assert len(set(alone.values())) == 3
    together, most = {}, 0

    def run(name):
        together[name] = complete(client, model=name, **params).choices[0].text

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        most = max(most, engine.statistics().running)
        time.sleep(0.001)
    assert together == alone and most > 1


def test_a_client_that_goes_away_frees_its_row(address, client, engine):
    wait_for(lambda: engine.statistics().running == 0)
    free = engine.statistics().free_tokens
    endless = {"max_tokens": 450, "logit_bias": NO_END}
    stream = complete(client, stream=True, **endless)
    next(iter(stream))
    stream.close()
    wait_for(lambda: engine.statistics().running == 0)
    host = urllib.parse.urlsplit(address)
    for chat in (False, True):
        connection = http.client.HTTPConnection(host.hostname, host.port)
        body = {"model": "nano", **endless, **({"messages": CHAT} if chat else {"prompt": PROMPT})}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        wait_for(lambda: engine.statistics().running == 1)
        connection.close()
        wait_for(lambda: engine.statistics().running == 0)
    assert engine.statistics().free_tokens == free
    assert engine.statistics().finished["cancelled"] >= 3


BAD = {
    "not JSON": ("completions", "{", 400, None, "invalid_json"),
    "not an object": ("completions", "[1]", 400, None, None),
    "nothing": ("chat/completions", "", 400, None, None),
    "too deep": ("chat/completions", '{"a":' * 9000, 400, None, None),
    "too long a number": ("completions", '{"model": ' + "1" * 5000 + "}", 400, None, None),
    "no model": ("completions", {"model": None}, 400, "model", "invalid_value"),
    "another model": ("chat/completions", {"model": "gpt"}, 404, "model", "model_not_found"),
    "misspelt": ("completions", {"temprature": 1}, 400, "temprature", "unknown_parameter"),
    "no messages": ("chat/completions", {"messages": []}, 400, "messages", "invalid_value"),
    "no role": (
        "chat/completions",
        {"messages": [{"content": "x"}]},
        400,
        "messages[0].role",
        "missing_required_parameter",
    ),
    "unknown role": ("chat/completions", {"messages": [{"role": "x"}]}, 400, "messages[0].role", "invalid_value"),
    "roles out of order": (
        "chat/completions",
        {"messages": [*CHAT, {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "x"}]},
        400,
        "messages[2].role",
        None,
    ),
    "an answer last": (
        "chat/completions",
        {"messages": [*CHAT, {"role": "assistant", "content": "x"}]},
        400,
        "messages[2]",
        None,
    ),
    "an image": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content[0].type",
        "invalid_value",
    ),
    "too many tools": ("chat/completions", {"tools": TOOLS[:1] * 129}, 400, "tools", "invalid_value"),
    "no such tool": (
        "chat/completions",
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        400,
        "tool_choice.function.name",
        None,
    ),
    "a choice without tools": ("chat/completions", {"tool_choice": "required"}, 400, "tool_choice", None),
    "a bad schema": (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}},
        400,
        "response_format",
        None,
    ),
    "top_logprobs alone": ("chat/completions", {"top_logprobs": 3}, 400, "top_logprobs", None),
    "too cold": ("chat/completions", {"temperature": -1}, 400, "temperature", "invalid_value"),
    "a text for a number": ("completions", {"temperature": "0"}, 400, "temperature", "invalid_value"),
    "not a number": ("completions", '{"model": "nano", "prompt": "x", "top_p": NaN}', 400, "top_p", "invalid_value"),
    "too many answers": ("completions", {"n": 9}, 400, "n", "invalid_value"),
    "too many prompts": ("completions", {"prompt": ["x"] * 20}, 400, "prompt", None),
    "too many stops": ("completions", {"stop": ["x"] * 65}, 400, "stop", "invalid_value"),
    "an empty stop": ("completions", {"stop": ""}, 400, "stop", "invalid_value"),
    "a bad bias": ("completions", {"logit_bias": {"x": 1}}, 400, "logit_bias.x", "invalid_value"),
    "a bias beyond": ("completions", {"logit_bias": {"1300": 1}}, 400, "logit_bias", None),
    "ids beyond": ("completions", {"prompt": [1300]}, 400, "prompt", "invalid_value"),
    "negative ids": ("completions", {"prompt": [1, -1]}, 400, None, "invalid_value"),
    "no prompt": ("completions", {"prompt": []}, 400, "prompt", "invalid_value"),
    "a suffix": ("completions", {"suffix": "x"}, 400, "suffix", "invalid_value"),
    "too long a prompt": ("completions", {"prompt": [5] * 512}, 400, "prompt", "context_length_exceeded"),
    "too long an answer": ("completions", {"max_tokens": 512}, 400, "prompt", "context_length_exceeded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_answered_in_the_api_s_shape(address, name):
    path, body, status, param, code = BAD[name]
    if isinstance(body, dict):
        body = json.dumps(
            {
                "model": "nano",
                "max_tokens": 3,
                **({"prompt": "x"} if path == "completions" else {"messages": CHAT}),
                **body,
            }
        )
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{address}/v1/{path}", content=body, headers=headers, trust_env=False)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"] and "\n" not in error["message"]
    if param is not None:
        assert error["param"] == param and error["message"].startswith(param.partition("[")[0].partition(".")[0]), error
    if code is not None:
        assert error["code"] == code


def test_paths_methods_and_sizes(engine, tokenizer, address):
    with httpx.Client(base_url=address, trust_env=False) as plain:
        for method, path, status in [("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)]:
            response = plain.request(method, path)
            assert response.status_code == status and response.json()["error"]["message"]
        assert plain.get("/health").json() == {"status": "ok"}
        assert "access-control-allow-origin" not in plain.get("/health", headers={"Origin": "http://x"}).headers
    with serve(engine, tokenizer, max_request_bytes=1000) as small, httpx.Client(trust_env=False) as plain:
        headers = {"Content-Type": "application/json"}
        body = json.dumps({"model": "nano", "prompt": "x" * 2000}).encode()
        for content in (body, iter([body[:700], body[700:]])):  # of a known length, and in chunks
            response = plain.post(f"{small}/v1/completions", content=content, headers=headers)
            assert response.status_code == 413, response.text
            assert response.json()["error"]["code"] == "request_too_large"


def test_the_api_key_is_wanted(engine, tokenizer):
    with serve(engine, tokenizer, api_key="söcret") as address:
        with openai_client(address) as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.body["code"] == "invalid_api_key"
        key = {"Authorization": "Bearer söcret".encode()}
        assert httpx.get(f"{address}/v1/models", headers=key, trust_env=False).status_code == 200
        assert httpx.get(f"{address}/health", trust_env=False).status_code == 200
        for path in ("/metrics", "/openapi.json", "/v1/models", "/tokenize", "/nothing"):
            assert httpx.get(f"{address}{path}", trust_env=False).status_code == 401
    with serve(engine, tokenizer, api_key=["one", "two"]) as address:
        for key, status in {"one": 200, "two": 200, "three": 401, "one,two": 401}.items():
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(f"{address}/v1/models", headers=headers, trust_env=False).status_code == status


def test_tokens_and_back(address, tokenizer):
    with httpx.Client(base_url=address, trust_env=False) as plain:
        answer = plain.post("/tokenize", json={"model": "nano", "prompt": PROMPT, "return_token_strs": True}).json()
        ids = tokenizer.encode_prompt(PROMPT)
        assert answer == {
            "count": len(ids),
            "max_model_len": plain.get("/v1/models").json()["data"][0]["max_model_len"],
            "tokens": ids,
            "token_strs": [tokenizer.piece(token) for token in ids],
        }
        assert plain.post("/detokenize", json={"tokens": ids}).json()["prompt"] == tokenizer.decode(ids, False)
        bare = plain.post("/tokenize", json={"prompt": PROMPT, "add_special_tokens": False}).json()
        assert bare["tokens"] == tokenizer.encode(PROMPT)
        messages = [{"role": "user", "content": "word5"}]
        chat = plain.post("/tokenize", json={"messages": messages}).json()
        assert chat["tokens"] == render_chat(tokenizer, messages)
        for body in ({}, {"prompt": "a", "messages": messages}, {"prompt": 5}, {"messages": []}):
            assert plain.post("/tokenize", json=body).status_code == 400
        assert plain.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
        assert plain.post("/tokenize", json={"model": "other", "prompt": ""}).status_code == 404
        refused = plain.post("/v1/embeddings", json={"model": "nano", "input": "text"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unsupported_endpoint")


class Scripted:
    """An engine that does as a test says."""

    failure, finished, cached_tokens, adapters = None, False, 0, ()

    context = CONFIG.context

    def __init__(self, *pieces, full=False):
        self.pieces, self.full, self.cancelled = pieces, full, 0

    def statistics(self):
        raise AssertionError("nobody asked")

    def submit(self, request, on_piece):
        if self.full:
            raise Busy(2.6)
        for piece in self.pieces:
            on_piece(piece)
        self.on_piece = on_piece
        return self

    def close(self, drain):
        self.on_piece(RequestOutput("", (), "cancelled"))

    def cancel(self):
        self.cancelled += 1


def test_a_full_queue_says_when_to_come_again(tokenizer):
    with serve(Scripted(full=True), tokenizer) as address, openai_client(address) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client)
        assert caught.value.response.headers["retry-after"] == "3"
        assert caught.value.body["code"] == "rate_limit_exceeded"


def test_a_full_queue_of_the_engine(client, engine):
    endless = {"max_tokens": 450, "logit_bias": NO_END, "stream": True}
    streams = [complete(client, prompt=[PROMPT] * 6, **endless) for _ in range((ROWS + WAITING) // 6)]
    with pytest.raises(openai.RateLimitError):
        complete(client, prompt=[PROMPT] * 12)
    for stream in streams:
        stream.close()
    wait_for(lambda: engine.statistics().running + engine.statistics().waiting == 0)
    assert complete(client).choices[0].text


def test_a_dead_engine_is_no_healthy_server(tokenizer):
    engine = Scripted()
    with serve(engine, tokenizer) as address:
        assert httpx.get(f"{address}/health", trust_env=False).json() == {"status": "ok"}
        engine.failure = "the engine failed: device lost"
        response = httpx.get(f"{address}/health", trust_env=False)
    assert response.status_code == 503 and "device lost" in response.json()["error"]["message"]


@pytest.mark.parametrize("chat", [False, True])
def test_an_engine_that_fails_is_an_error_and_the_server_goes_on(tokenizer, chat):
    pieces = RequestOutput("Hi", (ScoredToken(5),)), RequestOutput("", (), "error", "NaN in the logits")
    engine = Scripted(*pieces)
    with serve(engine, tokenizer) as address, openai_client(address) as client:
        call = ask if chat else complete
        with pytest.raises(openai.InternalServerError, match="NaN in the logits") as caught:
            call(client)
        assert caught.value.body["type"] == "server_error"
        with pytest.raises(openai.APIError, match="NaN in the logits"):
            list(call(client, stream=True))
        assert client.models.list() and engine.cancelled == 2


def test_malformed_calls_come_back_as_text_with_a_warning(tokenizer):
    tokens = [tokenizer.control_id("[TOOL_CALLS]"), *tokenizer.encode('[{"name": ')]
    engine = Scripted(RequestOutput('[{"name": ', tuple(ScoredToken(token) for token in tokens), "length"))
    with serve(engine, tokenizer) as address, openai_client(address) as client:
        (choice,) = ask(client, tools=TOOLS).choices
        assert choice.message.tool_calls is None and '[{"name": ' in choice.message.content
        assert len(choice.warnings) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_breaks_its_schema_after_all_says_so(tokenizer, stream):
    schema = {"type": "object", "properties": {"a": {"type": "array"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "nano", "messages": CHAT, "response_format": wanted, "stream": stream, "max_tokens": 9}
    for text, finish, breaks in (
        ('{"b":1,"b":2}', "stop", True),
        ('{"a":[1,2]}', "stop", False),
        ("{", "length", False),
    ):
        with serve(Scripted(RequestOutput(text, (ScoredToken(5),), finish)), tokenizer) as address:
            reply = httpx.post(f"{address}/v1/chat/completions", json=body, trust_env=False)
        assert ("does not fit its schema: the name 'b' comes twice" in reply.text) == breaks, reply.text


def test_arguments_that_break_their_parameters_say_so(tokenizer):
    parameters = {"type": "object", "properties": {"a": {"uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    text = '[{"name": "f", "arguments": {"a": [1, 1]}}]'
    tokens = (tokenizer.control_id("[TOOL_CALLS]"), *tokenizer.encode(text))
    engine = Scripted(RequestOutput(text, tuple(map(ScoredToken, tokens)), "stop"))
    engine.cached_tokens = 3
    with serve(engine, tokenizer) as address, openai_client(address) as client:
        answer = ask(client, tools=[tool])
    (choice,) = answer.choices
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert choice.message.tool_calls and "call 1: the arguments do not fit" in choice.warnings[0]


def test_figures_for_prometheus(engine, tokenizer):
    with serve(engine, tokenizer) as address, openai_client(address) as client:
        for _ in range(2):
            complete(client, logit_bias=NO_END, max_tokens=40)
        with pytest.raises(openai.BadRequestError):
            complete(client, n=9)
        text = httpx.get(f"{address}/metrics", trust_env=False).text
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    prompt = len(tokenizer.encode(PROMPT, bos=True))
    expected = {
        ("nemoe_requests_total", "POST", "/v1/completions", "200"): 2,
        ("nemoe_requests_total", "POST", "/v1/completions", "400"): 1,
        ("nemoe_answers_total", "length"): 2,
        ("nemoe_prompt_tokens_total",): 2 * prompt,
        ("nemoe_answer_tokens_total",): 80,
        ("nemoe_running",): 0,
        ("nemoe_waiting",): 0,
        ("nemoe_free_tokens",): engine.statistics().free_tokens,
        ("nemoe_first_token_seconds_count",): 2,
        ("nemoe_token_seconds_count",): 2,
        ("vllm:num_requests_running", "nano"): 0,
        ("vllm:num_requests_waiting", "nano"): 0,
        ("vllm:kv_cache_usage_perc", "nano"): 0,
        ("vllm:prompt_tokens_total", "nano"): 2 * prompt,
        ("vllm:generation_tokens_total", "nano"): 80,
        ("vllm:request_success_total", "length", "nano"): 2,
        ("vllm:time_to_first_token_seconds_count", "nano"): 2,
        ("vllm:request_time_per_output_token_seconds_count", "nano"): 2,
        ("vllm:prefix_cache_queries_total", "nano"): engine.statistics().prompt_tokens,
        ("vllm:prefix_cache_hits_total", "nano"): engine.statistics().cached_tokens,
    }
    assert {name: values.get(name) for name in expected} == expected


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_that_ends_too_late_is_an_error(tokenizer, chat):
    with contextlib.ExitStack() as stack:
        with serve(Scripted(RequestOutput("Hi", (ScoredToken(5),))), tokenizer, drain_seconds=0) as address:
            stream = (ask if chat else complete)(stack.enter_context(openai_client(address)), stream=True)
            assert next(iter(stream)).choices
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)


@pytest.mark.parametrize("chat", [False, True])
def test_a_response_whose_end_was_lost_is_an_error(tokenizer, chat, monkeypatch):
    monkeypatch.setattr(streaming, "LOOK_AFTER", 0.05)
    engine = Scripted(RequestOutput("Hi", (ScoredToken(5),)))
    with serve(engine, tokenizer) as address, openai_client(address) as client:
        stream = (ask if chat else complete)(client, stream=True)
        assert next(iter(stream)).choices
        engine.finished = True
        with pytest.raises(openai.APIError, match="the end of a response was lost"):
            list(stream)


def test_a_server_that_ends_refuses(tokenizer):
    with serve(Scripted(), tokenizer, closing=lambda: True) as address:
        response = httpx.get(f"{address}/health", trust_env=False)
        assert response.status_code == 503 and response.json()["error"]["code"] == "shutting_down"


BAD_FLAGS = {
    "no model": (["{tmp}/none"], "no such file or directory"),
    "no slots": (["{tmp}", "--max-num-seqs", "0"], "--max-num-seqs: expected a positive number"),
    "no adapter": (["{tmp}", "--lora-modules", "red"], "--lora-modules: expected NAME=DIR"),
    "two adapters of a name": (["{tmp}", "--lora-modules", "a=x", "--lora-modules", "a=y"], "the name a is taken"),
    "a port too many": (["{tmp}", "--port", "65536"], "--port: expected 0 to 65535"),
    "another's port": (["{tmp}", "--port", "{port}"], "Address already in use"),
    "two meshes": (["{tmp}", "--mesh", "tensor=2", "--tensor-parallel-size", "2"], "not together with --mesh"),
    "guesses": (["{tmp}", "--prompt-lookup", "--deterministic"], "not together with --deterministic"),
    "no folder": (["{tmp}", "--adapter-folder", "{tmp}/none"], "--adapter-folder {tmp}/none: no such directory"),
    "places for nothing": (["{tmp}", "--max-loras", "2"], "--max-loras: only together with --adapter-folder"),
    "no place": (["{tmp}", "--adapter-folder", "{tmp}", "--max-loras", "0"], "--max-loras: expected a positive number"),
    "no keys file": (["{tmp}", "--api-keys-file", "{tmp}/none"], "No such file"),
    "another's address": (["{tmp}", "--host", "192.0.2.1"], "--host 192.0.2.1"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_are_one_clear_line_and_exit_status_2(capsys, tmp_path, name):
    arguments, message = BAD_FLAGS[name]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"tmp": tmp_path, "port": taken.getsockname()[1]}
        assert main.main(["serve", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error and error.count("\n") == 1


def test_the_command_serves_until_it_is_told_to_end(tmp_path):
    tekken(tmp_path)
    pretrained.save_pretrained(tmp_path / "nano", CONFIG, weights(), tokenizer_from=tmp_path)
    command = [
        sys.executable,
        "-m",
        "nemoe_jax.cli.main",
        "serve",
        str(tmp_path / "nano"),
        "--port",
        "0",
        "--log-requests",
        "--deterministic",  # fewer programs
    ]
    environment = {**os.environ, "NEMOE_API_KEY": "key"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = []
        while not lines or "ready" not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
        compiled = r"compiled 2 programs in [\d.]+ s: prefill 32, decode 8; \d+ others follow while it serves"
        assert sum(bool(re.fullmatch(compiled, line.strip())) for line in lines) == 1
        assert sum(bool(re.fullmatch(r"first token [\d.]+ s after the start", line.strip())) for line in lines) == 1
        address = re.search(r"ready: nano at (http://127\.0\.0\.1:\d+)/v1", lines[-1])[1]
        with openai_client(address, "key") as client:
            stream = ask(client, stream=True, max_tokens=60, logit_bias=NO_END)
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"  # what ran has ended well
        assert process.wait(20) == 0
        rest = process.stderr.read()
        assert "POST /v1/chat/completions 200" in rest and "+ 60 tokens" in rest and "Traceback" not in rest
    finally:
        process.kill()
        process.stderr.close()


def test_a_model_is_called_as_its_directory_or_its_link(tmp_path, monkeypatch):
    (tmp_path / "step-300").mkdir()
    (tmp_path / "nemo").symlink_to(tmp_path / "step-300")
    monkeypatch.chdir(tmp_path / "nemo")
    names = [model_flags.name_of(path) for path in (f"{tmp_path}/nemo/", "../nemo", "../step-300", ".")]
    assert names == ["nemo", "nemo", "step-300", "step-300"]


def test_a_server_s_preset_holds_where_a_request_says_nothing(tokenizer):
    served = ServedModel(Scripted(), CONFIG, tokenizer, "nano", sampling=sampling.PRESETS["factual"])
    asked = CompletionRequest(model="nano", prompt="x", top_k=-1, temperature=0.9)
    (request,) = served.requests(asked, [1], 4, None, [None])
    expected = sampling.PRESETS["factual"]
    assert (request.sampling.temperature, request.sampling.top_k) == (0.9, 0)
    assert (
        request.sampling.repetition_penalty == expected.repetition_penalty and request.sampling.min_p == expected.min_p
    )
