import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax import schema, sharding
from nemoe_jax.errors import UserError
from nemoe_jax.generate import Sampling, generate, sample
from nemoe_jax.transformer import forward
from tests.conftest import DENSE


def greedy_by_full_passes(config, params, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(forward(config, params, jnp.asarray([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_full_passes_for_prompts_of_different_lengths(config):
    params = schema.initialise(config, jax.random.key(0))
    prompts = [[5, 9, 31], [7], [3, 1, 4, 1, 5, 9]]
    got = np.stack(list(generate(config, params, prompts, 6)))
    for row, prompt in enumerate(prompts):
        assert got[:, row].tolist() == greedy_by_full_passes(config, params, prompt, 6)


def test_generation_on_a_mesh_equals_that_on_one_device(config):
    params = schema.initialise(config, jax.random.key(0))
    mesh = sharding.make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.shardings(config, mesh))
    alone = np.stack(list(generate(config, params, [[5, 9, 31]], 5)))
    np.testing.assert_array_equal(np.stack(list(generate(config, placed, [[5, 9, 31]], 5, mesh=mesh))), alone)


def test_many_rows_of_bfloat16(optimised):
    """More than are read in place: the weights stay numbers."""
    params = schema.initialise(DENSE, jax.random.key(0), jnp.bfloat16)
    got = np.stack(list(generate(DENSE, params, [[5, 9, 31]] * 9, 4)))
    wanted = [
        int(forward(DENSE, params, jnp.asarray([[5, 9, 31, *got[:at, 0]]])).logits[0, -1].argmax()) for at in range(4)
    ]
    assert got.T.tolist() == [wanted] * 9


def test_the_callers_mesh_stays_as_it_is():
    params = schema.initialise(DENSE, jax.random.key(0))
    mesh = sharding.make_mesh({"fsdp": 8})
    placed = jax.device_put(params, sharding.shardings(DENSE, mesh))
    over_mesh, alone = (
        generate(DENSE, *given) for given in ((placed, [[5]], 3, Sampling(), (), mesh), (params, [[5]], 3))
    )
    pairs = list(zip(over_mesh, alone, strict=True))
    assert len(pairs) == 3 and all(one == other for one, other in pairs)
    assert jax.sharding.get_abstract_mesh().empty


def test_generation_ends_when_every_row_has_stopped():
    params = schema.initialise(DENSE, jax.random.key(0))
    full = np.stack(list(generate(DENSE, params, [[5, 9, 31]], 9)))[:, 0].tolist()
    stop = full[3]
    got = np.stack(list(generate(DENSE, params, [[5, 9, 31]], 9, stop=[stop])))[:, 0].tolist()
    assert got == full[: full.index(stop) + 1]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[]], 3, "empty prompt"),
        ([], 3, "empty prompt"),
        ([[1] * 90], 7, "exceed the context of 96"),
        ([[1]], 0, "max_new_tokens: wanted a positive number, got 0"),
    ],
)
def test_impossible_requests(prompts, count, message):
    with pytest.raises(UserError, match=message):
        next(generate(DENSE, {}, prompts, count))


def test_sampled_shares_follow_the_probabilities():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (20_000, 4))

    def shares(**options):
        tokens = np.asarray(sample(logits, Sampling(**options), jax.random.key(0)))
        return np.bincount(tokens, minlength=4) / len(tokens)

    np.testing.assert_allclose(shares(temperature=1.0), probabilities, atol=0.015)
    squared = probabilities**2 / (probabilities**2).sum()
    np.testing.assert_allclose(shares(temperature=0.5), squared, atol=0.015)
    kept = np.array([0.5, 0.3, 0, 0]) / 0.8  # below 0.4 of the likeliest
    np.testing.assert_allclose(shares(temperature=1.0, min_p=0.4), kept, atol=0.015)
    assert shares()[0] == 1


@pytest.mark.parametrize("options", [{"temperature": -0.1}, {"min_p": 1.0}])
def test_bad_sampling(options):
    with pytest.raises(UserError, match="wanted"):
        Sampling(**options)
