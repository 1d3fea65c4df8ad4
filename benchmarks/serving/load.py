"""`nemoe serve` under load: hundreds of streams at once, of random lengths, some of which are abandoned midway.

    python -m benchmarks.serving.load                 (a small model of random weights, a few minutes on CPU)
    python -m benchmarks.serving.load DIR --slots 32   (a model directory)

Each request is first asked alone, then all of them at once, each as a stream. Nothing may be lost (every stream ends,
with a reason and [DONE]), mixed up (each response is the one that it got alone: temperature 0) or leaked (slots and
pages of the cache are all free in the end, though every tenth client went away in the middle). It prints the tokens per
second of all streams together, the time to the first token and the time per token after it, as percentiles, and exits
with status 1 where anything is wrong. The time to start, to the first response, and until all programs are compiled
stand apart: what is timed begins after that.

The queue has room for all, so the time to the first token is mostly waiting for a slot: what a stream costs once it has
one is the time per token.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.lib.results import add_keep, keep, machine

LEAVING = 10  # every so-many-th client goes away midway
PROMPT, ANSWER = (4, 200), (8, 160)  # tokens, at least and at most
FIRST_ID = 300  # of the prompts' random tokens: behind the control tokens and the bytes
GAUGES = ("nemoe_running", "nemoe_waiting", "nemoe_free_tokens")
PERCENTILES = (50, 90, 99)
PREPARE = """
import sys
from pathlib import Path
import jax
from nemoe_jax.checkpoints.pretrained import save_pretrained
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.text.tokenizers.load import cut_tekken
config = ModelConfig(
    family="mixtral", hidden=128, layers=4, heads=4, kv_heads=2, head_dim=32, experts=8, top_k=2, expert_ffn=128,
    vocab=4096, context=1024, dtype="float32",
)
directory = Path(sys.argv[1])
save_pretrained(directory, config, schema.initialize(config, jax.random.key(0), config.dtype))
cut_tekken(sys.argv[2], directory / "tekken.json", config.vocab)
"""
DEVICE = "import jax; print(jax.local_devices()[0].device_kind)"


class Wanted(NamedTuple):
    """A request, and after how many chunks its client goes away."""

    body: dict[str, Any]
    leaves_after: int | None


class Got(NamedTuple):
    """What came of it; seconds from the request on."""

    text: str
    finish: str | None
    done: bool
    tokens: int
    first: float
    last: float


def requests(model: str, vocab: int, count: int) -> list[Wanted]:
    """Random prompts and lengths, the same each time."""
    random = np.random.default_rng(0)
    wanted = []
    for at in range(count):
        prompt = random.integers(FIRST_ID, vocab, random.integers(*PROMPT)).tolist()
        body = {"model": model, "prompt": prompt, "max_tokens": int(random.integers(*ANSWER)), "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        wanted.append(Wanted(body, int(random.integers(1, 4)) if at % LEAVING == LEAVING - 1 else None))
    return wanted


@contextlib.contextmanager
def server(command: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The base URL and the process id of a server of its own process, which must end well."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            if "ready" in line:
                break
        else:
            raise SystemExit(f"the server ended with status {process.wait()}")
        yield line.rpartition(" at ")[2].strip().removesuffix("/v1"), process.pid
        process.send_signal(signal.SIGTERM)
        print(process.stderr.read(), end="", file=sys.stderr)
        if process.wait(60):
            raise SystemExit(f"the server ended with status {process.returncode}")
    finally:
        process.kill()


async def stream(client: httpx.AsyncClient, wanted: Wanted, leaves: bool) -> Got:
    """One response as it comes."""
    text, finish, done, tokens, chunks = "", None, False, 0, 0
    started = time.perf_counter()
    first = last = 0.0
    async with client.stream("POST", "/v1/completions", json=wanted.body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line:
                continue
            if line == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                finish = f"error: {chunk['error']['message']}"
                continue
            if chunk["choices"]:
                last = time.perf_counter() - started
                first = first or last
                text += chunk["choices"][0]["text"]
                finish = chunk["choices"][0]["finish_reason"] or finish
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            chunks += 1
            if leaves and chunks == wanted.leaves_after:
                break
    return Got(text, finish, done, tokens, first, last)


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """What the server says of its slots and its cache."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return {sample.name: sample.value for family in families for sample in family.samples if sample.name in GAUGES}


async def compiled(client: httpx.AsyncClient) -> None:
    """Waits until our server has compiled everything."""
    while "nemoe_to_compile 0.0" not in (await client.get("/metrics")).text:
        await asyncio.sleep(1)


