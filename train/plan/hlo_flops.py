"""FLOPs that a compiled program executes, counted in its HLO, and the cycles that the TPU compiler expects."""

import functools
import math
import re
from collections.abc import Callable

import numpy as np

from train.plan import hlo

KernelFlops = Callable[[hlo.Instruction, hlo.Computation], float]


def executed_flops(
    program: hlo.Program,
    of_kernel: KernelFlops = lambda kernel, computation: 0.0,
    counts: Callable[[hlo.Instruction], bool] = lambda one: True,
) -> float:
    """FLOPs of the matrix products and kernels that one device runs; what goes element by element is left out.

    Args:
        of_kernel: FLOPs of a `tpu_custom_call` that carries no estimate, given it and its computation.
        counts: whether an instruction is counted.
    """
    return sum(
        program.times[name] * _flops(one, program.computations[name], of_kernel) / program.ragged_groups.get(name, 1)
        for name, one in program
        if counts(one)
    )


def estimated_cycles(program: hlo.Program, counts: Callable[[hlo.Instruction], bool] = lambda one: True) -> int:
    """The TPU compiler's estimates, summed over what one device runs. Kernels carry none.

    Those of a ragged dot are left out: they count the tiles that it skips.

    Args:
        counts: whether an instruction is counted.
    """
    cycles = 0
    for name, one in program:
        found = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        ragged = '"is_ragged_dot":true' in one.attributes or name in program.ragged_groups
        if found and counts(one) and not ragged:
            cycles += program.times[name] * int(found[1])
    return cycles


def attention_kernel_flops(kernel: hlo.Instruction, computation: hlo.Computation) -> float:
    """FLOPs of a call of splash attention's kernels, which carry no estimate; 0 for other kernels.

    Forward multiplies two pairs of matrices, the gradients of keys and values four, that of queries three; one kernel
    for all gradients five. Its blocks above the diagonal are left out: of n · n, n · (n + 1) / 2 are computed.
    """
    found = re.match(r"splash_m[hq]a_(fwd|dkv|dq)", kernel.name)
    if found is None:
        return 0.0
    blocks, queries, keys = (computation[kernel.operands[number]].result[0].shape for number in (0, 2, 3))
    share = (blocks[-2] + 1) / (2 * blocks[-2])
    fused = any(len(one.shape) > len(queries) for one in kernel.result)  # of the queries' gradient, a part a block
    return {"fwd": 2, "dkv": 5 if fused else 4, "dq": 3}[found[1]] * 2.0 * math.prod(queries) * keys[-2] * share


def _flops(instruction: hlo.Instruction, computation: hlo.Computation, of_kernel: KernelFlops) -> float:
    if instruction.opcode == "dot":
        shape = computation[instruction.operands[0]].result[0].shape
        contracted = [int(axis) for axis in (instruction.attribute("lhs_contracting_dims") or "").split(",") if axis]
        return 2.0 * instruction.result[0].size * math.prod(shape[axis] for axis in contracted)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, computation)
    if instruction.opcode == "custom-call" and 'target="tpu_custom_call"' in instruction.attributes:
        estimate = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
        return float(estimate[1]) if estimate else of_kernel(instruction, computation)
    return 0.0


def _convolution_flops(instruction: hlo.Instruction, computation: hlo.Computation) -> float:
    """Products with padding do not count: TPUs write a batched matmul as a window that slides over padding."""
    left, kernel = (computation[name].result[0].shape for name in instruction.operands[:2])
    output = instruction.result[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0.0
    window = dict(re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window") or ""))

    def of_axis(key: str, axis: int, otherwise: int) -> int:
        return int(window[key].split("x")[axis].split("_")[0]) if key in window else otherwise

    total = 2.0 * output[labels[3].index("b")] * output[labels[3].index("f")] * kernel[labels[2].index("i")]
    for axis in range(len(labels[1]) - 2):
        sizes = [
            shape[names.index(str(axis))] for shape, names in zip((left, kernel, output), labels.groups(), strict=True)
        ]
        total *= _pairs(
            *sizes,
            stride=of_axis("stride", axis, 1),
            low=of_axis("pad", axis, 0),
            left_dilation=of_axis("lhs_dilate", axis, 1),
            kernel_dilation=of_axis("rhs_dilate", axis, 1),
        )
    return total


@functools.lru_cache(maxsize=4096)
def _pairs(
    left: int, kernel: int, output: int, *, stride: int, low: int, left_dilation: int, kernel_dilation: int
) -> int:
    """(place in the output, place in the kernel) pairs that meet an element of the left side."""
    count = 0
    for place in range(kernel):
        at = np.arange(output) * stride + place * kernel_dilation - low
        count += int(np.sum((at >= 0) & (at % left_dilation == 0) & (at // left_dilation < left)))
    return count
