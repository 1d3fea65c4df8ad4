"""A step of decoding with weights in FP8 against bfloat16, compiled for TPUs or an H200 that need not be there.

    python -m benchmarks.hardware.fp8_decode                     (the dense 12B and 12B-16E, one row, on v6e and v5e)
    python -m benchmarks.hardware.fp8_decode --slice h200        (with JAX's CUDA plugin; see gpu_compile.py)
    python -m benchmarks.hardware.fp8_decode --slice h200 --rows 16

Of each program: bytes of weights and of temporaries on a device, which instructions make something as large as a whole
stack of linear maps, and how many products have both sides in FP8. Nothing is run. The limits: weights and temporaries
in FP8 at most 0.55 of bfloat16's, and no such copy.
"""

import argparse
import importlib.util
import math
import os
import sys
from typing import Any, NamedTuple

from benchmarks.hardware.tpu import MODELS, Work, lower
from train.plan import absent_gpu

RATIO = 0.55
SLICES = {"v6e:1x1": ("v6e:2x2", 1), "v5e:2x2": ("v5e:2x2", 4), "h200": None}  # topology, chips of it
CONTEXT = 4096
_NOTHING_NEW = ("parameter", "get-tuple-element", "bitcast", "tuple", "while")
_FLOATS = ("bf16", "f32", "f16", "f8e4m3fn")


class Step(NamedTuple):
    """Bytes on a device, the instructions that copy a stack, and products in FP8: None where there is no text."""

    weights: int
    temporaries: int
    copies: list[str] | None
    products: int | None

    @property
    def total(self) -> int:
        """Of both."""
        return self.weights + self.temporaries


def main() -> None:
    """Prints both programs side by side; exit status 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="default: both")
    parser.add_argument("--slice", choices=SLICES, help="default: those of TPUs")
    parser.add_argument("--rows", type=int, default=1, help="sequences of the batch (default 1)")
    options = parser.parse_args()
    if options.slice == "h200" and (reason := absent_gpu.missing()):
        return print(f"skipped: {reason}")
    if options.slice != "h200" and importlib.util.find_spec("libtpu") is None:
        print("skipped: libtpu, the TPU compiler, is not installed: pip install 'nemoe-jax[tpu]'")
        return
    from train.plan.plan import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    print(
        f"{'':24}{'GB weights':>12}{'temporaries':>13}{'total':>9}{'of bfloat16':>13}{'copies of a stack':>19}", end=""
    )
    print(f"{'FP8 products':>14}")
    kept = True
    for slice in [options.slice] if options.slice else [name for name in SLICES if name != "h200"]:
        for model in [options.model] if options.model else MODELS:
            wide = compiled_step(model, slice, Work(options.rows, CONTEXT, "bfloat16"))
            narrow = compiled_step(model, slice, Work(options.rows, CONTEXT, "bfloat16", fp8=True))
            show(f"{slice} {model} bfloat16", wide, "")
            ratio = narrow.total / wide.total
            show(f"{slice} {model} fp8", narrow, f"{ratio:.3f}")
            kept &= ratio <= RATIO and not narrow.copies
    sys.exit(not kept)


def compiled_step(model: str, slice: str, work: Work) -> Step:
    """The step of a model, compiled."""
    import jax

    from nemoe_jax.spec.config import preset
    from nemoe_jax.spec.fp8_weight import abstract_model
    from nemoe_jax.spec.mesh import make_mesh
    from train.plan import aot, hlo

    config = preset(MODELS[model])
    of_tpu = SLICES[slice]
    devices = aot.topology_devices(of_tpu[0])[: of_tpu[1]] if of_tpu else absent_gpu.absent_gpus("h200")
    mesh = make_mesh({"tensor": len(devices)}, devices)
    with jax.set_mesh(mesh):
        compiled = lower(config, mesh, work)[0].compile()
    shapes = jax.tree.leaves(abstract_model(config, "bfloat16", mesh, fp8=work.fp8))
    weights = sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in shapes)
    memory = compiled.memory_analysis()  # before the text, which libtpu may refuse
    text = aot.text_of(compiled)
    if text is None:
        return Step(weights, memory.temp_size_in_bytes, None, None)
    program = hlo.parse(text)
    return Step(weights, memory.temp_size_in_bytes, copies(program, config, mesh), products(program))


def products(program: Any) -> int:
    """Products of two arrays in FP8, each counted once however often it runs: XLA's own, and the library's."""
    return sum(
        (one.opcode in ("dot", "convolution") or "matmul$f8" in one.attributes)
        and all(program.computations[name][side].result[0].dtype == "f8e4m3fn" for side in one.operands[:2])
        for name, one in program
    )


def copies(program: Any, config: Any, mesh: Any) -> list[str]:
    """Instructions that make a whole stack of linear maps in a float dtype."""
    from nemoe_jax.spec.fp8_weight import is_quantized
    from nemoe_jax.spec.schema import declare, leaves
    from nemoe_jax.spec.sharding import axes_of, partition_spec

    stacks = set()
    for spec in leaves(declare(config)).values():
        if is_quantized(spec):
            cut = [math.prod(mesh.shape[name] for name in axes_of(entry)) for entry in partition_spec(spec, mesh.shape)]
            stacks.add(math.prod(spec.shape) // math.prod(cut))
    fused = {name for _, one in program if one.opcode == "fusion" for name in one.called}  # nothing in them is kept
    return [
        f"{one.opcode} {result.dtype}{list(result.shape)}"
        for name, one in program
        for result in one.result
        if name not in fused and one.opcode not in _NOTHING_NEW and result.dtype in _FLOATS and result.size in stacks
    ]


def show(name: str, step: Step, ratio: str) -> None:
    """A line of the table."""
    sizes = "".join(f"{size / 1e9:>{width}.3f}" for size, width in zip(step[:2], (12, 13), strict=True))
    found = "–" if step.copies is None else len(step.copies)
    print(f"{name:24}{sizes}{step.total / 1e9:>9.3f}{ratio:>13}{found:>19}", end="")
    print(f"{'–' if step.products is None else step.products:>14}", *(step.copies or [])[:3], flush=True)


if __name__ == "__main__":
    main()
