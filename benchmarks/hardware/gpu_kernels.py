"""The kernels among which an NVIDIA GPU has to choose, timed in turn at the sizes of the 12B with 16 experts, bfloat16.

    python -m benchmarks.hardware.gpu_kernels          (four minutes)
    python -m benchmarks.hardware.gpu_kernels --tiny  (on CPU, kernels interpreted; its figures mean nothing)

- Grouped matmul forward, and both of its gradients, of 8192 tokens and of one: ours with several blocks, XLA's
  `ragged_dot`, JAX's kernels for Hopper, tokamax's where it is installed. Tokens are spread unevenly; "equal groups" is
  a batched product without that, for comparison. Named limit: the card's rate of products, of reading for one token.
- One token times a layer of stacked weights that is not an MoE model: ours, and XLA's in two spellings.
- Attention of 8192 tokens, forward alone and with its gradient: cuDNN, Pallas for packed documents, the chunked form,
  XLA's plain one.
- Attention of one query over the pages of a cache.

What a kernel does not take is printed with its reason. There is no limit to miss: the figures decide what the model
uses (`*` marks it).
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.hardware.gpu import rates
from benchmarks.lib.results import keep, machine
from nemoe_jax.kernels.attention.gpu import gpu_attention, packed_attention
from nemoe_jax.kernels.attention.paged import PAGE, gpu_paged_attention
from nemoe_jax.kernels.attention.xla import flash_attention_xla
from nemoe_jax.kernels.grouped_matmul.gpu import Blocks, gpu_few_rows, gpu_matmul, gpu_outer, outer_blocks, row_blocks
from nemoe_jax.spec.config import preset

MANY = [
    Blocks(rows, columns, inner, warps, stages)
    for rows, columns, warps in ((256, 128, 8), (128, 256, 8), (128, 128, 4), (64, 256, 4))
    for inner, stages in ((64, 3), (64, 4), (32, 4))
]
FEW = [
    Blocks(16, columns, inner, 4, stages)
    for columns in (16, 32, 64, 128)
    for inner, stages in ((64, 8), (128, 4), (128, 6), (256, 3))
]

Kernel = Callable[..., Any]  # takes the number of the repetition, then arrays
Case = tuple[dict[str, Kernel], tuple[Any, ...], float]  # kernels, their arrays, the work of one repetition


def repeated(kernel: Kernel, count: int) -> Kernel:
    """A compiled loop over the kernel whose repetitions wait for each other, so that starting them costs nothing."""

    @jax.jit
    def run(first, *rest):
        def step(number, first):
            result = jax.tree.leaves(lax.optimization_barrier(kernel(number, first, *rest)))[0]
            return first.at[(0,) * first.ndim].set(result[(0,) * result.ndim].astype(first.dtype))

        return lax.fori_loop(0, count, step, first)

    return run


def measure(case: Case, count: int, repeats: int) -> dict[str, Any]:
    """{kernel: seconds of one repetition, or why it cannot be}; all are compiled first, then take turns."""
    kernels, arrays, _ = case
    compiled, figures = {}, {}
    for name, kernel in kernels.items():
        try:
            compiled[name] = repeated(kernel, count)
            compiled[name](*arrays).block_until_ready()
        except Exception as error:  # whatever it is: it is about this kernel alone
            del compiled[name]
            figures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, run in compiled.items():
            started = time.perf_counter()
            run(*arrays).block_until_ready()
            seconds[name].append((time.perf_counter() - started) / count)
    return figures | {name: statistics.median(each) for name, each in seconds.items()}


def grouped(tokens: int, tiny: bool) -> dict[str, Case]:
    """The products of an expert's two maps with the rows of so many tokens."""
    config = preset("nemoe-12b-16e")
    experts, rows = config.experts, tokens * config.top_k
    sizes = {"gate": (config.hidden, config.expert_ffn), "down": (config.expert_ffn, config.hidden)}
    if tiny:
        sizes = {"gate": (128, 64)}
    random = np.random.default_rng(0)
    chosen = np.concatenate([random.permutation(experts)[: config.top_k] for _ in range(tokens)])
    if tokens > 1:  # some experts are better liked
        chosen = random.choice(experts, rows, p=random.dirichlet(np.full(experts, 10.0)))
    sizes_E = jnp.asarray(np.bincount(chosen, minlength=experts), jnp.int32)
    return {
        f"{name} {kind}, {tokens} tokens": case
        for name, (inputs, outputs) in sizes.items()
        for kind, case in _products(rows, inputs, outputs, sizes_E, tokens == 1, tiny).items()
    }


