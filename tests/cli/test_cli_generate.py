"""`nemoe generate`: its prompts, its sampling parameters, its batches, as a user gives them."""

import io
import json
import shutil
import sys

import jax
import numpy as np
import pytest

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.cli import main, sampling_flags
from nemoe_jax.inference import sampling_fields
from nemoe_jax.inference.sampling import PRESETS, SamplingParams
from nemoe_jax.text.chat import render
from nemoe_jax.text.tokenizers.load import load_tokenizer
from nemoe_jax.utils.command import Command
from tests.support.command_models import write_model
from tests.support.compiled import forward

CONTEXT = 512
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "moe", context=CONTEXT)


@pytest.fixture(scope="module")
def continuation(model):
    """The likeliest tokens after some, by the whole forward pass for each."""
    config, params = pretrained.load_pretrained(model)
    logits = jax.jit(lambda tokens: forward(config, params, tokens).logits[0])

    def continued(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(logits(padded)[len(tokens) - 1].argmax()))
        return tokens[len(prompt) :]

    return continued


def run(capsys, *arguments):
    status = main.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def generated(capsys, model, *arguments):
    status, out, _ = run(capsys, "generate", model, *arguments, "--max-new-tokens", 5, "--json")
    assert status == 0
    return json.loads(out)


@pytest.fixture
def standard_input(monkeypatch):
    def holds(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))

    return holds


def test_all_ways_to_give_a_prompt(capsys, model, tmp_path, standard_input, continuation):
    tokenizer = load_tokenizer(model)
    prompt = tokenizer.encode("Grüße\nHello", bos=True)
    expected = continuation(prompt, 5)
    (tmp_path / "prompt.txt").write_text("Grüße\nHello\n", encoding="utf-8")
    standard_input("Grüße\nHello\n")
    for source in (["--prompt", "Grüße\nHello"], ["--file", tmp_path / "prompt.txt"], ["-"]):
        figures = generated(capsys, model, *source)
        assert figures["tokens"] == expected and figures["text"] == tokenizer.decode(expected)
        assert figures["prompt_tokens"] == len(prompt) and figures["finish_reason"] == "length"
    (tmp_path / "chat.json").write_text(json.dumps(MESSAGES))
    figures = generated(capsys, model, "--chat", tmp_path / "chat.json")
    assert figures["tokens"] == continuation(render.render_chat(tokenizer, MESSAGES), 5)


def test_log_probabilities(capsys, model):
    figures = generated(capsys, model, "--prompt", "Hello", "--logprobs", 2)
    config, params = pretrained.load_pretrained(model)
    tokenizer = load_tokenizer(model)
    prompt = tokenizer.encode("Hello", bos=True)
    logits = forward(config, params, np.array([prompt + figures["tokens"]])).logits[0]
    logprobs = np.asarray(jax.nn.log_softmax(logits))[len(prompt) - 1 :]
    assert [scored["token"] for scored in figures["logprobs"]] == figures["tokens"]
    for scored, logprobs_V in zip(figures["logprobs"], logprobs, strict=False):
        assert scored["logprob"] == pytest.approx(logprobs_V[scored["token"]], abs=1e-4)
        assert [top["token"] for top in scored["top"]] == np.argsort(-logprobs_V)[:2].tolist()
        assert scored["piece"] == tokenizer.piece(scored["token"])


def test_a_stop_text_ends_the_answer(capsys, model):
    text = generated(capsys, model, "--prompt", "Hello")["text"]
    figures = generated(capsys, model, "--prompt", "Hello", "--stop", "never", "--stop", text[2:4])
    assert figures["text"] == text[: text.index(text[2:4])] and figures["finish_reason"] == "stop"


