import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.inference.generate import generate
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.mesh import make_mesh
from tests.support.compiled import forward
from tests.support.configs import DENSE


def greedy_by_full_passes(config, params, prompt, count):
    """What follows a token changes nothing before it: all passes have one length, and compile once."""
    ids, length = list(prompt), 12
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (length - len(ids))])
        ids.append(int(_forward(config, params, padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, tokens):
    return forward(config, params, tokens).logits


def test_greedy_equals_full_passes_for_prompts_of_different_lengths(config):
    params = schema.initialize(config, jax.random.key(0))
    prompts = [[5, 9, 31], [7], [3, 1, 4, 1, 5, 9]]
    got = np.stack(list(generate(config, params, prompts, 6)))
    for row, prompt in enumerate(prompts):
        assert got[:, row].tolist() == greedy_by_full_passes(config, params, prompt, 6)


def test_generation_on_a_mesh_equals_that_on_one_device(config):
    params = schema.initialize(config, jax.random.key(0))
    mesh = make_mesh({"fsdp": 2, "expert": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.shardings(config, mesh))
    alone = np.stack(list(generate(config, params, [[5, 9, 31]], 5)))
    np.testing.assert_array_equal(np.stack(list(generate(config, placed, [[5, 9, 31]], 5, mesh=mesh))), alone)


def test_many_rows_of_bfloat16(optimized):
    """More than are read in place: the weights stay numbers."""
    params = schema.initialize(DENSE, jax.random.key(0), jnp.bfloat16)
    got = np.stack(list(generate(DENSE, params, [[5, 9, 31]] * 9, 4)))
    expected = [
        int(forward(DENSE, params, jnp.asarray([[5, 9, 31, *got[:at, 0]]])).logits[0, -1].argmax()) for at in range(4)
    ]
    assert got.T.tolist() == [expected] * 9


def test_the_callers_mesh_stays_as_it_is():
    params = schema.initialize(DENSE, jax.random.key(0))
    mesh = make_mesh({"fsdp": 8})
    placed = jax.device_put(params, sharding.shardings(DENSE, mesh))
    over_mesh, alone = (
        generate(DENSE, *given) for given in ((placed, [[5]], 3, SamplingParams(), (), mesh), (params, [[5]], 3))
    )
    pairs = list(zip(over_mesh, alone, strict=True))
    assert len(pairs) == 3 and all(one == other for one, other in pairs)
    assert jax.sharding.get_abstract_mesh().empty


def test_generation_ends_when_every_row_has_stopped():
    params = schema.initialize(DENSE, jax.random.key(0))
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
        ([[1]], 0, "max_new_tokens: expected a positive number, got 0"),
    ],
)
def test_impossible_requests(prompts, count, message):
    with pytest.raises(UserError, match=message):
        next(generate(DENSE, {}, prompts, count))


def test_rows_draw_by_seeds_of_their_own():
    params = schema.initialize(DENSE, jax.random.key(0))
    warm = SamplingParams(temperature=1.0, repetition_penalty=1.3, seed=7)
    both = np.stack(list(generate(DENSE, params, [[5, 9, 31], [5, 9, 31]], 9, warm)), axis=1)
    assert both[0].tolist() != both[1].tolist()
    again = np.stack(
        list(generate(DENSE, params, [[5, 9, 31], [5, 9, 31]], 9, dataclasses.replace(warm, seed=8))), axis=1
    )
    assert again[0].tolist() == both[1].tolist()


def test_logits_that_are_no_numbers():
    params = schema.initialize(DENSE, jax.random.key(0))
    params = params | {"embed": params["embed"].at[31].set(jnp.nan)}
    with pytest.raises(UserError, match="no numbers"):
        next(generate(DENSE, params, [[5], [31]], 3))


def test_rows_without_a_token_are_never_chosen():
    params = schema.initialize(DENSE, jax.random.key(0))
    known_V = np.arange(DENSE.vocab) < 40
    got = np.stack(list(generate(DENSE, params, [[5, 9, 31]], 6, known_V=known_V)))[:, 0]
    padded = jnp.asarray([[5, 9, 31, *got]])
    logits_TV = _forward(DENSE, params, padded)[0, 2:-1]
    assert got.tolist() == logits_TV[:, :40].argmax(-1).tolist()
    assert max(generate(DENSE, params, [[5, 9, 31]], 6)) >= 40
