"""A real model on CPU in float32, side by side with what people use: SmolLM2-135M, dense and carved.

    python -m benchmarks.inference.real_model --demo runs/demo                (after `make demo`; some minutes)

Named peers: llama.cpp through xllamacpp on a GGUF of float32 that our converter writes, and transformers, on the same
weights, prompts and threads; the carved model's peer is the dense one. Decoding is 128 tokens after a prompt of 32,
prefill the first token after a prompt of 512, both as in `benchmarks.inference.decode`. Start-up is the wall time from
the command to the first token of a second run, ours with `nemoe generate`, llama.cpp's with its server in a fresh
Python. Limits: each row's, printed beside its ratio.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.inference.decode import CORES, Row, measure, show, skipped
from benchmarks.lib.results import add_keep, keep, machine

ROWS = (
    Row("dense", 1, "llama.cpp", 0.85),
    Row("dense", 1, "transformers", 2.0),
    Row("dense", 1, "transformers", 1.0, prompt=512, new=1),
    Row("carved", 1, "dense", 1.3),
)
STARTUP_LIMIT = 1.5  # times llama.cpp's seconds
PROMPT = "The capital of France is the city of Paris, and it"
LLAMA_CPP = f"""
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.verbosity = sys.argv[1], 1024, 0, -1
params.cpuparams.n_threads = {CORES}
server = xllamacpp.Server(params)
body = json.dumps({{"prompt": {PROMPT!r}, "n_predict": 1, "temperature": 0}}).encode()
request = urllib.request.Request(server.listening_address + "/completion", body, {{"Content-Type": "application/json"}})
print(json.load(urllib.request.build_opener(urllib.request.ProxyHandler({{}})).open(request))["content"], flush=True)
"""


def first_token_seconds(*command: str) -> float:
    """Wall time until a command first writes to standard output; it then runs to its end."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode or not first:
        sys.exit(f"{' '.join(command)} failed")
    return seconds


def startup(dense: Path, gguf: Path, rounds: int) -> dict[str, Any]:
    """The least seconds to the first token of both sides, after a first run of each."""
    python = sys.executable
    sides = {
        "ours": (python, "-m", "nemoe_jax.cli.main", "generate", str(dense), "--prompt", PROMPT),
        "llama.cpp": (python, "-c", LLAMA_CPP, str(gguf)),
    }
    sides["ours"] += ("--max-new-tokens", "1", "--temperature", "0")
    took: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name, command in sides.items():
            took[name].append(first_token_seconds(*command))
    figures: dict[str, Any] = {name: {"first_run": turns[0], "best": min(turns[1:])} for name, turns in took.items()}
    return figures | {"ratio": figures["ours"]["best"] / figures["llama.cpp"]["best"], "limit": STARTUP_LIMIT}


def main() -> None:
    """Writes the GGUF, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="directory of `make demo`")
    parser.add_argument("--carved", default="calibrated", help="which of its carved models (default calibrated)")
    parser.add_argument("--turns", type=int, default=5, help="of each side, after one to warm up; default: 5")
    add_keep(parser)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    missed = False
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for model, source in {"dense": "dense", "carved": options.carved}.items():
            (directory / model).symlink_to((options.demo / source).resolve(), target_is_directory=True)
        to_gguf = ("gguf", str(directory / "dense"), str(directory / "dense.gguf"), "--type", "f32")
        subprocess.run([sys.executable, "-m", "convert.cli", *to_gguf], check=True, stdout=subprocess.DEVNULL)
        for row in ROWS:
            if reason := skipped(row.peer):
                print(f"{row}: skipped: {reason}")
                continue
            results[str(row)] = figures = measure(row, directory, options.turns)
            show(row, figures)
            missed |= figures["ratio"] < row.limit
        if not skipped("llama.cpp"):
            results["startup"] = figures = startup(directory / "dense", directory / "dense.gguf", options.turns)
            ours, theirs = figures["ours"]["best"], figures["llama.cpp"]["best"]
            print(f"first token, second run: {ours:.2f} s, llama.cpp {theirs:.2f} s", end="; ")
            print(f"ratio {figures['ratio']:.2f} (limit {STARTUP_LIMIT})")
            missed |= figures["ratio"] > STARTUP_LIMIT
    about = machine(("jax", "jaxlib", "torch", "transformers", "xllamacpp"))
    print(f"{about['machine']}, {about['cores']} cores, {about['versions']}")
    if options.keep:
        keep("real_model-cpu", {**about, "turns": options.turns, "rows": results})
    sys.exit(missed)


if __name__ == "__main__":
    main()
