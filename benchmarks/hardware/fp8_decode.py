"""A step of decoding with weights in FP8 against bfloat16, by the TPU compiler: libtpu is expected, but no TPU.

    python -m benchmarks.hardware.fp8_decode                     (the dense 12B and 12B-16E, one row, on v6e and v5e)

Of each program: bytes of weights and of temporaries on a device, and which instructions make something as large as a
whole stack of linear maps in a wider dtype. Nothing is run. The limits: weights and temporaries in FP8 at most 0.55 of
bfloat16's, and no such copy.
"""

import argparse
import importlib.util
import math
import os
import sys
from typing import Any, NamedTuple

from benchmarks.hardware.tpu import MODELS, Work, lower

RATIO = 0.55
SLICES = {"v6e:1x1": ("v6e:2x2", 1), "v5e:2x2": ("v5e:2x2", 4)}  # topology, chips of it
CONTEXT = 4096
_NOTHING_NEW = ("parameter", "get-tuple-element", "bitcast", "tuple", "while")
_WIDE = ("bf16", "f32", "f16")


class Step(NamedTuple):
    """Bytes on a device, and the instructions that copy a stack: None where libtpu does not give the text."""

    weights: int
    temporaries: int
    copies: list[str] | None

    @property
    def total(self) -> int:
        """Of both."""
        return self.weights + self.temporaries


def main() -> None:
    """Prints both programs side by side; exit status 1 where a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="default: both")
    parser.add_argument("--slice", choices=SLICES, help="default: both")
    parser.add_argument("--rows", type=int, default=1, help="sequences of the batch (default 1)")
    options = parser.parse_args()
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: libtpu, the TPU compiler, is not installed: pip install 'nemoe-jax[tpu]'")
        return
    from train.plan.plan import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    print(f"{'':24}{'GB weights':>12}{'temporaries':>13}{'total':>9}{'of bfloat16':>13}{'copies of a stack':>19}")
    kept = True
    for slice in [options.slice] if options.slice else SLICES:
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
    from train.plan import aot

    config = preset(MODELS[model])
    topology, chips = SLICES[slice]
    devices = aot.topology_devices(topology)[:chips]
    mesh = make_mesh({"tensor": chips}, devices)
    with jax.set_mesh(mesh):
        compiled = lower(config, mesh, work)[0].compile()
    shapes = jax.tree.leaves(abstract_model(config, "bfloat16", mesh, fp8=work.fp8))
    weights = sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in shapes)
    memory = compiled.memory_analysis()  # before the text, which libtpu may refuse
    text = aot.text_of(compiled)
    return Step(weights, memory.temp_size_in_bytes, None if text is None else copies(text, config, mesh))


def copies(text: str, config: Any, mesh: Any) -> list[str]:
    """Instructions that make a whole stack of linear maps in a float dtype of two bytes or more."""
    from nemoe_jax.spec.fp8_weight import is_quantized
    from nemoe_jax.spec.schema import declare, leaves
    from nemoe_jax.spec.sharding import axes_of, partition_spec
    from train.plan import hlo

    stacks = set()
    for spec in leaves(declare(config)).values():
        if is_quantized(spec):
            cut = [math.prod(mesh.shape[name] for name in axes_of(entry)) for entry in partition_spec(spec, mesh.shape)]
            stacks.add(math.prod(spec.shape) // math.prod(cut))
    program = hlo.parse(text)
    fused = {name for _, one in program if one.opcode == "fusion" for name in one.called}  # nothing in them is kept
    return [
        f"{one.opcode} {result.dtype}{list(result.shape)}"
        for name, one in program
        for result in one.result
        if name not in fused and one.opcode not in _NOTHING_NEW and result.dtype in _WIDE and result.size in stacks
    ]


def show(name: str, step: Step, ratio: str) -> None:
    """A line of the table."""
    sizes = "".join(f"{size / 1e9:>{width}.3f}" for size, width in zip(step[:2], (12, 13), strict=True))
    found = "–" if step.copies is None else len(step.copies)
    print(f"{name:24}{sizes}{step.total / 1e9:>9.3f}{ratio:>13}{found:>19}", *(step.copies or [])[:3])


if __name__ == "__main__":
    main()