def _products(rows: int, inputs: int, outputs: int, sizes_E: Any, few: bool, tiny: bool) -> dict[str, Case]:
    experts = len(sizes_E)
    x, w, dy = (
        jax.random.normal(jax.random.key(number), shape, jnp.bfloat16)
        for number, shape in enumerate(((rows, inputs), (experts, inputs, outputs), (rows, outputs)))
    )
    candidates = (FEW if few else MANY)[: 1 if tiny else None]
    # other experts in each repetition, so that a few experts' weights are not found in the cache
    roll = jnp.roll
    matmul = functools.partial(gpu_matmul, interpret=tiny)
    outer = functools.partial(gpu_outer, interpret=tiny)
    ours: dict[str, dict[str, Kernel]] = {"forward": {}, "dx": {}, "dw": {}}
    for blocks in dict.fromkeys([row_blocks(rows, experts, x.dtype), *candidates]):
        of_ours = _named(blocks, row_blocks(rows, experts, x.dtype))
        ours["forward"][of_ours] = lambda i, x, w, s, b=blocks: matmul(x, w, roll(s, i), blocks=b)
        ours["dx"][of_ours] = lambda i, dy, w, s, b=blocks: matmul(dy, w, roll(s, i), transpose=True, blocks=b)
    for blocks in dict.fromkeys([outer_blocks(x.dtype), *candidates]):
        ours["dw"][_named(blocks, outer_blocks(x.dtype))] = lambda i, x, dy, s, b=blocks: outer(x, dy, roll(s, i), b)
    ours["forward"] |= {"ragged_dot": lambda i, x, w, s: lax.ragged_dot(x, w, roll(s, i))}
    ours["dx"] |= {"ragged_dot": lambda i, dy, w, s: lax.ragged_dot(dy, w.swapaxes(1, 2), roll(s, i))}
    over_rows = lax.RaggedDotDimensionNumbers(
        (((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    ours["dw"] |= {"ragged_dot": lambda i, x, dy, s: lax.ragged_dot_general(x, dy, roll(s, i), over_rows)}
    for kind, others in _hopper().items():
        ours[kind] |= others
    ours["forward"] |= _tokamax()
    if rows % experts == 0:
        equal = functools.partial(jnp.einsum, "emd,edf->emf")
        ours["forward"]["equal groups"] = lambda i, x, w, s: equal(x.reshape(experts, -1, inputs), w)
    work = 2.0 * rows * inputs * outputs
    if few:  # bytes of the weights that are read
        work = 2.0 * inputs * outputs * int((sizes_E > 0).sum())
    cases = {"forward": (ours["forward"], (x, w, sizes_E), work), "dx": (ours["dx"], (dy, w, sizes_E), work)}
    return cases if few else cases | {"dw": (ours["dw"], (x, dy, sizes_E), work)}


def _named(blocks: Blocks, chosen: Blocks) -> str:
    return f"Triton {blocks.rows}x{blocks.columns}x{blocks.inner} {blocks.warps}/{blocks.stages}" + (
        " *" if blocks == chosen else ""
    )


def _hopper() -> dict[str, dict[str, Kernel]]:
    """JAX's kernels for Hopper."""

    def matmul(x, w, sizes_E, transpose):
        from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

        blocks = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 1}
        return ragged_dot(x, w, group_sizes=sizes_E, transpose_rhs=transpose, **blocks)

    def outer(x, dy, sizes_E):
        from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

        blocks = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 1}
        return transposed_ragged_dot(x, dy, group_sizes=sizes_E, **blocks)

    return {
        "forward": {"JAX's for Hopper": lambda i, x, w, s: matmul(x, w, jnp.roll(s, i), False)},
        "dx": {"JAX's for Hopper": lambda i, dy, w, s: matmul(dy, w, jnp.roll(s, i), True)},
        "dw": {"JAX's for Hopper": lambda i, x, dy, s: outer(x, dy, jnp.roll(s, i))},
    }


def _tokamax() -> dict[str, Kernel]:
    def kernel(i, x, w, sizes_E, implementation):
        import tokamax

        return tokamax.ragged_dot(x, w, jnp.roll(sizes_E, i), implementation=implementation)

    return {f"tokamax {name}": functools.partial(kernel, implementation=name) for name in ("mosaic", "triton")}


def stacked(tokens: int, tiny: bool) -> dict[str, Case]:
    """Few tokens times one layer after the other of queries' or keys' projections, or the head; work is the bytes."""
    sizes = {"query": (8, 5120, 4096), "key": (8, 5120, 1024), "head": (1, 5120, 131072)}
    if tiny:
        sizes = {"query": (2, 64, 32)}
    cases: dict[str, Case] = {}
    for name, (layers, inputs, outputs) in sizes.items():
        w = jax.random.normal(jax.random.key(0), (layers, inputs, outputs), jnp.bfloat16)
        x = jax.random.normal(jax.random.key(1), (tokens, inputs), jnp.bfloat16)
        kernels: dict[str, Kernel] = {
            "Triton *": lambda i, x, w: gpu_few_rows(x, w, i % len(w), interpret=tiny),
            "XLA's product": lambda i, x, w: x @ w[i % len(w)],
            "XLA's sum": lambda i, x, w: jnp.sum(x[:, :, None].astype(jnp.float32) * w[i % len(w)], axis=1),
        }
        cases[f"{name} of {tokens} tokens"] = (kernels, (x, w), 2.0 * inputs * outputs)
    return cases


def attention(length: int, tiny: bool) -> dict[str, Case]:
    """Whole rows and packed ones, forward and with the gradient."""
    heads, kv_heads, width = (4, 2, 16) if tiny else (32, 8, 128)
    q, k, v = (
        jax.random.normal(jax.random.key(heads), (1, length, heads, width), jnp.bfloat16)
        for heads in (heads, kv_heads, kv_heads)
    )
    segments = (jnp.arange(length) // max(length // 8, 1))[None]
    packed = functools.partial(packed_attention, interpret=tiny)
    one = jnp.ones_like(segments)
    whole: dict[str, Any] = {
        "cuDNN *": lambda q, k, v: gpu_attention(q, k, v, None),
        "Pallas": lambda q, k, v: packed(q, k, v, one),
        "chunked": lambda q, k, v: flash_attention_xla(q, k, v, None),
        "XLA's": lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla"),
    }
    of_packed: dict[str, Any] = {
        "Pallas *": lambda q, k, v: packed(q, k, v, segments),
        "chunked": lambda q, k, v: flash_attention_xla(q, k, v, segments),
        "cuDNN with a mask": lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, mask=(segments[:, :, None] == segments[:, None])[:, None], is_causal=True, implementation="cudnn"
        ),
    }

    def gradient(function: Any) -> Kernel:
        summed = jax.grad(lambda q, k, v: function(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))
        return lambda i, q, k, v: summed(q, k, v)

    work = 2.0 * length * (length + 1) * heads * width
    cases: dict[str, Case] = {}
    for name, kernels in (("whole", whole), ("packed", of_packed)):
        plain = {kernel: lambda i, q, k, v, f=function: f(q, k, v) for kernel, function in kernels.items()}
        both = {kernel: gradient(function) for kernel, function in kernels.items()}
        cases[f"attention, {name}, {length} tokens"] = (plain, (q, k, v), work)
        cases[f"attention with gradient, {name}, {length} tokens"] = (both, (q, k, v), 3.5 * work)
    return cases


def pages(length: int, tiny: bool) -> dict[str, Case]:
    """One query over so many tokens in the cache's pages, in bfloat16 and int8; work is the bytes read."""
    heads, kv_heads, width = (8, 2, 32) if tiny else (32, 8, 128)
    held = length // PAGE
    q = jax.random.normal(jax.random.key(0), (1, heads, width), jnp.bfloat16)
    pool = jax.random.normal(jax.random.key(1), (kv_heads, held, PAGE, width), jnp.bfloat16)
    scales = jnp.ones(pool.shape[:-1], jnp.float32)
    table = jnp.asarray(np.random.default_rng(0).permutation(held)[None], jnp.int32)
    lengths = jnp.full(1, length, jnp.int32)
    paged = functools.partial(gpu_paged_attention, interpret=tiny)
    whole = {"Pallas *": lambda i, q, pool, table, lengths: paged(q, pool, pool, lengths, table)}
    quantized = {"Pallas *": lambda i, q, pool, table, lengths, s: paged(q, pool, pool, lengths, table, s, s)}
    name = f"one query over {length} tokens"
    return {
        f"{name}, bfloat16": (whole, (q, pool, table, lengths), 2.0 * pool.nbytes),
        f"{name}, int8": (quantized, (q, pool.astype(jnp.int8), table, lengths, scales), 1.0 * pool.nbytes),
    }


def main() -> None:
    """Times everything, prints it, keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a pass; default: 8192")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; default: 5")
    parser.add_argument("--tiny", action="store_true", help="a dry run on CPU")
    options = parser.parse_args()
    if not options.tiny and jax.default_backend() != "gpu":
        return print("skipped: JAX finds no GPU")
    if options.tiny:
        options.tokens, options.repeats = 64, 1
    device = jax.local_devices()[0].device_kind
    figures: dict[str, Any] = {**machine(), "device": device, **rates(options), "cases": {}}
    print(f"{device}: {figures['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s, ", end="")
    print(f"{figures['bytes_per_second'] / 1e12:.2f} TB/s")
    for make, size, count in (
        (grouped, options.tokens, 8),
        (grouped, 1, 64),
        (stacked, 1, 64),
        (stacked, 8, 64),
        (attention, options.tokens, 4),
        (pages, 4 * options.tokens, 64),
    ):
        for name, case in make(size, options.tiny).items():
            seconds = measure(case, 1 if options.tiny else count, options.repeats)
            figures["cases"][name] = {"work": case[2], "seconds": seconds}
            print(name)
            for kernel, result in sorted(seconds.items(), key=lambda one: (isinstance(one[1], str), one[1])):
                said = (
                    result if isinstance(result, str) else f"{case[2] / result / 1e12:8.2f} T/s {result * 1e6:10.1f} us"
                )
                print(f"  {kernel:26} {said}")
    if not options.tiny:
        keep("gpu_kernels-" + device.lower().replace("nvidia ", "").replace(" ", "-"), figures)


if __name__ == "__main__":
    main()
