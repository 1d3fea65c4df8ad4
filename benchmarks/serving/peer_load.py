"""64 streams at once, of `nemoe serve` and of llama.cpp's server, on the same weights in float32.

    python -m benchmarks.serving.peer_load DIR        (a model directory that GGUF can hold; some minutes)

Our converter writes the GGUF, and each server is a process of its own with as many threads as there are cores, a slot
for each stream and no prompt cache. All streams are asked at once, with random prompts and greedy; the servers take
turns, and the best turn of each counts. Limits: tokens per second at least llama.cpp's, and the 99th percentile of the
time to the first token no longer. With `--cpu` the tokens are counted by the servers' CPU time, the first token is not.
llama.cpp's threads wait for one another at work, so that it needs cores of its own: both figures want a quiet machine.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.inference.decode import CORES, skipped
from benchmarks.lib.peers import judge, parser
from benchmarks.serving.load import FIRST_ID, Wanted, compiled, server, stream

LIMITS = {"tokens per second, ours / llama.cpp": 1.0, "p99 of the first token, llama.cpp / ours": 1.0}
LLAMA_CPP = f"""
import signal, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params.cache_prompt, params.n_gpu_layers, params.verbosity, params.cpuparams.n_threads = False, 0, -1, {CORES}
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print("ready: llama.cpp at", server.listening_address, file=sys.stderr, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
signal.pause()
"""
PAGE = 128  # tokens, to which a slot's share of our cache is rounded up


def main() -> None:
    """Measures, prints, and says whether the limits are kept."""
    flags = parser(__doc__, 3)
    for name, default in {"streams": 64, "prompt": 64, "new": 64}.items():
        flags.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = flags.parse_args()
    if reason := skipped("llama.cpp"):
        return print(f"skipped: {reason}")
    each = -(-(options.prompt + options.new) // PAGE) * PAGE
    slots = str(options.streams)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        gguf = Path(name) / "model.gguf"
        convert = ("convert.cli", "gguf", options.directory, str(gguf), "--type", "f32")
        subprocess.run([sys.executable, "-m", *convert], check=True, stdout=subprocess.DEVNULL)
        ours = ("nemoe_jax.cli.main", "serve", options.directory, "--port", "0", "--served-model-name", "model")
        ours += ("--max-num-seqs", slots, "--max-queued", slots, "--no-prefix-cache")
        ours += ("--kv-cache-tokens", str(each * options.streams))
        commands = {
            "ours": ("-m", *ours),
            "llama.cpp": ("-c", LLAMA_CPP, str(gguf), str(each * options.streams), slots),
        }
        servers = {side: stack.enter_context(server([sys.executable, *command])) for side, command in commands.items()}
        turns = asyncio.run(measure(servers, options))
    figures = {f"{side}, {what}": best(values) for (side, what, best), values in turns.items()}
    rate = f"tokens per {'CPU ' * options.cpu}second"
    ratio = figures[f"ours, {rate}"] / figures[f"llama.cpp, {rate}"]
    waits = figures["llama.cpp, p99 of the first token, s"] / figures["ours, p99 of the first token, s"]
    judge("peer_load", options, figures, "", dict(zip(LIMITS, (ratio, waits), strict=True)), LIMITS)


async def measure(
    servers: dict[str, tuple[str, int]], options: Any
) -> dict[tuple[str, str, Callable[[list[float]], float]], list[float]]:
    """Figures of each turn, by side, name and which of them counts."""
    draw, figures = np.random.default_rng(0), {}
    vocab = json.loads((Path(options.directory) / "config.json").read_text("utf-8"))["vocab_size"]
    for turn in range(options.turns + 1):
        prompts = draw.integers(FIRST_ID, vocab, (options.streams, options.prompt)).tolist()
        for side, (address, process) in servers.items():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits, trust_env=False) as client:
                if side == "ours" and not turn:
                    await compiled(client)
                cpu, started = cpu_seconds(process), time.perf_counter()
                body = {"model": "model", "max_tokens": options.new, "temperature": 0, "ignore_eos": True}
                body |= {"stream": True, "stream_options": {"include_usage": True}}
                asked = [Wanted(body | {"prompt": prompt}, None) for prompt in prompts[: None if turn else 2]]
                got = await asyncio.gather(*(stream(client, one, leaves=False) for one in asked))
                passed = cpu_seconds(process) - cpu if options.cpu else time.perf_counter() - started
            tokens = [one.tokens for one in got]
            assert tokens == [options.new] * len(asked), (side, tokens)
            if turn:  # the first one warms up
                figures.setdefault((side, f"tokens per {'CPU ' * options.cpu}second", max), []).append(
                    sum(tokens) / passed
                )
                p99 = float(np.percentile([one.first for one in got], 99))
                figures.setdefault((side, "p99 of the first token, s", min), []).append(p99)
    return figures


def cpu_seconds(process: int) -> float:
    """What a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
