import functools
import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from nemoe_jax.adapters.lora import Adapter
from nemoe_jax.kernels.ragged_all_to_all import ragged_all_to_all
from nemoe_jax.model import expert_ffn, expert_parallel
from nemoe_jax.model.expert_parallel import exchange_of, run_over_mesh
from nemoe_jax.spec.mesh import make_mesh
from nemoe_jax.spec.schema import declare
from tests.support.configs import MIXTRAL
from train.plan import hlo

EXPERTS, WIDTH, ROWS, LENGTH = MIXTRAL.experts, MIXTRAL.hidden, 8, 6
SPECS = {name: declare(MIXTRAL)["blocks"]["moe"]["ffn"][name] for name in ("gate", "up", "down")}
LOADS = ("even", "uneven", "an expert without rows", "one expert takes all")


@pytest.mark.parametrize(
    ("platform", "devices", "top_k", "expected"),
    [
        ("tpu", 8, 4, "all-to-all"),
        ("tpu", 4, 4, "gather"),
        ("tpu", 4, 2, "all-to-all"),
        ("gpu", 8, 4, "all-to-all"),
        ("gpu", 2, 4, "gather"),
        ("tpu", 2, 1, "all-to-all"),
        ("cpu", 8, 1, "gather"),
    ],
)
def test_the_rule(platform, devices, top_k, expected):
    assert exchange_of(platform, devices, top_k) == expected


def chosen(load, top_k):
    """Different experts for each token: (B, T, C)."""
    rng = np.random.default_rng(7)
    scores = rng.gumbel(size=(ROWS, LENGTH, EXPERTS))
    if load == "uneven":
        scores -= 0.7 * np.arange(EXPERTS)
    elif load == "an expert without rows":
        scores[..., 5] = -np.inf
    elif load == "one expert takes all":
        scores[..., 6] = np.inf
    return np.argsort(-scores, axis=-1)[..., :top_k].astype(np.int32)


@functools.cache
def arguments(top_k):
    """Tokens, routing weights, experts and their adapters."""
    keys = iter(jax.random.split(jax.random.key(0), 11))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    sizes = {"gate": (WIDTH, 12), "up": (WIDTH, 12), "down": (12, WIDTH)}
    experts = {name: normal(EXPERTS, *size) / 4 for name, size in sizes.items()}
    adapters = {
        name: Adapter(normal(EXPERTS, sizes[name][0], 3) / 4, normal(EXPERTS, 3, sizes[name][1]) / 4, 2.0)
        for name in ("gate", "down")
    }
    return normal(ROWS, LENGTH, WIDTH), jax.nn.softmax(normal(ROWS, LENGTH, top_k)), experts, adapters


def gradients(run):
    """A compiled function of the chosen experts and `arguments`: the outputs, and the gradients of all arguments."""

    def loss(arrays, chosen_BTC):
        x, weights, experts, adapters = arrays
        y_BTD = run(x, weights, chosen_BTC, experts, adapters)
        return jnp.sum(jnp.sin(y_BTD)), y_BTD

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def in_full():
    """Every token through every expert, on one device."""

    def run(x_BTD, weights_BTC, chosen_BTC, experts, adapters):
        merged = {
            name: weight + adapters[name].scale * adapters[name].a @ adapters[name].b if name in adapters else weight
            for name, weight in experts.items()
        }
        share_BTE = jnp.einsum("btce,btc->bte", jax.nn.one_hot(chosen_BTC, EXPERTS), weights_BTC)
        hidden_BTEF = jax.nn.silu(jnp.einsum("btd,edf->btef", x_BTD, merged["gate"]))
        hidden_BTEF *= jnp.einsum("btd,edf->btef", x_BTD, merged["up"])
        return jnp.einsum("btef,efd,bte->btd", hidden_BTEF, merged["down"], share_BTE)

    return gradients(run)


@pytest.mark.parametrize(
    ("sizes", "top_k", "at_once"),
    [
        ({"expert": 8}, 2, 4096),
        ({"expert": 8}, 4, 16),  # three parts of the tokens, two of the rows that arrive
        ({"fsdp": 2, "expert": 4}, 3, 4096),
        ({"expert": 2, "tensor": 2, "sequence": 2}, 1, 4096),
    ],
    ids=str,
)
def test_equals_one_device(sizes, top_k, at_once, monkeypatch):
    monkeypatch.setattr(expert_parallel, "exchange_of", lambda *_: "all-to-all")
    monkeypatch.setattr(expert_ffn, "AT_ONCE", at_once)
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    mesh = make_mesh(sizes)
    run = gradients(lambda *arrays: run_over_mesh(*arrays, SPECS, mesh.abstract_mesh))
    for load in LOADS:
        with jax.set_mesh(mesh):
            got = run(arguments(top_k), chosen(load, top_k))
        expected = in_full()(arguments(top_k), chosen(load, top_k))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-5, err_msg=load), got, expected)


