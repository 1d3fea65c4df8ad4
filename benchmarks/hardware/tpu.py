"""The forward pass and the decoding of a token on TPU slices, by the TPU compiler: libtpu is expected, but no TPU.

    python -m benchmarks.hardware.tpu                           (a minute or so for each case; goes on where it stopped)
    python -m benchmarks.hardware.tpu --case "v5e decode dense int8" (that one, anew)
    python -m benchmarks.hardware.tpu --case "v5e decode 16E lone" --few-tokens 0       (few tokens treated as many)

Of each program: bytes per device against what the chip has, how often it copies something as large as a layer of the
key/value cache, what it sends. Nothing is run. The time is a lower bound, a roofline (Williams et al., 2009): the bytes
that must move at the chip's published bandwidth, or the FLOPs at its published peak, whichever takes longer. Cycles are
the compiler's estimates for a call of one step, without kernels and ragged dots.

Bytes that must move are each weight once (of experts those that are chosen on average, if the router is even), and in
decoding all keys and values. Weights and cache are cut over the mesh's tensor axis, so every device moves its part.

Limits: the dense 12B on v5e fits with 8 rows of 32768 tokens in bfloat16 and with 8 of 131072 in int8, and no decoding
copies the cache; with linear maps in FP8 it fits on a single v6e chip and on v5e:2x2 with 8 rows of 8192. Where libtpu
does not give a program's text, what stands in it is not known: "–". Figures go to benchmarks/results/tpu.json.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.lib.results import RESULTS

RESULT_FILE = RESULTS / "tpu.json"
SLICES = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}  # 8 chips of each
BANDWIDTHS = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1640e9}  # bytes/s of HBM; cloud.google.com/tpu/docs/v5e, /v5p, /v6e
MODELS = {"dense": "mistral-nemo-12b", "16E": "nemoe-12b-16e"}


class Work(NamedTuple):
    """Rows of a batch; the tokens of each, which are computed (forward) or in its cache already (decode)."""

    rows: int
    length: int
    cache: str | None = None  # its dtype; None for a forward pass
    fp8: bool = False  # whether linear maps are in FP8


WORK = {
    "forward": Work(8, 2048),
    "decode bfloat16": Work(8, 32768, "bfloat16"),
    "decode int8": Work(8, 131072, "int8"),
    "decode lone": Work(1, 32768, "bfloat16"),
}
CASES = {
    f"{chip} {name.split()[0]} {model} {name.partition(' ')[2]}".strip(): (chip, model, work)
    for chip in SLICES
    for model in MODELS
    for name, work in WORK.items()
}
FP8_SLICES = {"v6e:1x1": "v6e:2x2", "v5e:2x2": "v5e:2x2"}  # a single chip is one of the smallest topology's
CASES |= {f"{slice} decode dense fp8": (slice, "dense", Work(8, 8192, "bfloat16", fp8=True)) for slice in FP8_SLICES}
MUST_FIT = (
    *(f"{slice} decode dense fp8" for slice in FP8_SLICES),
    "v5e decode dense bfloat16",
    "v5e decode dense int8",
)


def main() -> None:
    """Runs the cases that have no figures yet and prints the table; exit status 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one case, even if there are figures")
    parser.add_argument("--mesh", help="with --case: another mesh than tensor=8; its figures are shown, and not kept")
    parser.add_argument("--few-tokens", type=int, help="with --case: up to so many are few; shown, and not kept")
    options = parser.parse_args()
    only = options.case
    if (options.mesh or options.few_tokens is not None) and not only:
        parser.error("--mesh and --few-tokens: expected with --case")
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: libtpu, the TPU compiler, is not installed: pip install 'nemoe-jax[tpu]'")
        return
    from train.plan.plan import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    if only and (options.mesh or options.few_tokens is not None):
        from nemoe_jax.kernels import few_tokens_tpu
        from nemoe_jax.spec.mesh import parse_mesh

        if options.few_tokens is not None:
            few_tokens_tpu.FEW_TOKENS = options.few_tokens
        sizes = parse_mesh(options.mesh) if options.mesh else None
        sys.exit(not all(list(show({only: measure(*CASES[only], sizes)}))))
    results: dict[str, Any] = json.loads(RESULT_FILE.read_text("utf-8")) if RESULT_FILE.exists() else {}
    for name in [only] if only else CASES:
        if only or name not in results:
            results[name] = measure(*CASES[name])
            RESULT_FILE.parent.mkdir(exist_ok=True)
            RESULT_FILE.write_text(
                json.dumps({name: results[name] for name in CASES if name in results}, indent=1) + "\n"
            )
    sys.exit(not all(list(show(results))))


