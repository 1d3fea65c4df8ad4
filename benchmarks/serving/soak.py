"""A server under load while parts of it fail at random: in the end it must answer as at the start.

    python -m benchmarks.serving.soak --minutes 20

Clients ask a small model of random weights for completions and chats, streamed or not, with grammars, stop strings and
log-probabilities, some with prompts that share pages; some go away in the middle. Meanwhile the decode step, the
sampler's inputs, the detokenizer, the grammar, the sharing of pages, the release of slots and what takes the outputs
fail at random. Every request must have an end, and when the
faults stop, /health says ok, no slot or page is taken, and a request gets the text that it got before.
"""

import argparse
import contextlib
import http.client
import json
import logging
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import jax
import tokenizers

from nemoe_jax.serving.api.app import create_app
from nemoe_jax.serving.api.http_server import HttpServer, bind
from nemoe_jax.serving.api.served_model import ServedModel
from nemoe_jax.serving.api.streaming import EngineStreams
from nemoe_jax.serving.engine import scheduler
from nemoe_jax.serving.engine.engine import Engine
from nemoe_jax.serving.engine.runner import ModelRunner
from nemoe_jax.serving.engine.slots import Slots
from nemoe_jax.serving.structured.grammar import Grammar
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.text.tokenizers.load import Tokenizer, load_tokenizer
from nemoe_jax.text.tokenizers.streaming import StreamDecoder

