"""What a calibrated carve of the 12B compiles to on a v5e:2x4 and on an H200, without either: memory, FLOPs, time.

    pip install libtpu
    python -m benchmarks.convert.carve_compile
    pip install --target /tmp/gpu 'jax-cuda12-plugin[with-cuda]==0.10.2' jax-cuda12-pjrt==0.10.2
    PYTHONPATH=/tmp/gpu python -m benchmarks.convert.carve_compile --gpu

Compiles the programs that carve one layer by token clusters (16 experts, top-4), each on one batch of 8 x 256 tokens;
on the TPU slice the batch is cut over its 8 chips and the weights are on each. The activations are too many to be kept
at 131,072 tokens, so that each pass computes them anew. FLOPs are those of the products in the TPU's programs, loops
counted by their trips, times how often a carve runs them. Named limit: the memory of a chip, 16 GB and 141 GB, for the
largest program with its arguments, and the streams of 131,072 tokens beside it. The time is a floor: all products at
the rate of float32 by the highest precision (a sixth of bfloat16's on a v5e; the H200's 67 TFLOP/s).
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.lib.results import add_keep, keep, machine
from convert.carve import gradient_refit, token_clusters
from convert.layerwise import BATCH, SEQUENCE_LENGTH, _attend, feed_forward, hidden
from convert.options import REFIT_STEPS
from nemoe_jax.spec.config import preset
from nemoe_jax.spec.schema import declare, leaves, unflatten
from train.plan import absent_gpu, aot, hlo
from train.plan.hlo_flops import executed_flops

TOKENS, EXPERTS, TOP_K = 131072, 16, 4
MEMORY = {"v5e:2x4": 16e9, "H200": 141e9}
RATE = {
    "v5e:2x4": 197e12 / 6,
    "H200": 67e12,
}  # float32 FLOP/s of a chip; cloud.google.com/tpu/docs/v5e, nvidia.com/h200
STREAMS = 6  # float32 arrays (tokens, D): dense, carved, after attention, inputs, wanted, the next


class Program(NamedTuple):
    """One of a layer's programs."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    times: float  # for each batch


def programs(mesh: Mesh) -> dict[str, Program]:
    """The programs of a layer by name, their arguments as shapes on the mesh."""
    config = preset("mistral-nemo-12b")
    clusters, neurons = EXPERTS // TOP_K, config.ffn * TOP_K // EXPERTS
    width, batch = config.hidden, (BATCH, SEQUENCE_LENGTH)

    def whole(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def cut(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))

    block = unflatten(
        {path: whole(*spec.shape[1:]) for path, spec in leaves(declare(config)["blocks"]["dense"]).items()}
    )
    x_BTD, y_BTD, hidden_BTF, weight_BT = cut(*batch, width), cut(*batch, width), cut(*batch, config.ffn), cut(*batch)
    members, router, down = (
        whole(clusters, neurons, dtype=jnp.int32),
        whole(clusters, width),
        whole(clusters, neurons, width),
    )
    groups = {name: whole(clusters, width, neurons) for name in ("gate", "up")} | {"down": down}
    apart = jax.eval_shape(functools.partial(gradient_refit._apart, shared=0), groups)
    apart = jax.tree.map(lambda array: whole(*array.shape), apart)
    adam = jax.tree.map(
        lambda array: whole(*array.shape, dtype=array.dtype), jax.eval_shape(token_clusters._ADAM.init, apart)
    )
    adam_router = jax.tree.map(
        lambda array: whole(*array.shape, dtype=array.dtype), jax.eval_shape(token_clusters._ADAM.init, router)
    )
    scale = {name: whole() for name in groups}
    drawn = BATCH * SEQUENCE_LENGTH // clusters
    batches = TOKENS // (BATCH * SEQUENCE_LENGTH)
    return {
        "attention": Program(functools.partial(_attend, config, "dense"), (block, x_BTD), 2),
        "dense FFN": Program(functools.partial(feed_forward, config, "dense"), (block, x_BTD), 1),
        "activations": Program(hidden, (block["ffn"], x_BTD), 10),
        "activity": Program(token_clusters._squares, (hidden_BTF, cut(*batch, clusters)), 3),
        "normal equations": Program(
            token_clusters._normal_sums, (hidden_BTF, y_BTD, cut(*batch, clusters), members), 3
        ),
        "costs": Program(token_clusters._costs, (hidden_BTF, y_BTD, weight_BT, members, down), 2),
        "router step": Program(
            token_clusters._router_step,
            (router, adam_router, x_BTD, cut(*batch, clusters), whole()),
            sum(token_clusters.ROUTER_STEPS) / batches,
        ),
        "gradient step": Program(
            gradient_refit._step,
            (
                apart,
                adam,
                scale,
                x_BTD,
                y_BTD,
                weight_BT,
                whole(clusters, drawn, dtype=jnp.int32),
                whole(clusters),
                whole(),
            ),
            REFIT_STEPS / batches,
        ),
    }


def main() -> None:
    """Compiles, prints, and ends with 1 where a program does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="for an H200 instead of a v5e:2x4")
    add_keep(parser)
    options = parser.parse_args()
    name = "H200" if options.gpu else "v5e:2x4"
    jax.config.update("jax_platforms", "cpu")  # nothing runs on what is compiled for
    if options.gpu:
        if reason := absent_gpu.missing():
            return print(f"skipped: {reason}")
        devices = absent_gpu.absent_gpus("h200")
    else:
        devices = aot.topology_devices(name)
    mesh = Mesh(devices, ("data",))
    config, layer_flops, largest = preset("mistral-nemo-12b"), 0.0, 0.0
    figures: dict[str, Any] = {}
    with jax.set_mesh(mesh):
        for title, program in programs(mesh).items():
            compiled = jax.jit(program.function).lower(*program.arguments).compile()
            memory = compiled.memory_analysis()
            held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            held += memory.temp_size_in_bytes
            figures[title] = {"bytes": held, "times": program.times}
            largest = max(largest, held)
            line = f"{title:18} {held / 1e9:6.2f} GB on each chip"
            text = None if options.gpu else aot.text_of(compiled)
            if text:
                flops = executed_flops(hlo.parse(text)) * len(devices)
                figures[title]["flops"] = flops
                layer_flops += flops * program.times
                line += f", {flops / 1e12:8.2f} TFLOP a batch of all chips, {program.times:g} times"
            print(line, flush=True)
    streams = STREAMS * TOKENS * config.hidden * 4 / len(devices)
    print(
        f"largest program and the streams of {TOKENS:,} tokens: {(largest + streams) / 1e9:.1f} GB on each chip",
        end=" ",
    )
    print(f"({(largest + streams) / MEMORY[name]:.2f} x its memory)")
    if layer_flops:
        total = layer_flops * TOKENS / (BATCH * SEQUENCE_LENGTH) * config.layers
        figures["total_flops"] = total
        print(f"all {config.layers} layers, {TOKENS:,} tokens: {total / 1e15:.0f} PFLOP; at least", end=" ")
        chips = {"v5e:2x4": 8, "H200": 1}
        print(", ".join(f"{total / RATE[chip] / count / 60:.0f} min on {chip}" for chip, count in chips.items()))
    if options.keep:
        keep(f"carve_compile-{name.replace(':', '-')}", {**machine(), **figures})
    sys.exit(largest + streams > MEMORY[name])


if __name__ == "__main__":
    main()
