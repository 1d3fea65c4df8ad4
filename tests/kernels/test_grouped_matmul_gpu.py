import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from nemoe_jax.kernels.grouped_matmul.gpu import (
    Blocks,
    gpu_few_rows,
    gpu_few_rows_experts,
    gpu_matmul,
    gpu_outer,
    row_blocks,
    tiles_at_most,
)

ROWS, INPUTS, OUTPUTS = 300, 36, 24  # neither are multiples of a block, and there are more tiles than a band has
GROUPS = {
    "even": [60, 60, 60, 60, 60],
    "empty experts": [0, 157, 0, 143, 0],
    "one takes all": [0, 0, 300, 0, 0],
    "not multiples of a tile": [1, 133, 17, 64, 85],
    "rows left over": [20, 0, 30, 111, 0],  # the rest belong to experts elsewhere
    "no rows at all": [0, 0, 0, 0, 0],
}
PROBLEMS = [*((name, jnp.float32) for name in GROUPS), ("rows left over", jnp.bfloat16)]

CARD = jax.sharding.AbstractDevice("NVIDIA H200", None, "gpu")  # newer versions of JAX ask for one to lower for
MESH = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=CARD)

matmul = jax.jit(functools.partial(gpu_matmul, interpret=True), static_argnames=("transpose", "blocks"))
outer = jax.jit(functools.partial(gpu_outer, interpret=True), static_argnames="blocks")


def problem(sizes, dtype, rows=ROWS):
    """Rows, weights and gradients; what the rows of no group hold is not a number."""
    random = np.random.default_rng(0)
    x, w, dy = (random.normal(size=s) for s in ((rows, INPUTS), (len(sizes), INPUTS, OUTPUTS), (rows, OUTPUTS)))
    for array in (x, dy):
        array[sum(sizes) :] = np.nan
    return *(jnp.asarray(array, dtype) for array in (x, w, dy)), jnp.asarray(sizes, jnp.int32)


def check(got, expected, dtype):
    expected = np.asarray(expected, np.float32)
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize(("name", "dtype"), PROBLEMS)
def test_products_and_both_gradients_equal_one_row_at_a_time(name, dtype):
    sizes = GROUPS[name]
    x, w, dy, sizes_E = problem(sizes, dtype)
    expert_of_row, used = np.repeat(np.arange(len(sizes)), sizes), sum(sizes)
    plain_x, plain_w, plain_dy = (np.asarray(array, np.float32) for array in (x, w, dy))
    y = np.zeros((used, OUTPUTS))
    dx = np.zeros((used, INPUTS))
    dw = np.zeros(w.shape)
    for row, expert in enumerate(expert_of_row):
        y[row] = plain_x[row] @ plain_w[expert]
        dx[row] = plain_w[expert] @ plain_dy[row]
        dw[expert] += np.outer(plain_x[row], plain_dy[row])
    check(matmul(x, w, sizes_E)[:used], y, dtype)
    check(matmul(dy, w, sizes_E, transpose=True)[:used], dx, dtype)
    got = outer(x, dy, sizes_E)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, dw, atol=1e-4)


@pytest.mark.parametrize("sizes", [[1, 0], [0, 2], [0, 0]], ids=str)
def test_fewer_rows_than_a_tile_has(sizes):
    x, w, dy, sizes_E = problem(sizes, jnp.float32, rows=2)
    used, expert = sum(sizes), int(np.argmax(sizes))
    check(matmul(x, w, sizes_E)[:used], x[:used] @ w[expert], jnp.float32)
    check(outer(x, dy, sizes_E)[expert], x[:used].T @ dy[:used], jnp.float32)


def test_blocks_of_any_form_give_the_same():
    x, w, dy, sizes_E = problem(GROUPS["not multiples of a tile"], jnp.float32)
    blocks = Blocks(rows=64, columns=16, inner=16, warps=4, stages=1)
    check(matmul(x, w, sizes_E, blocks=blocks), matmul(x, w, sizes_E), jnp.float32)
    check(outer(x, dy, sizes_E, blocks=blocks), outer(x, dy, sizes_E), jnp.float32)


