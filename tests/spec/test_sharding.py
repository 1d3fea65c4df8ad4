import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nemoe_jax.adapters import lora
from nemoe_jax.errors import UserError
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.config import preset
from nemoe_jax.spec.mesh import make_mesh, parse_mesh
from tests.support.compiled import random_adapters
from tests.support.configs import MIXTRAL, NEKOMIND
from tests.support.train_runs import random_params
from train.plan.plan import ENVIRONMENT

# 4 query heads to 2 key heads: with 4 devices to the heads, keys are repeated
FOUR_HEADS = MIXTRAL.replace(heads=4, kv_heads=2)
SHARED = NEKOMIND.replace(layers=2, dense_layers=1)
CASES = [
    (FOUR_HEADS, {"fsdp": 2, "expert": 4}),
    (FOUR_HEADS, {"fsdp": 4, "sequence": 2}),
    (FOUR_HEADS, {"expert": 2, "tensor": 2, "sequence": 2}),
    (SHARED, {"data": 2, "fsdp": 2, "sequence": 2}),
]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline=2", "unknown axis 'pipeline'"),
        ("fsdp=2,fsdp=4", "named twice"),
        ("fsdp=0", "expected a positive size for axis fsdp, got '0'"),
        ("fsdp", "expected a positive size for axis fsdp, got ''"),
    ],
)
def test_bad_meshes(text, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text)


def test_a_mesh_must_use_all_devices():
    with pytest.raises(UserError, match="wants 6 devices; there are 8"):
        make_mesh({"fsdp": 6})


def spec_of(path):
    return schema.leaves(schema.declare(preset("nemoe-12b-16e")))[path]


@pytest.mark.parametrize(
    ("path", "mesh", "place"),
    [
        # experts first, expert by expert; what no longer divides them, what they contract
        ("blocks/moe/ffn/gate", {"fsdp": 2, "expert": 4, "tensor": 2}, (None, ("expert", "fsdp"), None, ("tensor",))),
        ("blocks/moe/ffn/gate", {"fsdp": 16, "sequence": 4}, (None, ("fsdp",), ("sequence",), None)),
        ("blocks/moe/ffn/down", {"fsdp": 16, "sequence": 4}, (None, ("fsdp",), ("sequence",), None)),
        ("blocks/moe/ffn/down", {"fsdp": 64, "tensor": 2}, (None, None, ("tensor", "fsdp"), None)),
        # the rest over fsdp, expert and sequence together
        ("blocks/moe/attn/q", {"fsdp": 2, "expert": 4, "tensor": 2}, (None, ("expert", "fsdp"), ("tensor",), None)),
        ("blocks/moe/attn/q", {"fsdp": 4, "sequence": 4}, (None, ("fsdp", "sequence"), None, None)),
        ("blocks/moe/attn/o", {"fsdp": 4, "sequence": 4}, (None, ("fsdp", "sequence"), None, None)),
        ("blocks/moe/attn/o", {"fsdp": 64}, (None, None, ("fsdp",), None)),
        ("blocks/moe/attn/k", {"tensor": 16}, (None, None, None, ("tensor",))),
        ("blocks/moe/ffn/router", {"expert": 4}, (None, ("expert",), None)),
        ("blocks/moe/ffn_norm", {"fsdp": 4}, (None, None)),
        ("embed", {"fsdp": 4, "tensor": 2, "sequence": 2}, (("tensor",), ("fsdp", "sequence"))),
    ],
)
def test_where_weights_lie(path, mesh, place):
    assert sharding.partition_spec(spec_of(path), mesh) == PartitionSpec(*place)


def test_a_size_that_does_not_divide_is_named():
    message = "blocks/moe/ffn/gate: mesh axis expert of size 3 does not divide axis experts of size 16"
    with pytest.raises(UserError, match=message):
        sharding.partition_spec(spec_of("blocks/moe/ffn/gate"), {"expert": 3})


def test_a_rule_for_arrays_stacked_over_experts_wins():
    rules = {"embed": ("fsdp",), "experts": ("expert",), "experts.embed": ()}
    place = sharding.partition_spec(spec_of("blocks/moe/ffn/gate"), {"fsdp": 2, "expert": 4}, rules)
    assert place == PartitionSpec(None, ("expert",), None, None)


@pytest.mark.parametrize(
    ("mesh", "batch", "length", "messages"),
    [
        ({"fsdp": 16}, 32, 8192, ()),
        ({"fsdp": 4, "sequence": 4}, 4, 32768, ()),
        ({"data": 2, "expert": 4, "tensor": 4, "sequence": 8}, 8, 131072, ()),
        ({"fsdp": 16}, 4, 8192, ["mesh fsdp 16 does not divide batch of 4"]),
        ({"data": 2, "fsdp": 4}, 4, 8192, ["mesh data 2 × fsdp 4 does not divide batch of 4"]),
        ({"sequence": 8}, 1, 8190, ["mesh sequence 8 does not divide sequence_length of 8190"]),
        ({"tensor": 4, "sequence": 16}, 1, 8192, ["mesh tensor 4 × sequence 16 does not divide heads of 32"]),
        (
            {"expert": 3, "tensor": 5},
            3,
            64,
            ["mesh axis expert of size 3 does not divide", "mesh axis tensor of size 5 .*more weights", "divide heads"],
        ),
    ],
)
def test_every_impossible_axis_of_a_mesh_is_named(mesh, batch, length, messages):
    config = preset("nemoe-12b-16e")
    if not messages:
        sharding.check(config, mesh, batch, length)
        return
    with pytest.raises(UserError, match=".*; .*".join(messages)) as caught:
        sharding.check(config, mesh, batch, length)
    assert "\n" not in str(caught.value)


