"""The 12B with 16 experts on one NVIDIA GPU, bfloat16, random weights: forward and decode.

    python -m benchmarks.hardware.gpu          (an 80 GB card; about six minutes)
    python -m benchmarks.hardware.gpu --tiny  (on CPU with two layers; its figures mean nothing)

Named peer: transformers on the same card with the same shapes, its default kernels (scaled_dot_product_attention,
grouped experts) and `generate`. Limits: tokens per second twice the peer's, forward and decoding; the forward pass at
half of the card's rate of bfloat16 products or better; decoding a batch of one at half of the speed or better at which
the card can read the weights that a token uses. Both of the card's rates are measured here, on random data.

Decoding is timed as the difference between generating many tokens and generating one, greedily, after the same prompt.
Each side runs in a process of its own, one after the other.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.lib.results import keep, machine

FASTER, MFU, OF_BANDWIDTH = 2.0, 0.5, 0.5
BATCHES = (1, 8)  # rows decoded at a time; the first has the limit


def model_config(tiny: bool) -> Any:
    """The 12B, or next to nothing."""
    from nemoe_jax.spec.config import preset

    config = preset("nemoe-12b-16e")
    if tiny:
        sizes = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 512, "expert_ffn": 32}
        config = config.replace(**sizes, context=512)
    return config


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of a function that waits for its result, after one run that is not timed."""
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def seconds_a_token(generate: Callable[[int], Any], options: argparse.Namespace) -> float:
    """Of decoding: what each token after the first adds."""
    many, one = (median_seconds(lambda new=new: generate(new), options.repeats) for new in (options.new, 1))
    return (many - one) / (options.new - 1)


def rates(options: argparse.Namespace) -> dict[str, float]:
    """What the card does: FLOP/s of bfloat16 products, and bytes/s read, or copied if that is more."""
    import jax
    import jax.numpy as jnp

    size = 64 if options.tiny else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    large = jnp.tile(x, (1, 1 if options.tiny else 32))  # 4 GB
    read, copy = jax.jit(lambda x: jnp.max(x, axis=1)), jax.jit(jnp.negative)
    repeats = 2 * options.repeats

    def seconds(function: Any, array: Any) -> float:
        return median_seconds(lambda: function(array).block_until_ready(), repeats)

    return {
        "matmul_flops_per_second": 2 * size**3 / seconds(product, x),
        "bytes_per_second": max(large.nbytes / seconds(read, large), 2 * large.nbytes / seconds(copy, large)),
    }


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """The card's rates and our times; or why there are none."""
    import jax

    if not options.tiny and jax.default_backend() != "gpu":
        return {"skipped": "JAX finds no GPU"}
    import numpy as np

    from nemoe_jax.inference.generate import generate
    from nemoe_jax.model.transformer import hidden_states, logits
    from nemoe_jax.spec import schema

    config = model_config(options.tiny)
    figures: dict[str, Any] = {"device": jax.local_devices()[0].device_kind, **rates(options)}
    params = schema.initialize(config, jax.random.key(0), "bfloat16")
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab, (options.rows, options.length)).astype(np.int32)

    @jax.jit
    def forward(params, tokens_BT):
        return logits(config, params, hidden_states(config, params, tokens_BT).x_BTD[:, -1:])

    figures["forward"] = median_seconds(lambda: forward(params, tokens_BT).block_until_ready(), options.repeats)
    figures["decode"] = {}
    for batch in BATCHES:
        prompts = tokens_BT.reshape(-1)[: batch * options.prompt].reshape(batch, -1).tolist()
        figures["decode"][batch] = seconds_a_token(
            lambda new, all=prompts: [*generate(config, params, all, new)], options
        )
    figures["parameters"] = sum(array.size for array in jax.tree.leaves(params))
    figures["device_bytes"] = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return figures