@pytest.mark.parametrize(("rows", "experts"), [(32768, 16), (8192, 16), (4096, 16), (65536, 64), (8, 16), (1, 16)])
def test_tiles_hold_all_rows_however_they_are_spread(rows, experts):
    tile = row_blocks(rows, experts, jnp.bfloat16).rows
    bound = tiles_at_most(rows, experts, tile)
    random = np.random.default_rng(0)
    spreads = [random.multinomial(rows, random.dirichlet(np.full(experts, how))) for how in (0.1, 1.0, 10.0)]
    worst = np.zeros(experts, int)  # a single row in the last tile of as many experts as can be
    worst[: min(rows, experts)] = 1
    worst[0] += (rows - worst.sum()) // tile * tile
    for sizes in [*spreads, worst]:
        assert np.sum(-(-sizes // tile)) <= bound
    assert np.sum(-(-worst // tile)) >= bound - 1


@pytest.mark.parametrize(("rows", "experts"), [(32768, 16), (8192, 16), (8192, 32), (65536, 64)])
def test_half_filled_tiles_waste_at_most_an_eighth(rows, experts):
    tile = row_blocks(rows, experts, jnp.bfloat16).rows
    assert tiles_at_most(rows, experts, tile) * tile <= 1.125 * rows


def test_few_rows_read_their_layers_matrices():
    random = np.random.default_rng(0)
    x, w = (random.normal(size=shape).astype(np.float32) for shape in ((5, INPUTS), (3, 4, INPUTS, OUTPUTS)))
    expert_R = jnp.asarray([3, 0, 0, 2, 3])
    got = jax.jit(functools.partial(gpu_few_rows_experts, interpret=True))(x, w, jnp.int32(2), expert_R)
    check(got, np.einsum("rd,rdf->rf", x, w[2, np.asarray(expert_R)]), jnp.float32)
    check(gpu_few_rows(x, w[1], 3, interpret=True), x @ w[1, 3], jnp.float32)
    narrow = jnp.asarray(w[1], jnp.float8_e4m3fn)
    check(gpu_few_rows(x, narrow, 3, interpret=True), x @ narrow[3].astype(jnp.float32), jnp.float32)


def lowered(function, *arrays):
    """The program for a card that is not there."""
    with jax.sharding.use_abstract_mesh(MESH):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_layers_of_a_scan_are_not_copied():
    """Stacks that a scan closes over go into the kernel whole."""
    x, w, sizes_E = shapes(16, 256, 256)[0], jax.ShapeDtypeStruct((8, 16, 256, 256), jnp.bfloat16), shapes(16, 1, 1)[3]

    def model(x, w, sizes_E):
        def layer(x, number):
            matrix_E = number * 16 + jnp.arange(16, dtype=jnp.int32)
            return gpu_matmul(x, w.reshape(-1, *w.shape[2:]), sizes_E, matrix_E), None

        return lax.scan(layer, x, jnp.arange(8))[0]

    program = lowered(model, x, w, sizes_E)
    assert "tensor<128x256x256xbf16>" in program and "1x16x256x256" not in program


def shapes(rows, inputs, outputs, dtype=jnp.bfloat16):
    expected = (((rows, inputs), dtype), ((16, inputs, outputs), dtype), ((rows, outputs), dtype), ((16,), jnp.int32))
    return [jax.ShapeDtypeStruct(*one) for one in expected]


@pytest.mark.parametrize("rows", [32768, 64], ids=["many rows", "few rows"])
def test_programs_for_cuda_are_one_kernel_that_reads_its_operands_as_they_lie(rows):
    x, w, dy, sizes_E = shapes(rows, 5120, 896)
    for function, arrays in (
        (gpu_matmul, (x, w, sizes_E)),
        (functools.partial(gpu_matmul, transpose=True), (dy, w, sizes_E)),
        (gpu_outer, (x, dy, sizes_E)),
    ):
        program = lowered(function, *arrays)
        assert program.count("stablehlo.custom_call") == 1
        for copy in ("stablehlo.pad", "stablehlo.transpose", "stablehlo.dot_general", "stablehlo.convert"):
            assert copy not in program


def test_other_platforms_compile_without_it():
    x, w, _, sizes_E = problem(GROUPS["even"], jnp.float32)

    def anywhere(x, w, sizes_E):
        return lax.platform_dependent(x, w, sizes_E, cuda=gpu_matmul, default=lax.ragged_dot)

    check(jax.jit(anywhere)(x, w, sizes_E), lax.ragged_dot(x, w, sizes_E), jnp.float32)
    assert "triton" not in jax.jit(anywhere).lower(x, w, sizes_E).as_text()
    assert "triton" in lowered(anywhere, x, w, sizes_E)