def objective(config, params, adapters, tokens, segments):
    output = forward(config, params, tokens, adapters=adapters, segments=segments, remat=True)
    loss = jnp.mean(jax.nn.log_softmax(output.logits)[..., 5])
    return loss + output.routing.balance_loss + output.routing.z_loss + output.routing.entropy, output.logits


@functools.cache
def case(config):
    """(a function, its arguments, what it gives on one device)."""
    params = jax.device_put(random_params(config))
    narrow = [lora.Target("*/shared_gate", 1, 2.0)] if config.shared_ffn else []
    targets = [*narrow, lora.Target("*", 4, 8.0)]
    adapters = random_adapters(config, targets, 0.1)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, config.vocab, (8, 12)), jnp.int32)
    segments = jnp.asarray([[1] * 4 + [2] * 6 + [0] * 2, [1] * 12, [1] * 3 + [2] * 3 + [3] * 6, [1, 0] * 6] * 2)

    def run(params, adapters, tokens, segments):
        def loss(params, adapters):
            return objective(config, params, adapters, tokens, segments)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, adapters)

    arguments = params, adapters, tokens, segments
    return run, targets, arguments, jax.jit(run)(*arguments)


@pytest.mark.parametrize(
    ("config", "sizes"),
    CASES,
    ids=[f"{c.family},{','.join(f'{k}={v}' for k, v in sizes.items())}" for c, sizes in CASES],
)
def test_logits_and_gradients_equal_those_of_one_device(config, sizes):
    run, targets, (params, adapters, tokens, segments), ((loss, logits), gradients) = case(config)
    mesh = make_mesh(sizes)
    placed = jax.device_put(params, sharding.shardings(config, mesh))
    placed_adapters = jax.device_put(adapters, lora.shardings(config, targets, mesh))
    with jax.set_mesh(mesh):
        (mesh_loss, mesh_logits), mesh_gradients = jax.jit(run)(placed, placed_adapters, tokens, segments)
    np.testing.assert_allclose(mesh_logits, logits, atol=2e-5)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    for path, expected in schema.leaves(gradients[0]).items():
        got = schema.leaves(mesh_gradients[0])[path]
        np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.abs(expected).max()), err_msg=path)
    jax.tree.map(
        lambda got, expected: np.testing.assert_allclose(got, expected, atol=2e-5 * float(jnp.abs(expected).max())),
        mesh_gradients[1],
        gradients[1],
    )


def test_rows_and_tokens_that_no_mesh_axis_divides():
    _, _, (params, _, tokens, _), _ = case(FOUR_HEADS)
    mesh = make_mesh({"fsdp": 4, "sequence": 2})
    placed = jax.device_put(params, sharding.shardings(FOUR_HEADS, mesh))
    run = jax.jit(lambda params, tokens: forward(FOUR_HEADS, params, tokens).logits)
    with jax.set_mesh(mesh):
        few = run(placed, tokens[:3, :11])
    np.testing.assert_allclose(few, run(params, tokens[:3, :11]), atol=2e-5)


@pytest.mark.usefixtures("optimized")
def test_what_goes_between_devices():
    """Sequence parallelism exchanges heads for tokens; weights are gathered, and no activation is summed for them."""
    config = FOUR_HEADS
    run, targets, (params, adapters, _, _), _ = case(config)
    mesh = make_mesh({"fsdp": 2, "sequence": 4})
    params = jax.device_put(params, sharding.shardings(config, mesh))
    adapters = jax.device_put(adapters, lora.shardings(config, targets, mesh))
    tokens = jnp.ones((8, 96), jnp.int32)  # so many that activations are larger than the weights
    with jax.set_mesh(mesh):
        text = jax.jit(lambda *arrays: run(*arrays)[1][1]).lower(params, adapters, tokens, tokens).compile().as_text()
    assert text.count(" all-to-all(") >= 4
    assert " all-gather(" in text
    activation = 8 * 96 * config.hidden // 8
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]\S* all-reduce\(", text)]
    assert max(sizes) < activation


ON_TPU = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from nemoe_jax.spec.mesh import make_mesh
from nemoe_jax.spec.sharding import compiler_options, gathered
from train.plan import hlo

mesh = make_mesh({"fsdp": 8}, topologies.get_topology_desc("v5e:2x4", "tpu").devices)
def shape(*size, place):
    return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=NamedSharding(mesh, place))
def layer(x, weights):
    first, second, third = (gathered(w, P("fsdp"), P()) for w in weights)
    y = jax.nn.silu(x @ first) @ second
    return x + jnp.sin(y) * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True)) @ third, None
weights = tuple(shape(4, *size, place=P(None, "fsdp")) for size in ((512, 2048), (2048, 512), (512, 512)))
x = shape(65536, 512, place=P("fsdp"))
for options in ({}, compiler_options("tpu")):
    with jax.set_mesh(mesh):
        run = jax.jit(lambda x, weights: jax.lax.scan(layer, x, weights)[0], compiler_options=options)
        program = hlo.parse(run.lower(x, weights).compile().as_text())
    print(json.dumps([one.asynchronous for one in program.collectives if one.kind == "all-gather"]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_on_tpu_every_gather_of_weights_goes_on_beside_other_work():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | ENVIRONMENT
    command = [sys.executable, "-c", ON_TPU]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    without, with_options = map(json.loads, done.stdout.splitlines())
    assert len(with_options) == 3 and all(with_options)
    assert sum(without) < 3


def test_other_platforms_are_told_nothing():
    assert sharding.compiler_options("cpu") == sharding.compiler_options("gpu") == {}
