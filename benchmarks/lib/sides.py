"""Two sides of a step, of training or forward alone, each in a process of its own: ours and a peer's."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

AGREEMENT = 1e-3  # of the first two losses, in nats, in float32
WARM_UP = 2

Step = Callable[[], float]  # takes an update and returns the loss before it


class Worker:
    """A process that takes a step whenever it is told to."""

    def __init__(self, role: str, directory: Path, arguments: list[str], module: str):
        command = [sys.executable, "-m", module, *arguments, "--role", role, "--directory", str(directory)]
        platforms = {"JAX_PLATFORMS": "cpu"} if "gpu" not in arguments else {}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **platforms}
        )

    def ask(self, what: str) -> Any:
        """Sends a word and waits for the answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args}: ended with status {self.process.wait()}")
        return json.loads(answer)


def serve(step: Step, facts: Callable[[], dict[str, Any]]) -> None:
    """A worker's side of the conversation."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        started, cpu = time.perf_counter(), time.process_time()
        if line.strip() == "step":
            loss = step()
            answer = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "loss": loss}
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            answer = {"host_bytes": peak} | facts()
        print(json.dumps(answer), file=answers, flush=True)


def batch_of(tokens: Any, mask: Any) -> Any:
    """Our batch of whole rows, each one document.

    Args:
        tokens: (B, T + 1).
        mask: (B, T), which targets count.
    """
    import jax.numpy as jnp

    from train.data.packing import Batch

    shape, length = mask.shape, mask.shape[1]
    return Batch(
        inputs=jnp.asarray(tokens[:, :-1]),
        targets=jnp.asarray(tokens[:, 1:]),
        mask=jnp.asarray(mask),
        segments=jnp.ones(shape, jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape),
    )


def measure(directory: Path, options: argparse.Namespace, arguments: list[str], module: str) -> dict[str, Any]:
    """Both sides' steps and facts, of the workers of a module."""
    sides: dict[str, dict[str, Any]] = {"ours": {"steps": []}, "peer": {"steps": []}}
    together = [["ours", "peer"]] if options.device == "cpu" else [["ours"], ["peer"]]
    for names in together:
        workers = {name: Worker(name, directory, arguments, module) for name in names}
        for _ in range(WARM_UP + options.steps):
            for name, worker in workers.items():
                sides[name]["steps"].append(worker.ask("step"))
        for name, worker in workers.items():
            sides[name] |= worker.ask("facts")
            assert worker.process.stdin
            worker.process.stdin.close()
            worker.process.wait()
    for side in sides.values():
        timed = side["steps"][WARM_UP:]
        side["losses"] = [one["loss"] for one in side["steps"]]
        side["seconds"] = statistics.median(one["seconds"] for one in timed)
        side["cpu_seconds"] = statistics.median(one["cpu"] for one in timed)
        side["tokens_per_second"] = options.rows * options.length / side["seconds"]
    a, b = sides["ours"], sides["peer"]
    figures: dict[str, Any] = {
        **sides,
        "ratio": a["tokens_per_second"] / b["tokens_per_second"],
        "cpu_ratio": b["cpu_seconds"] / a["cpu_seconds"],
        "first_losses_differ_by": max(abs(x - y) for x, y in list(zip(a["losses"], b["losses"], strict=True))[:2]),
    }
    if "matmul_flops_per_second" in a:
        peak = a["matmul_flops_per_second"]
        for side in (a, b):
            side["mfu"] = a["model_flops_per_step"] / side["seconds"] / peak
    return figures


def show(figures: dict[str, Any], limit: float) -> None:
    """Prints the figures for people."""
    for name in ("ours", "peer"):
        side = figures[name]
        memory = " ".join(f"{key} {side[key] / 1e9:.2f} GB" for key in ("host_bytes", "device_bytes") if key in side)
        print(f"{name}: {side['tokens_per_second']:.0f} tokens/s, {side['seconds']:.3f} s a step", end=", ")
        print(f"{side['cpu_seconds']:.3f} s of CPU time, peak {memory}", end="")
        print(f", MFU {side['mfu']:.3f}" if "mfu" in side else "")
        print("  losses " + " ".join(f"{loss:.5f}" for loss in side["losses"]))
    print(f"{figures['machine']}, {figures['cores']} cores, {figures['versions']}")
    print(f"the first two losses differ by {figures['first_losses_differ_by']:.1e} at most")
    print(f"ratio {figures['ratio']:.2f} (limit {limit}), of CPU time {figures['cpu_ratio']:.2f}")
