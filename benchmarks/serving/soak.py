"""A server under load while parts of it fail at random: in the end it must answer as at the start.

    python -m benchmarks.serving.soak --minutes 20
    python -m benchmarks.serving.soak --requests 2000

Clients ask a small model of random weights for completions and chats, streamed or not, with grammars, stop strings and
log-probabilities, some with prompts that share pages; some go away in the middle. Meanwhile the decode step, the
sampler's inputs, the detokenizer, the grammar, the sharing of pages, the release of slots and what takes the outputs
fail at random. Every request must have an end, and when the
faults stop, /health says ok, no slot or page is taken, and a request gets the text that it got before.

With `--requests` nothing fails, and the cache has room for half of what all slots could use. So many requests are drawn
from a pool, each of which was asked alone before. Each must be answered, unless its client goes away, and at
temperature 0 with the text that it got alone.
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
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import tokenizers

from nemoe_jax.adapters import lora
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
POOL = 150  # different requests
MODELS = ("soak", "soak", "red", "blue")  # two adapters
SHARED = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=160))  # more than a page
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


class Asked(NamedTuple):
    """A request, whether its client goes away, and the texts that it got alone."""

    path: str
    body: dict
    leaving: bool
    alone: list[str] | None = None


def main() -> int:
    """Runs the soak; returns 1 where the server did not come out of it as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--requests", type=int, help="so many without faults, each compared with the same one alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--patience", type=int, default=60, help="seconds in which a request must have an end (default 60)"
    )
    arguments = parser.parse_args()
    logging.getLogger("nemoe_jax").setLevel(logging.CRITICAL + 1)  # each fault would be a traceback
    outcomes: Counter[str] = Counter()
    kv_tokens = 1024 if arguments.requests else 2048
    with tempfile.TemporaryDirectory() as directory, served(Path(directory), kv_tokens) as (engine, port):
        probe = {"model": "soak", "prompt": "The sky", "max_tokens": 24, "temperature": 0}
        warm_up(port)
        before = post(port, "/v1/completions", probe)[1]["choices"][0]["text"]
        stop = threading.Event()
        chances = [random.Random(arguments.seed + one) for one in range(CLIENTS)]
        if arguments.requests:
            works = [iter(beside_alone(port, arguments.requests, chances[0]))] * CLIENTS
        else:
            works = [drawn(chance) for chance in chances]
        clients = [
            threading.Thread(target=client, args=(port, work, stop, outcomes, arguments.patience)) for work in works
        ]
        with injected(random.Random(arguments.seed), outcomes) if not arguments.requests else contextlib.nullcontext():
            for one in clients:
                one.start()
            if not arguments.requests:
                time.sleep(60 * arguments.minutes)
                stop.set()
            for one in clients:
                one.join(None if arguments.requests else 2 * arguments.patience)
        problems = [f"{sum(one.is_alive() for one in clients)} clients still wait"] * any(
            one.is_alive() for one in clients
        )
        problems += [f"{number} × {name}" for name, number in outcomes.items() if "no end" in name or "wrong" in name]
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
    cached = f"prompts: {state.prompt_tokens} tokens, {state.cached_tokens} of them in the cache"
    print(f"{cached}; {state.answer_tokens} generated")
    print("; ".join(problems) or "in the end the engine answers as before")
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
def served(directory: Path, kv_tokens: int):
    """A server with the small model: its engine and port."""
    tokenizer = write_tokenizer(directory)
    params = schema.initialize(CONFIG, jax.random.key(0))
    adapters = {name: adapter(seed) for seed, name in enumerate(sorted({*MODELS} - {"soak"}), 1)}
    options = {"max_num_seqs": 4, "kv_tokens": kv_tokens, "max_queued": 16, "prompt_lookup": True}
    engine = Engine(CONFIG, params, tokenizer, adapters=adapters, **options)
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