def peer(options: argparse.Namespace) -> dict[str, Any]:
    """The times of transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = "cpu" if options.tiny else "cuda"
    if options.tiny:
        torch.set_num_threads(1)
    from nemoe_jax.spec.hf_config import to_hf

    config = AutoConfig.for_model(**to_hf(model_config(options.tiny)))
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        tokens_BT = torch.randint(0, config.vocab_size, (options.rows, options.length))

    def wait() -> None:
        if place == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def forward() -> None:
        model(input_ids=tokens_BT, use_cache=False, logits_to_keep=1)
        wait()

    def decode(prompts: Any, new: int) -> None:
        lengths = {"max_new_tokens": new, "min_new_tokens": new}
        model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, pad_token_id=0, **lengths)
        wait()

    figures: dict[str, Any] = {"forward": median_seconds(forward, options.repeats), "decode": {}}
    for batch in BATCHES:
        prompts = tokens_BT.reshape(-1)[: batch * options.prompt].reshape(batch, -1)
        figures["decode"][batch] = seconds_a_token(lambda new, all=prompts: decode(all, new), options)
    figures["parameters"] = sum(weight.numel() for weight in model.parameters())
    figures["device_bytes"] = torch.cuda.max_memory_allocated() if place == "cuda" else 0
    return figures


def compare(a: dict[str, Any], b: dict[str, Any], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{row: ratio and limit} of our figures and the peer's."""
    from nemoe_jax.spec.schema import count

    if a["parameters"] != b["parameters"]:
        raise SystemExit(f"the models differ: {a['parameters']} parameters and {b['parameters']}")
    config = model_config(options.tiny)
    table = config.vocab * config.hidden
    active, length = count(config)[1], options.length
    scores = config.layers * 4 * config.heads * config.head_dim * (length + 1) / 2
    flops = options.rows * (length * (2 * (active - 2 * table) + scores) + 2 * table)
    held = 4 * config.layers * config.kv_heads * config.head_dim * (options.prompt + options.new / 2)
    bound = (2 * (active - table) + held) / a["bytes_per_second"]  # the embedding's table is looked up, not read
    rows = {
        "forward, tokens/s over the peer's": {"ratio": b["forward"] / a["forward"], "limit": FASTER},
        "forward, of the rate of products": {
            "ratio": flops / a["forward"] / a["matmul_flops_per_second"],
            "limit": MFU,
        },
    }
    for batch in BATCHES:
        name = f"decode of {batch}, tokens/s over the peer's"
        rows[name] = {"ratio": b["decode"][str(batch)] / a["decode"][str(batch)], "limit": FASTER}
    name = f"decode of {BATCHES[0]}, of the speed of reading its weights"
    rows[name] = {"ratio": bound / a["decode"][str(BATCHES[0])], "limit": OF_BANDWIDTH}
    return rows


def show(figures: dict[str, Any], tokens: int) -> None:
    """Prints the figures for people."""
    a = figures["ours"]
    print(f"{a['device']}, {figures['versions']}")
    print(f"products {a['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s, memory {a['bytes_per_second'] / 1e12:.2f} TB/s")
    for name in ("ours", "peer"):
        side = figures[name]
        decoded = ", ".join(f"{int(batch) / seconds:.1f}" for batch, seconds in side["decode"].items())
        print(
            f"{name}: forward {tokens / side['forward']:.0f} tokens/s, decode of {BATCHES}: {decoded} tokens/s", end=""
        )
        print(f", peak {side['device_bytes'] / 1e9:.1f} GB")
    for name, row in figures["rows"].items():
        print(f"{name}: {row['ratio']:.2f} (limit {row['limit']})")


def run_alone(role: str) -> dict[str, Any]:
    """What the role's own process says."""
    # both fit beside each other only if neither takes the whole card at once
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--role", role]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{role}: ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures both, prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help="rows of the forward pass; default: 4")
    parser.add_argument("--length", type=int, default=2048, help="tokens of such a row; default: 2048")
    parser.add_argument("--prompt", type=int, default=512, help="tokens before those that are decoded; default: 512")
    parser.add_argument("--new", type=int, default=129, help="tokens decoded; default: 129")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; default: 5")
    parser.add_argument("--tiny", action="store_true", help="a dry run on CPU")
    parser.add_argument("--role", choices=("ours", "peer"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.rows, options.length, options.prompt, options.new, options.repeats = 2, 64, 8, 3, 1
    if options.role:
        return print(json.dumps({"ours": ours, "peer": peer}[options.role](options)))
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return print(f"skipped: {name} is not installed")
    a = run_alone("ours")
    if "skipped" in a:
        return print(f"skipped: {a['skipped']}")
    b = run_alone("peer")
    rows = compare(a, b, options)
    figures = {**machine(("jax", "jaxlib", "flax", "torch", "transformers")), "ours": a, "peer": b, "rows": rows}
    show(figures, options.rows * options.length)
    if options.tiny:
        return
    figures["options"] = {key: value for key, value in vars(options).items() if key not in ("role", "tiny")}
    keep("gpu-" + a["device"].lower().replace("nvidia ", "").replace(" ", "-"), figures)
    sys.exit(any(row["ratio"] < row["limit"] for row in rows.values()))


if __name__ == "__main__":
    main()
