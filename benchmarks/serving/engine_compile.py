"""What the engine's programs for the 12B compile to on a v5e:2x4 or an H200, without one: memory, and pool copies.

    pip install libtpu
    python -m benchmarks.serving.engine_compile         (the first and the largest programs; with --all, every one)
    pip install --target /tmp/gpu 'jax-cuda12-plugin[with-cuda]==0.10.2' jax-cuda12-pjrt==0.10.2
    PYTHONPATH=/tmp/gpu python -m benchmarks.serving.engine_compile --gpu --model 16E

In bfloat16, tensor=8 on the slice, 8 slots of 8192 tokens. Nothing is run. Limits: every program fits into a chip; the
pool that goes in comes out in place (its bytes are aliased), and nothing of a layer's size of it is copied within.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.hardware.tpu import MODELS, copies
from benchmarks.lib.results import add_keep, keep, machine
from nemoe_jax.adapters.loaded import LoadedAdapters
from nemoe_jax.inference.sampler import TokenCounts
from nemoe_jax.kernels.attention.paged import PAGE
from nemoe_jax.serving.engine import device
from nemoe_jax.serving.engine.device import DeviceState
from nemoe_jax.serving.engine.programs import Program
from nemoe_jax.serving.engine.runner import CHUNK, ModelRunner
from nemoe_jax.spec.config import preset
from nemoe_jax.spec.fp8_weight import abstract_model
from nemoe_jax.spec.mesh import make_mesh
from train.plan import absent_gpu, aot, hlo

SLOTS, TOKENS, TOPOLOGY = 8, 8192, "v5e:2x4"


class ShapesOnly(ModelRunner):
    """A runner for the compiler: its state is shapes."""

    def reset(self) -> None:
        """The state's shapes, as the program that makes it gives them."""
        start = device.start.lower(self.config, self.slots, *self._shape).compile()
        cache, counts = jax.tree.map(
            lambda array, place: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place),
            start.out_info,
            start.output_shardings,
        )
        self.width = cache.table_BM.shape[1]
        self._shapes = DeviceState(cache.k, cache.v, TokenCounts(*counts))


def main() -> None:
    """Compiles, prints, and says whether the limits are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every program, also the smaller ones of a kind")
    parser.add_argument("--gpu", action="store_true", help=f"for an H200 instead of a {TOPOLOGY}")
    parser.add_argument("--model", choices=MODELS, default="dense", help="default: dense")
    add_keep(parser)
    options = parser.parse_args()
    if options.gpu:
        if reason := absent_gpu.missing():
            return print(f"skipped: {reason}")
        devices = absent_gpu.absent_gpus("h200")
    else:
        if importlib.util.find_spec("libtpu") is None:
            return print("skipped: libtpu, the TPU compiler, is not installed: pip install 'nemoe-jax[tpu]'")
        from train.plan.plan import ENVIRONMENT

        os.environ.update(ENVIRONMENT)
        jax.config.update("jax_platforms", "cpu")  # nothing runs on what is compiled for
        devices = aot.topology_devices(TOPOLOGY)
    limit = aot.memory_limit(devices[0]) or sys.maxsize
    config = preset(MODELS[options.model])
    mesh = make_mesh({"tensor": len(devices)}, devices)
    figures: dict[str, Any] = {}
    missed = False
    with jax.set_mesh(mesh):
        params = abstract_model(config, jnp.bfloat16, mesh)
        adapters = LoadedAdapters(config, {}, None, jnp.bfloat16, mesh)
        runner = ShapesOnly(config, params, SLOTS, TOKENS, 1 + SLOTS * TOKENS // PAGE, jnp.bfloat16, adapters)
        pools = [leaf for leaf in jax.tree.leaves((runner._shapes.k, runner._shapes.v))]
        shares = [leaf.sharding.shard_shape(leaf.shape) for leaf in pools]
        pool = sum(math.prod(share) * leaf.dtype.itemsize for share, leaf in zip(shares, pools, strict=True))
        programs = [*runner.first_programs(), *runner.programs(True, {})]
        print(f"{len(programs)} programs; a chip's pool has {pool / 1e9:.2f} GB")
        for program in programs:
            largest = {"prefill": CHUNK, "decode": SLOTS}.get(program.kind, program.size)
            if not options.all and program.size != largest and program not in runner.first_programs():
                continue
            figures[str(program)] = found = measure(runner, program, shares)
            fits, in_place = found["bytes"] <= limit, found["aliased"] >= pool and not found["copies"]
            missed |= not (fits and in_place)
            print(f"{program!s:50}{found['bytes'] / 1e9:7.2f} GB, {found['aliased'] / 1e9:.2f} GB aliased,", end=" ")
            print(f"{found['copies']} copies of the pool, {found['seconds']:.0f} s", flush=True)
    if options.keep:
        place, packages = ("h200", ("jax",)) if options.gpu else (TOPOLOGY.replace(":", "-"), ("jax", "libtpu"))
        name = f"engine_compile-{place}{'' if options.model == 'dense' else '-' + options.model}"
        keep(name, {**machine(packages), "pool": pool, **figures})
    sys.exit(missed)


def measure(runner: ModelRunner, program: Program, shares: list[tuple[int, ...]]) -> dict[str, Any]:
    """A program's bytes on a chip, those that come out in place, and how often it copies a layer of the pool."""
    started = time.monotonic()
    compiled = runner.lower(program, None).compile()
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    text = aot.text_of(compiled)
    return {
        "bytes": total + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "copies": copies(hlo.parse(text), shares) if text else None,
        "seconds": time.monotonic() - started,
    }


if __name__ == "__main__":
    main()
