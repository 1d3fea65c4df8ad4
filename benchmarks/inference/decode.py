"""Greedy decoding on CPU in float32 against transformers' `generate` and llama.cpp, on the same weights and prompts.

    python -m benchmarks.inference.decode                     (random weights, five minutes)

A small Mixtral (16 experts, top-4) and a dense model of as many weights, 128 new tokens after prompts of 32. Named
peers: transformers (its default: dynamic cache, sdpa), batch 1 and 8, whole calls, prompt included; llama.cpp through
xllamacpp on a GGUF of float32 that our converter wrote, batch 1, its own figure for the tokens after the prompt
against ours from the first token to the last. Every side has as many threads as this process has cores. Each runs in
a process of its own and they take turns; the figures are of the median turn. Compilation is done before and is shown
apart. Limits: 3 times transformers' tokens per second, 0.7 times llama.cpp's. On a machine that does other work as
well, give it one core of its own (taskset -c 1).

What limits it on two cores: with one row XLA gives a kernel to one core, as it goes by the bytes that come out; only
the head, wide enough, is read by both. The rest of the time goes into many small kernels. With 8 rows all weights of
all experts are read, at half of one row's rate, since each is multiplied eight times. Tried in vain: blocks copied into
the cache before a dot, more rows of weights spelt out in a kernel, rows in groups of four, loops side by side.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lib.results import add_keep, keep, machine

PROMPT, NEW = 32, 128
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Row(NamedTuple):
    """A comparison: the ratio of tokens per second is to reach `limit`."""

    model: str
    batch: int
    peer: str  # a side, or another model on our side
    limit: float
    prompt: int = PROMPT
    new: int = NEW

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}, {self.prompt}+{self.new}, {self.peer}"


ROWS = (
    Row("moe", 1, "transformers", 3.0),
    Row("moe", 8, "transformers", 3.0),
    Row("dense", 1, "llama.cpp", 0.7),
    Row("moe", 1, "llama.cpp", 0.7),
)


class Turn(NamedTuple):
    """What a side reports of one call."""

    tokens: list[list[int]]  # of each row
    seconds: float  # the whole call
    after_prompt: float  # from the first token to the last


Generate = Callable[[list[list[int]], int], Turn]


def model_config(name: str) -> Any:
    """The small Mixtral, or a dense model with as wide FFNs as all its experts."""
    from nemoe_jax.spec.config import ModelConfig

    sizes: dict[str, Any] = {"family": "mistral", "ffn": 2048}
    if name == "moe":
        sizes = {"family": "mixtral", "experts": 16, "top_k": 4, "expert_ffn": 128}
    return ModelConfig(
        hidden=512, layers=8, heads=8, kv_heads=4, head_dim=64, vocab=32000, context=2048, dtype="float32", **sizes
    )


def prompts(row: Row) -> list[list[int]]:
    """Random tokens."""
    return np.random.default_rng(0).integers(1000, 32000, (row.batch, row.prompt)).tolist()


def prepare(directory: Path) -> None:
    """Writes the models, and the GGUF files where llama.cpp and a vocabulary are at hand."""
    import jax

    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.spec import schema

    for name in ("moe", "dense"):
        config = model_config(name)
        pretrained.save_pretrained(directory / name, config, schema.initialize(config, jax.random.key(0), config.dtype))
        if find_spec("xllamacpp") and find_spec("mistral_common"):
            import mistral_common

            from convert.gguf.export import GgufOptions, to_gguf
            from nemoe_jax.text.tokenizers.load import cut_tekken

            source = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
            cut_tekken(source, directory / name / "tekken.json", config.vocab)
            to_gguf(directory / name, directory / f"{name}.gguf", GgufOptions(type="f32"))


def ours(directory: Path, name: str) -> Generate:
    """Our side."""
    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.inference.generate import generate

    config, params = pretrained.load_pretrained(directory / name)

    def run(prompts: list[list[int]], new: int) -> Turn:
        started, times, steps = time.perf_counter(), [], []
        for tokens_B in generate(config, params, prompts, new):
            steps.append(tokens_B)
            times.append(time.perf_counter())
        return Turn(np.stack(steps, axis=1).tolist(), times[-1] - started, times[-1] - times[0])

    return run


def transformers(directory: Path, name: str) -> Generate:
    """transformers' side."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(CORES)
    model = AutoModelForCausalLM.from_pretrained(directory / name, dtype="auto").eval()

    def run(prompts: list[list[int]], new: int) -> Turn:
        started = time.perf_counter()
        tokens = torch.tensor(prompts)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "eos_token_id": None}
        with torch.inference_mode():
            made = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)
        seconds = time.perf_counter() - started
        return Turn(made[:, tokens.shape[1] :].tolist(), seconds, seconds)

    return run