def test_rows_go_where_they_should_and_their_gradients_come_back():
    """Against NumPy: uneven numbers, a device that sends nothing, one that gets nothing."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(0, 5, (4, 4)).astype(np.int32)
    sizes[1], sizes[:, 2] = 0, 0
    rows, room = rng.normal(size=(4, 20, 3)).astype(np.float32), 18
    ends = np.cumsum(sizes, axis=1)
    expected = np.zeros((4, room, 3), np.float32)
    for to in range(4):
        parts = [rows[device, ends[device, to] - sizes[device, to] : ends[device, to]] for device in range(4)]
        expected[to, : sizes[:, to].sum()] = np.concatenate(parts)
    mesh = make_mesh({"x": 4}, jax.devices()[:4])
    send = jax.jit(
        jax.shard_map(
            lambda rows: ragged_all_to_all(rows[0], jnp.asarray(sizes), room, "x")[None],
            mesh=mesh,
            in_specs=PartitionSpec("x"),
            out_specs=PartitionSpec("x"),
            check_vma=False,
        )
    )
    got, back = jax.vjp(send, rows)
    arrived = np.arange(room) < sizes.sum(axis=0)[:, None]
    np.testing.assert_array_equal(np.asarray(got)[arrived], expected[arrived])
    cotangent = rng.normal(size=expected.shape).astype(np.float32)
    sent = np.arange(20) < ends[:, -1:]
    returned = np.asarray(back(cotangent)[0])[sent]
    assert np.vdot(cotangent, expected) == pytest.approx(np.vdot(returned, rows[sent]), rel=1e-5)


@pytest.mark.usefixtures("optimized")
def test_bytes_of_gather_and_scatter():
    """On CPU the tokens are gathered, and the sums scattered: T · (P - 1) rows each."""
    mesh, top_k = make_mesh({"expert": 8}), 2
    x, weights, experts, adapters = arguments(top_k)
    run = jax.jit(lambda *arrays: run_over_mesh(*arrays, SPECS, mesh.abstract_mesh))
    with jax.set_mesh(mesh):
        text = run.lower(x, weights, chosen("even", top_k), experts, adapters).compile().as_text()
    rows = [one for one in hlo.parse(text).collectives if one.bytes >= x.nbytes * 7 // 64]
    sent = {(one.kind, one.bytes) for one in rows}
    assert sent == {("all-gather", x.nbytes * 7 // 8), ("reduce-scatter", x.nbytes * 7 // 8)}


def test_bytes_that_are_read_from_a_program():
    """Rows that come back are sent from a buffer that is eight times as large as what fits where they arrive."""
    text = """HloModule m

ENTRY %main (a: bf16[512,4], b: bf16[64,4], i: s32[8]) -> bf16[64,4] {
  %a = bf16[512,4]{1,0} parameter(0)
  %b = bf16[64,4]{1,0} parameter(1)
  %i = s32[8]{0} parameter(2)
  %start = (bf16[64,4]{1,0}, u32[]) ragged-all-to-all-start(%a, %b, %i, %i, %i, %i), replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %done = bf16[64,4]{1,0} ragged-all-to-all-done(%start)
}
"""
    assert hlo.parse(text).collectives == [hlo.Collective("ragged-all-to-all", 64 * 4 * 2 * 7 // 8, 1, True)]


ON_TPU = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from nemoe_jax.model.expert_parallel import run_over_mesh
from nemoe_jax.spec.config import preset
from nemoe_jax.spec.mesh import make_mesh
from nemoe_jax.spec.schema import declare
from train.plan import hlo

config = preset("nemoe-12b-16e").replace(top_k=int(sys.argv[1]))
specs = {name: declare(config)["blocks"]["moe"]["ffn"][name] for name in ("gate", "up", "down")}
mesh = make_mesh({"expert": 8}, topologies.get_topology_desc("v5e:2x4", "tpu").devices)
def shape(*size, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, P("expert")))
tokens = shape(8, 256, config.hidden), shape(8, 256, config.top_k), shape(8, 256, config.top_k, dtype=jnp.int32)
experts = {name: shape(*spec.shape[1:]) for name, spec in specs.items()}
with jax.set_mesh(mesh):
    run = jax.jit(jax.grad(lambda x, *rest: run_over_mesh(x, *rest, {}, specs, mesh.abstract_mesh).sum()))
    program = hlo.parse(run.lower(*tokens, experts).compile().as_text())
print(json.dumps([(one.kind, one.bytes, one.asynchronous) for one in program.collectives]))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
@pytest.mark.parametrize("top_k", [2, 4])
def test_bytes_of_the_all_to_all_on_tpu(top_k):
    """T · C · (P - 1) / P rows to the experts, and as many gradients there and back, beside other work."""
    from train.plan.plan import ENVIRONMENT

    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | ENVIRONMENT
    command = [sys.executable, "-c", ON_TPU, str(top_k)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    sent = [tuple(one) for one in json.loads(done.stdout)]
    rows = ("ragged-all-to-all", 256 * top_k * 5120 * 2 * 7 // 8, True)
    assert sent.count(rows) == 3
    assert {kind for kind, size, _ in sent if size > 256 * 5120 * 2} == {"ragged-all-to-all"}