def adapter(seed: int):
    """A LoRA adapter that changes answers."""
    tree = lora.initialize(CONFIG, [lora.Target("blocks/dense/*/*", rank=3, alpha=12)], jax.random.key(seed))
    return jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(seed + 9), leaf.shape), tree)


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


def drawn(chance: random.Random) -> Iterator[Asked]:
    """Requests without end."""
    while True:
        body = {
            "model": chance.choice(MODELS),
            "max_tokens": chance.choice((1, 8, 40, 120)),
            "temperature": chance.choice((0, 1)),
            "seed": chance.randrange(1000),
            "stream": chance.random() < 0.5,
            "stop": chance.choice((None, ["ab", "zz"])),
            "n": chance.choice((1, 1, 2)),
        }
        path = chance.choice(("/v1/completions", "/v1/chat/completions"))
        own = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=chance.choice((1, 30, 100))))
        text = chance.choice(("", SHARED)) + own
        if path == "/v1/completions":
            body |= {"prompt": text, "logprobs": chance.choice((None, 3))}
        else:
            body["messages"] = [{"role": "user", "content": text}]
            if chance.random() < 0.5:
                body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
        given = {key: value for key, value in body.items() if value is not None}
        yield Asked(path, given, chance.random() < 0.1)


def beside_alone(port: int, count: int, chance: random.Random) -> list[Asked]:
    """So many requests out of a pool, with what each gets alone."""
    pool = []
    for asked in islice(drawn(chance), POOL):
        status, body = post(port, asked.path, {**asked.body, "stream": False})
        assert status == 200, body
        pool.append(asked._replace(alone=texts_of([body])))
    return [one._replace(leaving=chance.random() < 0.1) for one in chance.choices(pool, k=count)]


def client(port: int, work: Iterator[Asked], stop: threading.Event, outcomes: Counter[str], patience: int) -> None:
    """Asks, one request after another."""
    for asked in work:
        if stop.is_set():
            break
        try:
            outcome, texts = ask(port, asked, patience)
            while outcome == "status 429" and asked.alone:
                outcome, texts = ask(port, asked, patience)
        except TimeoutError:
            outcome = f"no end: {asked.path} {'streamed' if asked.body['stream'] else 'whole'}"
        except (OSError, http.client.HTTPException) as error:
            outcome = f"no end: {error!r:.60}"
        else:
            if asked.alone and texts is None and not asked.leaving:
                outcome = f"wrong: {outcome}"
            elif asked.alone and texts is not None and asked.body["temperature"] == 0:
                outcome += ", as alone" if texts == asked.alone else f", wrong: {texts} for {asked.alone}"
        outcomes[outcome] += 1


def ask(port: int, asked: Asked, patience: int) -> tuple[str, list[str] | None]:
    """One request: how it ended, and the texts of a whole response."""
    body, leaving = asked.body, asked.leaving
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=patience)
    try:
        connection.request("POST", asked.path, json.dumps(body), {"Content-Type": "application/json"})
        if leaving and not body["stream"]:
            return "client went away", None
        response = connection.getresponse()
        if leaving:
            response.read(10)
            return "client went away", None
        data = response.read()
        if response.status == 429:
            time.sleep(0.2)
        if response.status != 200:
            return f"status {response.status}", None
        if not body["stream"]:
            return "status 200", texts_of([json.loads(data)])
        if not data.endswith(b"data: [DONE]\n\n"):
            return "no end: a stream without [DONE]", None
        if b'"error"' in data:
            return "streamed: error", None
        chunks = data.decode("utf-8").replace("data: [DONE]", "").split("\n\n")
        return "streamed: whole", texts_of([json.loads(chunk[6:]) for chunk in chunks if chunk])
    finally:
        connection.close()


def texts_of(bodies: list[dict]) -> list[str]:
    """The texts of a response's choices, from all of its chunks."""
    texts: dict[int, str] = {}
    for choice in (choice for body in bodies for choice in body["choices"]):
        said = choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + said
    return [text for _, text in sorted(texts.items())]


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