ONE_OF = {"type": "string", "enum": ["Oslo", "Rome"]}
SCHEMA = {"type": "object", "properties": {"city": ONE_OF}, "required": ["city"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": SCHEMA}}]


def test_calls_of_tools_and_answers_by_a_schema(capsys, model, tmp_path):
    chosen = {"type": "function", "function": {"name": "weather"}}
    lines = [
        {"messages": MESSAGES, "tools": TOOLS, "tool_choice": chosen},
        {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none", "max_new_tokens": 3},
        {"prompt": "x", "schema": ONE_OF},
    ]
    batch = ["--batch", write_batch(tmp_path / "in.jsonl", lines), "--output", "-", "--max-new-tokens", 100]
    status, out, _ = run(capsys, "generate", model, *batch)
    called, free, by_schema = [json.loads(line) for line in out.splitlines()]
    (call,) = called["tool_calls"]
    assert status == 0 and call["function"]["name"] == "weather" and called["text"] == ""
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    assert free["tool_calls"] == [] and "tool_calls" not in by_schema
    assert json.loads(by_schema["text"]) in ("Oslo", "Rome")

    (tmp_path / "chat.json").write_text(json.dumps(lines[0]))
    asked = ["--chat", tmp_path / "chat.json", "--tool-choice", "weather", "--max-new-tokens", 100]
    assert json.loads(run(capsys, "generate", model, *asked)[1])["function"] == call["function"]


def sampling_of(*arguments, default=None):
    parsed = []
    command = Command("nemoe", "")
    sampling_flags.add_flags(command.add("generate", parsed.append, ""), default)
    assert command.main(["generate", *arguments]) == 0
    return sampling_flags.from_flags(*parsed)


FLAGS = {
    "--temperature": ("0.5", {"temperature": 0.5}),
    "--top-k": ("7", {"top_k": 7}),
    "--top-p": ("0.9", {"top_p": 0.9}),
    "--min-p": ("0.1", {"min_p": 0.1}),
    "--repetition-penalty": ("1.2", {"repetition_penalty": 1.2}),
    "--presence-penalty": ("-1", {"presence_penalty": -1.0}),
    "--frequency-penalty": ("1", {"frequency_penalty": 1.0}),
    "--logit-bias": ("5=-100", {"logit_bias": ((5, -100.0),)}),
    "--seed": ("3", {"seed": 3}),
}


@pytest.mark.parametrize("flag", FLAGS)
def test_every_parameter_has_a_flag_a_setting_and_a_field(flag):
    text, expected = FLAGS[flag]
    name = flag.removeprefix("--").replace("-", "_")
    expected = SamplingParams(**expected)
    assert sampling_of(f"{flag}={text}") == sampling_fields.from_text(SamplingParams(), name, text) == expected
    value = {"5": -100} if flag == "--logit-bias" else getattr(expected, name)
    assert sampling_fields.from_fields(SamplingParams(), {name: value}) == expected


def test_there_are_no_other_parameters():
    assert [flag.removeprefix("--").replace("-", "_") for flag in FLAGS] == list(vars(SamplingParams()))
    assert list(sampling_fields.SAMPLING_FIELDS) == list(vars(SamplingParams()))


def test_explicit_flags_win_over_a_preset():
    creative = PRESETS["creative"]
    assert sampling_of("--sampling-preset", "creative") == sampling_of("--preset", "creative") == creative
    assert sampling_of(default="nemo") == PRESETS["nemo"]
    chosen = sampling_of("--temperature", "0", "--sampling-preset", "creative", "--seed", "4")
    assert chosen == SamplingParams(min_p=creative.min_p, repetition_penalty=creative.repetition_penalty, seed=4)
    assert sampling_fields.from_fields(SamplingParams(seed=5), {"preset": "nemo"}) == SamplingParams(
        temperature=0.3, seed=5
    )


def test_generation_config_gives_end_tokens_and_sampling(capsys, model, continuation, tmp_path):
    """The likeliest tokens up to the new end token, as long as the file may speak."""
    prompt = load_tokenizer(model).encode_prompt("The sky is blue")
    expected = continuation(prompt, 5)
    end = next(at for at in range(1, 5) if expected[at] not in expected[:at])
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    values = {"eos_token_id": [2, expected[end]], "do_sample": True, "temperature": 50.0, "top_p": 0.9}
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    arguments = ["generate", tmp_path, "--prompt", "The sky is blue", "--max-new-tokens", 5, "--json"]

    status, out, err = run(capsys, *arguments, "--temperature", 0)
    assert status == 0
    assert (json.loads(out)["tokens"], json.loads(out)["finish_reason"]) == (expected[:end], "stop")
    assert f"generation_config.json: top_p 0.9, end tokens 2, {expected[end]} (--generation-config none" in err
    _, out, err = run(capsys, *arguments, "--generation-config", "none")
    assert (json.loads(out)["tokens"], json.loads(out)["finish_reason"]) == (expected, "length")
    assert "generation_config" not in err
    _, out, err = run(capsys, *arguments)
    assert json.loads(out)["tokens"] != expected[:end] and "temperature 50, top_p 0.9" in err
    _, out, err = run(capsys, *arguments, "--sampling-preset", "nemo", "--temperature", 0)
    assert json.loads(out)["tokens"] == expected[:end] and "top_p" not in err  # a preset was asked for


BATCH = [
    {"prompt": "Hello", "id": "first"},
    {"messages": MESSAGES, "max_new_tokens": 3, "logprobs": 1},
    {"prompt": "Hello", "temperature": 2.0, "seed": 9},
    {"prompt": "Hello", "stop": "e", "preset": "creative"},
    {"prompt": "A somewhat longer prompt", "max_new_tokens": 7},
]


def write_batch(path, lines=BATCH):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_a_batch_is_answered_in_order_and_goes_on_where_it_stopped(capsys, model, tmp_path, standard_input):
    source, target = write_batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    command = ["generate", model, "--max-new-tokens", 5, "--max-num-seqs", 2, "--batch"]
    assert run(capsys, *command, source, "--output", target)[:2] == (0, "")
    whole = target.read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [answer["line"] for answer in answers] == [1, 2, 3, 4, 5]
    assert answers[0]["id"] == "first" and "id" not in answers[1]
    assert [len(answer["tokens"]) for answer in answers[:3]] == [5, 3, 5] and len(answers[4]["tokens"]) == 7
    assert len(answers[1]["logprobs"][0]["top"]) == 1 and "logprobs" not in answers[0]
    assert answers[2]["tokens"] != answers[0]["tokens"]
    # the same as one by one
    assert generated(capsys, model, "--prompt", "Hello")["tokens"] == answers[0]["tokens"]
    alone = generated(capsys, model, "--prompt", "Hello", "--temperature", 2, "--seed", 9)
    assert alone["tokens"] == answers[2]["tokens"]

    second = whole.index(b"\n") + 1
    for kept in (whole[: second + 9], whole):  # killed in the second line; complete
        target.write_bytes(kept)
        assert run(capsys, *command, source, "--output", target)[0] == 0
        assert target.read_bytes() == whole

    standard_input(source.read_text())
    assert run(capsys, *command, "-", "--output", "-")[1].encode() == whole


def test_a_batch_of_another_model_is_not_continued(capsys, model, tmp_path):
    source, target = write_batch(tmp_path / "in.jsonl", [{"prompt": "Hello"}]), tmp_path / "out.jsonl"
    assert run(capsys, "generate", model, "--max-new-tokens", 2, "--batch", source, "--output", target)[0] == 0
    before = target.read_bytes()
    config, params = pretrained.load_pretrained(model)
    params["norm"] = -params["norm"]
    pretrained.save_pretrained(tmp_path / "other", config, params, tokenizer_from=model)
    shutil.copytree(model, tmp_path / "endings")
    (tmp_path / "endings" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    for changed in (
        [tmp_path / "other", "--max-new-tokens", 2],
        [model, "--max-new-tokens", 3],
        [model, "--max-new-tokens", 2, "--kv-cache", "int8"],
        [model, "--max-new-tokens", 2, "--dtype", "bfloat16"],
        [tmp_path / "endings", "--max-new-tokens", 2],
    ):
        status, _, err = run(capsys, "generate", *changed, "--batch", source, "--output", target)
        assert status == 2 and "no response of this model" in err and target.read_bytes() == before


BAD_LINES = {
    "no JSON": ("Hello", "in.jsonl:2: expected a JSON object, got 'Hello'"),
    "no object": ("[1]", "in.jsonl:2: expected a JSON object, got '[1]'"),
    "nothing asked": ("{}", 'in.jsonl:2: expected either a "prompt" or "messages"'),
    "both": ('{"prompt": "x", "messages": []}', 'expected either a "prompt" or "messages"'),
    "no text": ('{"prompt": 1}', "in.jsonl:2: prompt: expected a string, got 1"),
    "no messages": ('{"messages": []}', "in.jsonl:2: messages: expected a list of at least one object"),
    "unknown key": (
        '{"prompt": "x", "temprature": 1}',
        "in.jsonl:2: unknown key 'temprature'; expected frequency_penalty",
    ),
    "too hot": ('{"prompt": "x", "temperature": 101}', "in.jsonl:2: temperature: expected a number from 0 to 100"),
    "no number": ('{"prompt": "x", "top_k": true}', "in.jsonl:2: top_k: expected a whole number"),
    "no preset": ('{"prompt": "x", "preset": "dull"}', "in.jsonl:2: preset: expected one of nemo, factual"),
    "no bias": ('{"prompt": "x", "logit_bias": {"a": 1}}', "in.jsonl:2: logit_bias: expected TOKEN=BIAS"),
    "no schema": ('{"prompt": "x", "schema": {"type": 1}}', "in.jsonl:2: schema"),
    "no tool": ('{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', "in.jsonl:2: tools[0]"),
    "no such token": (
        '{"prompt": "x", "logit_bias": {"400": 1}}',
        "logit_bias: expected tokens from 0 to 399, got 400",
    ),
    "no tokens": ('{"prompt": "x", "max_new_tokens": 0}', "in.jsonl:2: max_new_tokens: expected an integer of at"),
    "no stop": ('{"prompt": "x", "stop": ["y", 1]}', "in.jsonl:2: stop: expected a string or a list of strings"),
    "too many logprobs": ('{"prompt": "x", "logprobs": 21}', "in.jsonl:2: logprobs: expected 0 to 20, got 21"),
    "too long": (
        json.dumps({"prompt": "x" * 511}),
        "in.jsonl:2: prompt of 512 tokens + 5 new tokens exceed the context",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_found_before_anything_is_done(capsys, model, tmp_path, name):
    line, message = BAD_LINES[name]
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "x"}}\n{line}\n')
    arguments = ["--batch", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", 5]
    status, _, err = run(capsys, "generate", model, *arguments)
    assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out.jsonl").exists()


OTHER_WORK = {
    "not an answer": "notes\n",
    "another batch": '{"line": 1, "prompt_tokens": 77}\n',
    "other lines": '{"line": 2, "prompt_tokens": 6}\n',
    "more lines": "".join(f'{{"line": {number}}}\n' for number in range(1, 7)),
}


@pytest.mark.parametrize("name", OTHER_WORK)
def test_the_answers_of_other_work_are_left_alone(capsys, model, tmp_path, name):
    (tmp_path / "out.jsonl").write_text(OTHER_WORK[name])
    arguments = ["--batch", write_batch(tmp_path / "in.jsonl"), "--output", tmp_path / "out.jsonl"]
    status, _, err = run(capsys, "generate", model, "--max-new-tokens", 5, *arguments)
    assert status == 2 and "is no response of this model to what the batch asks there" in err and err.count("\n") == 1
    assert (tmp_path / "out.jsonl").read_text() == OTHER_WORK[name]


BAD = {
    "batch without output": (["--batch", "in.jsonl"], "--batch IN.jsonl and --output OUT.jsonl go together"),
    "output without batch": (["--prompt", "x", "--output", "y"], "--batch IN.jsonl and --output OUT.jsonl go together"),
    "no batch": (["--batch", "none.jsonl", "--output", "y"], "none.jsonl: No such file or directory"),
    "no file": (["--file", "none.txt"], "none.txt: No such file or directory"),
    "no slots": (["--prompt", "x", "--max-num-seqs", "0"], "--max-num-seqs: expected a positive number, got 0"),
    "unseen logprobs": (["--prompt", "x", "--logprobs", "1"], "--logprobs: needs --json or --batch"),
    "negative logprobs": (["--prompt", "x", "--logprobs", "-1"], "--logprobs: expected 0 or more, got -1"),
    "tools without a chat": (["--prompt", "x", "--tool-choice", "auto"], "--tool-choice: needs --chat"),
    "no schema": (["--prompt", "x", "--schema", "none.json"], "none.json: No such file or directory"),
    "many logprobs": (["--prompt", "x", "--logprobs", "21", "--json"], "logprobs: expected 0 to 20, got 21"),
    "empty stop": (["--prompt", "x", "--stop", ""], "stop: expected strings that are not empty"),
    "no bias": (["--prompt", "x", "--logit-bias", "5"], "logit_bias: expected TOKEN=BIAS, such as 5=-100, got '5'"),
    "no such token": (["--prompt", "x", "--logit-bias", "400=1"], "logit_bias: expected tokens from 0 to 399, got 400"),
    "min-p": (["--prompt", "x", "--min-p", "2"], "min_p: expected a number from 0 to 1, got 2"),
    "too long": (["--prompt", "x" * 511], "prompt of 512 tokens + 5 new tokens exceed the context of 512"),
    "no adapter": (["--prompt", "x", "--adapter", "/none"], "/none: no such directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_exit_status_2(capsys, model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    arguments, message = BAD[name]
    status, out, err = run(capsys, "generate", model, "--max-new-tokens", "5", *arguments)
    assert status == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_no_numbers(capsys, tmp_path):
    directory = write_model(tmp_path / "broken")
    config, params = pretrained.load_pretrained(directory)
    params["norm"] = params["norm"] * np.float32(3e38)  # finite, but no sum of them
    pretrained.save_pretrained(tmp_path / "infinite", config, params, tokenizer_from=directory)
    status, out, err = run(capsys, "generate", tmp_path / "infinite", "--prompt", "x", "--max-new-tokens", 5)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    batch = ["--batch", write_batch(tmp_path / "in.jsonl", BATCH[:2]), "--output", tmp_path / "out.jsonl"]
    status, _, err = run(capsys, "generate", tmp_path / "infinite", *batch, "--max-new-tokens", 5)
    assert status == 2 and "2 of 2 lines got an error, line 1 the first" in err
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [set(answer) for answer in answers] == [{"line", "id", "error", "key"}, {"line", "error", "key"}]
