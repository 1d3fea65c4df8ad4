import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.kernels.grouped_matmul import dispatch as module
from nemoe_jax.kernels.grouped_matmul.cpu import for_each_tile, tile_rows
from nemoe_jax.kernels.grouped_matmul.dispatch import grouped_matmul

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
    arrays = x.astype(dtype), w.astype(dtype), np.int32(sizes)
    return *jax.device_put(arrays), sum(sizes)


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

    wanted_x, wanted_w = jax.jit(jax.grad(plain, (0, 1)))(x, w)
    got_x, got_w = jax.jit(jax.grad(grouped, (0, 1)))(x, w)
    np.testing.assert_allclose(got_x[:used], wanted_x[:used], atol=1e-4)
    np.testing.assert_allclose(got_w, wanted_w, atol=1e-4)


@pytest.mark.parametrize("name", GROUPS)
def test_the_kernels_of_other_backends_are_given_the_same_problem(name):
    """`ragged_dot` runs here too, slowly: what TPU and GPU are asked for equals what the tiles compute."""
    x, w, sizes, used = problem(name)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(len(x), w.shape[2])), jnp.float32)
    pairs = [
        (module._ragged_matmul(x, w, sizes)[:used], module.tiled_matmul(x, w, sizes)[:used]),
        (
            module._ragged_matmul_transposed(dy, w, sizes)[:used],
            module.tiled_matmul(dy, w, sizes, transpose=True)[:used],
        ),
        (module._ragged_outer(x, dy, sizes), module.tiled_outer(x, dy, sizes)),
    ]
    for ragged, tiled in pairs:
        np.testing.assert_allclose(ragged, tiled, atol=2e-5)


def test_bfloat16_accumulates_in_float32():
    x, w, sizes, _ = problem("even", jnp.bfloat16)
    got = np.asarray(grouped_matmul(x, w, sizes), np.float32)
    assert grouped_matmul(x, w, sizes).dtype == jnp.bfloat16
    expected = oracle(np.asarray(x, np.float32), np.asarray(w, np.float32), GROUPS["even"])
    np.testing.assert_allclose(got, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", GROUPS)
def test_tiles_hold_every_row_of_its_own_expert_once(name):
    sizes = np.array(GROUPS[name])
    rows = ROWS.get(name, int(sizes.sum()))

    def work(tile, prepared, seen_RE):
        once = jax.nn.one_hot(jnp.full(tile.mine_M1.shape[0], prepared), len(sizes))
        return tile.write(seen_RE, tile.read(seen_RE) + tile.own(once))

    seen_RE = for_each_tile(jnp.asarray(sizes), rows, lambda expert: expert, work, jnp.zeros((rows, len(sizes))))
    wanted_RE = np.zeros((rows, len(sizes)))
    wanted_RE[np.arange(sizes.sum()), np.repeat(np.arange(len(sizes)), sizes)] = 1
    np.testing.assert_array_equal(seen_RE, wanted_RE)


SCALES = 1.5, 0.7


@jax.jit
def cpu_lora(sizes, dys, x, maps):
    """The products, and the gradients of x and of each (w, a, b)."""

    def products(x, maps):
        return module.grouped_lora(
            x, tuple(module.Adapted(*one, scale) for one, scale in zip(maps, SCALES, strict=True)), sizes
        )

    ys, pull = jax.vjp(products, x, maps)
    return ys, pull(dys)


@jax.jit
def other_lora(sizes, dys, x, maps):
    """The same by the kernels of other backends."""
    ys, lows = module._ragged_lora(x, maps, sizes, SCALES)
    dx, factors = module._ragged_lora_gradients(x, lows, dys, maps, sizes, SCALES)
    outer = (module._ragged_outer(x, dy, sizes) for dy in dys)
    return ys, (dx, tuple((dw, *ab) for dw, ab in zip(outer, factors, strict=True)))


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("backend", ["cpu", "others"])
def test_adapters_and_all_gradients_equal_the_oracle(name, backend):
    """Two maps of the same rows, with adapters of rank 3 and 2."""
    x, w, sizes, used = problem(name)
    random = np.random.default_rng(2)

    def normal(*shape):
        return np.float32(random.normal(size=shape))

    many = len(sizes)
    maps = (w, normal(many, 13, 3), normal(many, 3, 9)), (normal(many, 13, 5), normal(many, 13, 2), normal(many, 2, 5))
    dys = normal(len(x), 9), normal(len(x), 5)
    experts = jnp.asarray(np.repeat(np.arange(many), GROUPS[name]))

    def plain(x, maps):
        return tuple(
            jnp.einsum("rd,rdf->rf", x[:used], (w + scale * jnp.matmul(a, b))[experts])
            for (w, a, b), scale in zip(maps, SCALES, strict=True)
        )

    @jax.jit
    def right(x, maps, dys):
        ys, pull = jax.vjp(plain, x, maps)
        dx, of_maps = pull(tuple(dy[:used] for dy in dys))
        return ys, (dx[:used], of_maps)

    got, gradients = (cpu_lora if backend == "cpu" else other_lora)(sizes, dys, x, maps)
    result = tuple(y[:used] for y in got), (gradients[0][:used], gradients[1])
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=3e-4), result, right(x, maps, dys))


@pytest.mark.parametrize(("rows", "experts"), [(2048, 16), (8192, 16), (8192, 32), (4096, 64), (65536, 16)])
def test_half_filled_tiles_waste_at_most_an_eighth(rows, experts):
    tile = tile_rows(rows, experts)
    assert (rows // tile + experts) * tile <= 1.125 * rows


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_asks_a_tpu_for_float32_products(dtype):
    x, w, sizes, _ = problem("even", dtype)
    gradient = jax.grad(lambda x, w: jnp.sum(grouped_matmul(x, w, sizes).astype(jnp.float32) ** 2), (0, 1))
    program = jax.jit(gradient).trace(x, w).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count('"chlo.ragged_dot"(') == 3
    assert program.count("precision HIGHEST") == (6 if dtype == jnp.float32 else 0)