def measure(chip: str, model: str, work: Work, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """The figures of one case."""
    import jax

    from nemoe_jax.spec.config import preset
    from nemoe_jax.spec.mesh import make_mesh
    from train.plan import aot, hlo, hlo_flops
    from train.step import model_flops

    config = preset(MODELS[model])
    devices = aot.topology_devices((SLICES | FP8_SLICES)[chip])[: 1 if chip.endswith(":1x1") else None]
    generation = chip.partition(":")[0]
    mesh = make_mesh(sizes or {"tensor": len(devices)}, devices)
    limit = aot.memory_limit(devices[0])
    facts = roofline(
        config, work, len(devices), model_flops.peak_flops(devices[0].device_kind), BANDWIDTHS[generation]
    ) | {
        "mesh": dict(mesh.shape),
        "limit": limit,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "date": datetime.date.today().isoformat(),
    }
    started = time.monotonic()
    with jax.set_mesh(mesh):
        lowered, shares = lower(config, mesh, work)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            too_much = aot.read_out_of_memory(str(error))
            if too_much is None:
                raise
            return facts | {"total": too_much.expected, "fits": False, "copies": None}
    memory = compiled.memory_analysis()  # before the text, which libtpu may refuse
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = aot.text_of(compiled)
    program = hlo.parse(text) if text else None
    return facts | {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "total": total,
        "fits": limit is None or total <= limit,
        "copies": copies(program, shares) if program else None,
        "sent": sum(one.bytes * one.times for one in program.collectives) if program else None,
        "cycles": hlo_flops.estimated_cycles(program) if program else None,
        "seconds to compile": round(time.monotonic() - started, 1),
    }


def lower(config: Any, mesh: Any, work: Work) -> tuple[Any, list[tuple[int, ...]]]:
    """The program before it is compiled; and the shapes of the cache's arrays on a device."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from nemoe_jax.inference import generate
    from nemoe_jax.inference.sampler import controls
    from nemoe_jax.inference.sampling import SamplingParams
    from nemoe_jax.model.transformer import forward
    from nemoe_jax.spec.fp8_weight import abstract_model

    def shape(array: Any, place: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=place)

    params = abstract_model(config, jnp.bfloat16, mesh, fp8=work.fp8)
    everywhere = NamedSharding(mesh, PartitionSpec())
    if work.cache is None:
        tokens = jax.ShapeDtypeStruct((work.rows, work.length), jnp.int32, sharding=everywhere)
        return jax.jit(lambda params, tokens: forward(config, params, tokens).logits).lower(params, tokens), []
    slots = (work.length,) * work.rows
    stop, new = np.array([-1], np.int32), np.int32(1)
    start = generate._start.lower(config, slots, jnp.dtype(work.cache), False, new, stop).compile()
    state, _ = jax.tree.map(shape, start.out_info, start.output_shardings)
    shares = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves((state.cache.k, state.cache.v))]
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    inputs = jax.tree.map(
        lambda array: shape(array, everywhere), controls([SamplingParams()] * work.rows, config.vocab)
    )
    return generate._decode.lower(config, params, state, steps, inputs), shares


def copies(program: Any, shares: list[tuple[int, ...]]) -> int:
    """How many instructions copy the keys or values of all layers, or of one."""
    sizes = {math.prod(shape) // layers for shape in shares for layers in (1, shape[1])}
    kinds = ("copy", "copy-start", "transpose", "convert")
    return sum(one.opcode in kinds and one.result[0].size in sizes for _, one in program)


def roofline(config: Any, work: Work, devices: int, peak: float | None, bandwidth: float) -> dict[str, Any]:
    """Bytes that must move on a device, its FLOPs, and the seconds that these take at least."""
    assert peak is not None
    from nemoe_jax.spec.fp8_weight import is_quantized
    from nemoe_jax.spec.schema import declare, leaves
    from train.step import model_flops

    tokens = work.rows * (work.length if work.cache is None else 1)
    weights = 0.0
    for spec in leaves(declare(config)).values():
        share = 1.0
        if "experts" in spec.stacked:
            share = 1 - (1 - config.top_k / config.experts) ** tokens  # chosen by one of the tokens at least
        bytes_each = 1 if work.fp8 and is_quantized(spec) else 2
        weights += share * (tokens * config.hidden if spec.lookup else math.prod(spec.shape)) * bytes_each
    moved, seen = weights, work.length
    if work.cache is not None:
        of_head = {"int8": config.head_dim + 4}.get(work.cache, 2 * config.head_dim)  # with a float32 scale
        moved += 2 * config.layers * config.kv_heads * of_head * work.rows * work.length
        seen = 2 * work.length - 1  # a token sees half of its row on average; the last one, all
    amount = tokens * model_flops.forward_flops_per_token(config, seen)
    of_memory, of_compute = moved / devices / bandwidth, amount / devices / peak
    return {
        "bytes that must move": moved / devices,
        "flops": amount / devices,
        "seconds at least": max(of_memory, of_compute),
        "tokens per second at most": tokens / max(of_memory, of_compute),
        "bound": "memory" if of_memory > of_compute else "compute",
    }


def show(results: dict[str, Any]) -> Iterator[bool]:
    """Prints a line for each case, and yields whether it keeps its limits."""
    print(f"{'case':27}{'rows × tokens':>15}{'GB arguments':>14}{'temporaries':>13}{'total':>8}{'limit':>8}", end="")
    print(f"{'used':>6}{'copies':>8}{'GB sent':>9}{'10^6 cycles':>13}{'GB to move':>12}{'TFLOPs':>9}", end="")
    print(f"{'ms at least':>13}{'tokens/s at most':>18}")
    for name, case in results.items():
        _, _, work = CASES[name]

        def gigabytes(key: str, case: dict[str, Any] = case) -> str:
            return f"{case[key] / 1e9:.2f}" if case.get(key) is not None else "–"

        print(f"{name:27}{f'{work.rows} × {work.length}':>15}{gigabytes('arguments'):>14}", end="")
        print(f"{gigabytes('temporaries'):>13}", end="")
        used = f"{case['total'] / case['limit']:.0%}" if case["fits"] else "over"
        print(f"{gigabytes('total'):>8}{gigabytes('limit'):>8}{used:>6}", end="")
        print(f"{'–' if case['copies'] is None else case['copies']:>8}{gigabytes('sent'):>9}", end="")
        print(f"{case['cycles'] / 1e6:13.1f}" if case.get("cycles") is not None else f"{'–':>13}", end="")
        print(f"{gigabytes('bytes that must move'):>12}{case['flops'] / 1e12:>9.3f}", end="")
        print(f"{1e3 * case['seconds at least']:>11.1f}{case['bound'][:1]:>2}", end="")
        print(f"{case['tokens per second at most']:>18,.0f}")
        yield (case["fits"] or name not in MUST_FIT) and not (case["copies"] and work.cache)


if __name__ == "__main__":
    main()
