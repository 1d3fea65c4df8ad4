import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax import grouped_matmul as module
from nemoe_jax.grouped_matmul import grouped_matmul, tile_plan, tile_rows

GROUPS = {
    "even": [40, 40, 40],
    "empty experts": [0, 57, 0, 63, 0],
    "one takes all": [0, 0, 119, 0],
    "not multiples of a tile": [1, 33, 7, 64, 15],
    "rows left over": [20, 30, 11],  # the rest belong to experts elsewhere
    "a single row": [0, 1],
}
ROWS = {"rows left over": 100}


def oracle(x, w, sizes):
    """One row at a time."""
    expert_of_row = np.repeat(np.arange(len(sizes)), sizes)
    return np.stack([x[row] @ w[expert] for row, expert in enumerate(expert_of_row)])


def problem(name, dtype=np.float32):
    sizes = GROUPS[name]
    random = np.random.default_rng(0)
    rows = ROWS.get(name, sum(sizes))
    x = random.normal(size=(rows, 13)).astype(np.float32)
    w = random.normal(size=(len(sizes), 13, 9)).astype(np.float32)
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32), sum(sizes)


@pytest.mark.parametrize("name", GROUPS)
def test_equals_one_row_at_a_time(name):
    x, w, sizes, used = problem(name)
    got = jax.jit(grouped_matmul)(x, w, sizes)[:used]
    np.testing.assert_allclose(got, oracle(np.asarray(x), np.asarray(w), GROUPS[name]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", GROUPS)
def test_gradients_equal_those_of_the_oracle(name):
    x, w, sizes, used = problem(name)
    experts = jnp.asarray(np.repeat(np.arange(len(GROUPS[name])), GROUPS[name]))

    def plain(x, w):
        return jnp.sum(jnp.sin(jnp.einsum("rd,rdf->rf", x[:used], w[experts])))

    def grouped(x, w):
        return jnp.sum(jnp.sin(grouped_matmul(x, w, sizes)[:used]))

    wanted_x, wanted_w = jax.grad(plain, (0, 1))(x, w)
    got_x, got_w = jax.jit(jax.grad(grouped, (0, 1)))(x, w)
    np.testing.assert_allclose(got_x[:used], wanted_x[:used], atol=1e-4)
    np.testing.assert_allclose(got_w, wanted_w, atol=1e-4)


@pytest.mark.parametrize("name", GROUPS)
def test_the_kernels_of_other_backends_are_given_the_same_problem(name):
    """`ragged_dot` runs here too, slowly: what TPU and GPU are asked for equals what the tiles compute."""
    x, w, sizes, used = problem(name)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(len(x), w.shape[2])), jnp.float32)
    pairs = [
        (module._ragged_matmul(x, w, sizes)[:used], module._tiled_matmul(x, w, sizes)[:used]),
        (
            module._ragged_matmul_transposed(dy, w, sizes)[:used],
            module._tiled_matmul(dy, w, sizes, transpose=True)[:used],
        ),
        (module._ragged_outer(x, dy, sizes), module._tiled_outer(x, dy, sizes)),
    ]
    for ragged, tiled in pairs:
        np.testing.assert_allclose(ragged, tiled, atol=2e-5)


def test_bfloat16_accumulates_in_float32():
    x, w, sizes, _ = problem("even", jnp.bfloat16)
    got = np.asarray(grouped_matmul(x, w, sizes), np.float32)
    assert grouped_matmul(x, w, sizes).dtype == jnp.bfloat16
    wanted = oracle(np.asarray(x, np.float32), np.asarray(w, np.float32), GROUPS["even"])
    np.testing.assert_allclose(got, wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", GROUPS)
def test_tiles_cover_every_row_of_its_own_expert_once(name):
    sizes = np.array(GROUPS[name])
    rows = ROWS.get(name, int(sizes.sum()))
    tile = tile_rows(rows, len(sizes))
    count, expert, first, end = (np.asarray(part) for part in tile_plan(jnp.asarray(sizes), tile, rows))
    assert count <= len(expert)
    owner = np.full(rows, -1)
    for number in range(count):
        covered = np.arange(first[number], min(first[number] + tile, end[number]))
        assert (owner[covered] == -1).all()
        owner[covered] = expert[number]
    np.testing.assert_array_equal(owner[: sizes.sum()], np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize(("rows", "experts"), [(2048, 16), (8192, 16), (8192, 32), (4096, 64), (65536, 16)])
def test_half_filled_tiles_waste_at_most_an_eighth(rows, experts):
    tile = tile_rows(rows, experts)
    assert (rows // tile + experts) * tile <= 1.125 * rows