CONFIG = ModelConfig(
    family="mistral",
    layers=2,
    hidden=24,
    heads=6,
    kv_heads=2,
    head_dim=10,
    ffn=48,
    vocab=320,  # rows beyond the tokenizer's
    context=512,
    dtype="float32",
)
FAULTS = {  # what fails, and how often
    "decode": (ModelRunner, "decode", 0.003),
    "prefill": (ModelRunner, "prefill", 0.003),
    "sampler": (scheduler, "controls", 0.003),
    "detokenizer": (StreamDecoder, "push", 0.001),
    "detokenizer's end": (StreamDecoder, "flush", 0.01),
    "grammar's mask": (Grammar, "allowed", 0.002),
    "grammar": (Grammar, "accept", 0.002),
    "shared pages": (Slots, "reuse", 0.003),
    "published pages": (Slots, "publish", 0.003),
    "published responses": (Slots, "publish_response", 0.003),
    "release": (Slots, "release", 0.01),
    "client": (EngineStreams, "_take", 0.002),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
CLIENTS = 12
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


def main() -> int:
    """Runs the soak; returns 1 where the server did not come out of it as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patience", type=int, default=60, help="seconds in which a request must have an end (default 60)"
    )
    arguments = parser.parse_args()
    logging.getLogger("nemoe_jax").setLevel(logging.CRITICAL + 1)  # each fault would be a traceback
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory, served(Path(directory)) as (engine, port):
        probe = {"model": "soak", "prompt": "The sky", "max_tokens": 24, "temperature": 0}
        warm_up(port)
        before = post(port, "/v1/completions", probe)[1]["choices"][0]["text"]
        stop = threading.Event()
        clients = [
            threading.Thread(
                target=client, args=(port, random.Random(arguments.seed + one), stop, outcomes, arguments.patience)
            )
            for one in range(CLIENTS)
        ]
        with injected(random.Random(arguments.seed), outcomes):
            for one in clients:
                one.start()
            time.sleep(60 * arguments.minutes)
            stop.set()
            for one in clients:
                one.join(2 * arguments.patience)
        problems = [f"{sum(one.is_alive() for one in clients)} clients still wait"] * any(
            one.is_alive() for one in clients
        )
        problems += [f"{number} × {name}" for name, number in outcomes.items() if name.startswith("no end")]
        time.sleep(1)
        state = engine.statistics()
        if (state.running, state.waiting, state.free_tokens) != (0, 0, state.tokens):
            problems.append(f"left behind: {state}")
        if (health := get(port, "/health")) != (200, {"status": "ok"}):
            problems.append(f"/health: {health}")
        status, body = post(port, "/v1/completions", probe)
        if status != 200 or body["choices"][0]["text"] != before:
            problems.append(f"another answer than before: {status} {body}")
    for name, number in sorted(outcomes.items()):
        print(f"{number:8d}  {name}")
    print("; ".join(problems) or f"after {arguments.minutes:g} minutes the engine answers as before")
    return bool(problems)


def warm_up(port: int) -> None:
    """Compiles what requests need, which on a busy machine takes longer than a client has patience."""
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    chat = {"model": "soak", "messages": [{"role": "user", "content": "y"}], "max_tokens": 40}
    for length in (1, 30, 100, 200):
        post(port, "/v1/completions", {"model": "soak", "prompt": "x" * length, "max_tokens": 8, "temperature": 1})
    for more in ({}, {"logprobs": True}, {"response_format": schema}, {"response_format": schema, "logprobs": True}):
        post(port, "/v1/chat/completions", {**chat, **more, "temperature": 1})


@contextlib.contextmanager
def served(directory: Path):
    """A server with the small model: its engine and port."""
    tokenizer = write_tokenizer(directory)
    params = schema.initialize(CONFIG, jax.random.key(0))
    engine = Engine(CONFIG, params, tokenizer, max_num_seqs=4, kv_tokens=2048, max_queued=16, prompt_lookup=True)
    engine.compile()  # on a busy machine it takes longer than a client has patience
    model = ServedModel(engine, CONFIG, tokenizer, "soak", max_answers=20)
    server = HttpServer(5, abort=lambda: engine.close(drain=False))
    with bind("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        thread = threading.Thread(target=server.serve_app, args=(create_app(model), bound))
        thread.start()
        try:
            while not getattr(server, "started", False):
                time.sleep(0.05)
            yield engine, port
        finally:
            server.should_exit = True
            thread.join()
            engine.close(drain=False)


def write_tokenizer(directory: Path) -> Tokenizer:
    """Single bytes, and the control tokens of a chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: number for number, piece in enumerate([*names, *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(names)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


@contextlib.contextmanager
def injected(chance: random.Random, outcomes: Counter[str]):
    """Makes the parts of `FAULTS` fail at random."""
    with contextlib.ExitStack() as stack:
        for name, (owner, attribute, share) in FAULTS.items():
            stack.enter_context(failing(name, owner, attribute, share, chance, outcomes))
        yield


@contextlib.contextmanager
def failing(name, owner, attribute, share, chance, outcomes):
    """Makes one function fail at random, before its work or after it."""
    original = getattr(owner, attribute)

    def function(*args, **kwargs):
        drawn = chance.random()
        if drawn < share / 2:
            outcomes[f"fault: {name}"] += 1
            raise RuntimeError(f"fault before {name}")
        result = original(*args, **kwargs)
        if drawn < share:
            outcomes[f"fault: {name}"] += 1
            raise RuntimeError(f"fault after {name}")
        return result

    setattr(owner, attribute, function)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


def client(port: int, chance: random.Random, stop: threading.Event, outcomes: Counter[str], patience: int) -> None:
    """Asks, one request after another."""
    while not stop.is_set():
        body = {
            "model": "soak",
            "max_tokens": chance.choice((1, 8, 40, 120)),
            "temperature": chance.choice((0, 1)),
            "seed": chance.randrange(1000),
            "stream": chance.random() < 0.5,
            "stop": chance.choice((None, ["ab", "zz"])),
            "n": chance.choice((1, 1, 2)),
        }
        path = chance.choice(("/v1/completions", "/v1/chat/completions"))
        if path == "/v1/completions":
            body |= {"prompt": "x" * chance.choice((1, 30, 200)), "logprobs": chance.choice((None, 3))}
        else:
            body["messages"] = [{"role": "user", "content": "y" * chance.choice((1, 100))}]
            if chance.random() < 0.5:
                body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        leaving = chance.random() < 0.1
        try:
            given = {key: value for key, value in body.items() if value is not None}
            outcomes[ask(port, path, given, leaving, patience)] += 1
        except TimeoutError:
            outcomes[f"no end: {path} {'streamed' if body['stream'] else 'whole'}"] += 1
        except (OSError, http.client.HTTPException) as error:
            outcomes[f"no end: {error!r:.60}"] += 1


def ask(port: int, path: str, body: dict, leaving: bool, patience: int) -> str:
    """One request: how it ended."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=patience)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        if leaving and not body["stream"]:
            return "client went away"
        response = connection.getresponse()
        if leaving:
            response.read(10)
            return "client went away"
        data = response.read()
        if response.status == 429:
            time.sleep(0.2)
        if body["stream"] and response.status == 200:
            if not data.endswith(b"data: [DONE]\n\n"):
                return "no end: a stream without [DONE]"
            return "streamed: " + ("error" if b'"error"' in data else "whole")
        return f"status {response.status}"
    finally:
        connection.close()


def post(port: int, path: str, body: dict) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def get(port: int, path: str) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


if __name__ == "__main__":
    sys.exit(main())