async def measure(address: str, options: argparse.Namespace, vocab: int) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what was wrong."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits, trust_env=False) as client:
        wanted = requests("model", vocab, options.streams)
        before = await gauges(client)
        started = time.perf_counter()
        first = await stream(client, wanted[0], leaves=False)
        await compiled(client)
        compiling = time.perf_counter() - started
        started = time.perf_counter()
        alone = [await stream(client, one, leaves=False) for one in wanted]
        alone_seconds = time.perf_counter() - started
        print(f"alone: {sum(got.tokens for got in alone) / alone_seconds:.0f} tokens/s", file=sys.stderr)
        started = time.perf_counter()
        together = await asyncio.gather(*(stream(client, one, leaves=True) for one in wanted))
        seconds = time.perf_counter() - started
        after = await gauges(client)
        for _ in range(100):
            if after == before:
                break
            await asyncio.sleep(0.1)
            after = await gauges(client)
    wrong = [f"leaked: {before} before, {after} afterwards"] if after != before else []
    stayed = [
        (at, one, two) for at, (one, two) in enumerate(zip(alone, together, strict=True)) if not wanted[at].leaves_after
    ]
    for at, one, two in stayed:
        if not two.done or two.finish not in ("stop", "length") or not one.done:
            wrong.append(f"stream {at} lost: {two.finish}")
        elif two.text != one.text or two.tokens != one.tokens:
            wrong.append(f"stream {at} is another than alone: {two.text[:60]!r} for {one.text[:60]!r}")
    left = [(one, two) for one, two, ask in zip(alone, together, wanted, strict=True) if ask.leaves_after]
    wrong += [f"mixed up: {two.text[:60]!r}" for one, two in left if not one.text.startswith(two.text)]
    tokens = sum(two.tokens for _, _, two in stayed)
    figures = {
        "first_response_first_token_seconds": first.first,
        "all_compiled_seconds": compiling,
        "streams": options.streams,
        "left_midway": len(left),
        "slots": options.slots,
        "equal_to_alone": len(stayed) - sum("another" in line or "lost" in line for line in wrong),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_alone": sum(one.tokens for one in alone) / alone_seconds,
        "first_token_seconds": percentiles([two.first for _, _, two in stayed]),
        "first_token_seconds_alone": percentiles([one.first for one in alone]),
        "token_seconds": percentiles(
            [(two.last - two.first) / (two.tokens - 1) for _, _, two in stayed if two.tokens > 1]
        ),
        "wrong": wrong,
    }
    return figures, wrong


def percentiles(values: list[float]) -> dict[str, float]:
    """By name."""
    return {f"p{share}": float(np.percentile(values, share)) for share in PERCENTILES}


def show(figures: dict[str, Any]) -> None:
    """Prints them."""
    print(
        f"ready after {figures['ready_seconds']:.1f} s; the first token of the first response "
        f"{figures['first_response_first_token_seconds']:.2f} s after that, "
        f"all programs {figures['all_compiled_seconds']:.1f} s after it"
    )
    print(
        f"{figures['streams']} streams on {figures['slots']} slots, {figures['left_midway']} left midway; "
        f"{figures['equal_to_alone']} of {figures['streams'] - figures['left_midway']} others equal to alone\n"
        f"{figures['tokens']} tokens in {figures['seconds']:.1f} s: {figures['tokens_per_second']:.0f} tokens/s "
        f"(one after another: {figures['tokens_per_second_alone']:.0f})"
    )
    for name, words in {
        "first_token_seconds": "time to the first token",
        "first_token_seconds_alone": "the same alone",
        "token_seconds": "time per token after it",
    }.items():
        print(f"{words}: " + ", ".join(f"{share} {1000 * value:.1f} ms" for share, value in figures[name].items()))


def main() -> None:
    """Serves, asks, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", help="a model directory; default: a small model of random weights")
    parser.add_argument("--streams", type=int, default=200, help="at once (default 200)")
    parser.add_argument("--slots", type=int, default=8, help="of the server (default 8)")
    add_keep(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(options.directory or Path(name) / "small")
        if not options.directory:
            package = find_spec("mistral_common")
            if package is None or not package.origin:
                return print("skipped: mistral-common is not installed")
            tekken = Path(package.origin).parent / "data" / "tekken_240718.json"
            subprocess.run([sys.executable, "-c", PREPARE, str(directory), str(tekken)], check=True)
        device = subprocess.run([sys.executable, "-c", DEVICE], check=True, capture_output=True, text=True).stdout
        vocab = json.loads((directory / "config.json").read_text("utf-8"))["vocab_size"]
        ours = ("nemoe_jax.cli.main", "serve", str(directory), "--port", "0", "--served-model-name", "model")
        ours += ("--max-num-seqs", str(options.slots), "--max-queued", str(options.streams))
        started = time.perf_counter()
        with server([sys.executable, "-m", *ours]) as (address, _):
            ready = time.perf_counter() - started
            figures, wrong = asyncio.run(measure(address, options, vocab))
    figures = {"ready_seconds": ready, **figures}
    show(figures)
    for line in wrong:
        print(f"wrong: {line}")
    about = machine()
    print(f"{about['machine']}, {about['cores']} cores, {device.strip()}, {about['versions']}")
    if options.keep:
        model = "a small MoE model of random weights" if not options.directory else Path(options.directory).name
        place = device.strip().lower().replace("nvidia ", "").replace(" ", "-")
        keep(f"load-{place}", {**about, "device": device.strip(), "model": model, "load": os.getloadavg(), **figures})
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