def llama_cpp(directory: Path, name: str) -> Generate:
    """llama.cpp's side: its server in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(directory / f"{name}.gguf")
    params.n_ctx, params.n_gpu_layers, params.verbosity = 1024, 0, -1
    params.cpuparams.n_threads = CORES
    # as we keep them
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def run(prompts: list[list[int]], new: int) -> Turn:
        (prompt,) = prompts
        started = time.perf_counter()
        body = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "return_tokens": True}
        request = urllib.request.Request(
            server.listening_address + "/completion",
            json.dumps(body | {"cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            said = json.load(answer)
        timings = said["timings"]
        assert timings["predicted_n"] == new
        seconds = time.perf_counter() - started
        return Turn([said["tokens"]], seconds, timings["predicted_ms"] / 1000 * (new - 1) / new)

    return run


SIDES = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp}


class Worker:
    """A side in a process of its own, which generates whenever it is told to."""

    def __init__(self, side: str, model: str, directory: Path):
        self.name = f"{side}, {model}"
        command = [sys.executable, "-m", __spec__.name, "--side", side, "--model", model, "--directory", str(directory)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

    def run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """A turn's fields, and its CPU time."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps((prompts, new)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: ended with status {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        """Closes it."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(run: Generate) -> None:
    """A worker's side of the conversation."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        cpu = time.process_time()
        turn = run(*json.loads(line))
        print(json.dumps({**turn._asdict(), "cpu": time.process_time() - cpu}), file=answers, flush=True)


def measure(row: Row, directory: Path, turns: int) -> dict[str, Any]:
    """Both sides' figures of a comparison."""
    peer = (row.peer, row.model) if row.peer in SIDES else ("ours", row.peer)
    workers = {"ours": Worker("ours", row.model, directory), row.peer: Worker(*peer, directory)}
    asked = prompts(row), row.new
    first = {name: worker.run(*asked) for name, worker in workers.items()}
    took: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(turns):
        for name, worker in workers.items():
            took[name].append(worker.run(*asked))
    for worker in workers.values():
        worker.end()
    whole = row.peer == "transformers" or row.new == 1
    key, tokens = ("seconds", row.new) if whole else ("after_prompt", row.new - 1)
    figures: dict[str, Any] = {}
    for name, side in took.items():
        seconds = statistics.median(turn[key] for turn in side)
        figures[name] = {
            "tokens_per_second": row.batch * tokens / seconds,
            "cpu_seconds": statistics.median(turn["cpu"] for turn in side),
            "first_call_seconds": first[name]["seconds"],
            "turns": [turn[key] for turn in side],
        }
    mine, theirs = np.array(first["ours"]["tokens"]), np.array(first[row.peer]["tokens"])
    figures["ratio"] = figures["ours"]["tokens_per_second"] / figures[row.peer]["tokens_per_second"]
    figures["cpu_ratio"] = figures[row.peer]["cpu_seconds"] / figures["ours"]["cpu_seconds"]
    figures["limit"] = row.limit
    # how many tokens agree before the first that does not, over the rows
    figures["equal_tokens"] = int(np.cumprod(mine == theirs, axis=1).sum())
    figures["tokens"] = mine.size
    return figures


def show(row: Row, figures: dict[str, Any]) -> None:
    """Prints a comparison."""
    a, b = figures["ours"], figures[row.peer]
    print(
        f"{row!s:40} {a['tokens_per_second']:7.1f} tokens/s {b['tokens_per_second']:7.1f}   "
        f"ratio {figures['ratio']:.2f} (limit {figures['limit']}), of CPU time {figures['cpu_ratio']:.2f}; "
        f"{figures['equal_tokens']} of {figures['tokens']} tokens agree; first call {a['first_call_seconds']:.1f} s",
        flush=True,
    )


def skipped(peer: str) -> str | None:
    """Why a peer cannot be had."""
    needs = {"transformers": ("torch", "transformers"), "llama.cpp": ("xllamacpp", "mistral_common", "gguf")}
    return next((f"{name} is not installed" for name in needs.get(peer, ()) if find_spec(name) is None), None)


def main() -> None:
    """Prepares, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="of each side, after one to warm up; default: 5")
    parser.add_argument("--row", type=int, choices=range(len(ROWS)), help="only this one")
    add_keep(parser)
    for hidden in ("--side", "--model", "--directory"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "prepare":
        return prepare(Path(options.directory))
    if options.side:
        return serve(SIDES[options.side](Path(options.directory), options.model))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        subprocess.run([sys.executable, "-m", __spec__.name, "--side", "prepare", "--directory", name], check=True)
        for row in ROWS if options.row is None else (ROWS[options.row],):
            if reason := skipped(row.peer):
                print(f"{row}: skipped: {reason}")
                continue
            results[str(row)] = measure(row, directory, options.turns)
            show(row, results[str(row)])
    wanted = ("jax", "jaxlib", "torch", "transformers", "xllamacpp")
    about = machine(name for name in wanted if find_spec(name))
    print(f"{about['machine']}, {about['cores']} cores, {about['versions']}")
    if options.keep and results:
        keep("decode-cpu", {**about, "prompt": PROMPT, "new_tokens": NEW, "turns": options.turns, "rows": results})
    sys.exit(any(figures["ratio"] < figures["limit"] for figures in results.values()))


if __name__ == "__main__":
    main()
