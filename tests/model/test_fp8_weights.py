"""Weights that stay in FP8 or NF4 against the same weights dequantized; a cache with a checkpoint's scales."""

import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
import safetensors.torch
import torch

from convert.quantize import QuantizeOptions, quantize
from nemoe_jax.adapters import lora
from nemoe_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from nemoe_jax.errors import UserError
from nemoe_jax.kernels import fp8
from nemoe_jax.kernels.grouped_matmul import dispatch
from nemoe_jax.model.kv_cache import empty_cache
from nemoe_jax.model.transformer import forward, hidden_states
from nemoe_jax.spec import schema
from nemoe_jax.spec.fp8_weight import NF4, Fp8Weight, is_quantized, widen
from nemoe_jax.spec.mesh import make_mesh
from tests.support.configs import CONFIGS, DENSE, MIXTRAL

TOKENS = np.random.default_rng(0).integers(0, 72, (2, 9))
EVEN = {"hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 16}  # widths that blocks of 16 divide


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models of random weights as directories: the configs', two whose weights are in blocks, and one for NF4."""
    root = tmp_path_factory.mktemp("models")
    configs = CONFIGS | {
        "dense blocks": DENSE.replace(ffn=48, **EVEN),
        "mixtral blocks": MIXTRAL.replace(expert_ffn=48, **EVEN),
        "mixtral nf4": MIXTRAL.replace(expert_ffn=128, hidden=256, heads=32, kv_heads=4, head_dim=16),
    }
    for name, config in configs.items():
        save_pretrained(root / name, config, schema.initialize(config, jax.random.key(0)))
        if "blocks" in name:
            quantize(root / name, root / f"{name} fp8", QuantizeOptions("fp8-block"))
    return root


def load(models, name, mesh=None):
    """The config, the parameters in FP8 or NF4 and the same dequantized."""
    if "blocks" in name:
        config, params = load_pretrained(models / f"{name} fp8", mesh=mesh)
    else:
        config, params = load_pretrained(models / name, mesh=mesh, quantization="nf4" if "nf4" in name else "fp8")
    return config, params, dequantized(config, params)


def dequantized(config, params):
    specs = schema.leaves(schema.declare(config))

    def of(path, leaf):
        assert isinstance(leaf, Fp8Weight) == is_quantized(specs[path])
        return leaf.dequantized(jnp.float32, len(specs[path].stacked)) if isinstance(leaf, Fp8Weight) else leaf

    return schema.map_with_path(of, params)


def assert_same(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.std(expected))


@pytest.mark.parametrize("name", ["nekomind", "mixtral blocks", "mixtral nf4"])
def test_logits_are_those_of_dequantized_weights(models, name):
    config, params, same = load(models, name)
    run = jax.jit(lambda params: forward(config, params, TOKENS).logits)
    assert_same(run(params), run(same))
    if "blocks" in name:
        assert params["blocks"][next(iter(params["blocks"]))]["attn"]["q"].scale.shape[1] == 2  # of 16 inputs each
    again = models / f"{name} again"
    save_pretrained(again, config, params)
    assert_same(run(load_pretrained(again, dtype=jnp.float32)[1]), run(same))


def test_nf4_is_that_of_qwix(models):
    wide, params = (load_pretrained(models / "mixtral nf4", dtype=dtype)[1] for dtype in ("float32", "nf4"))
    for group, name, stacked in (("attn", "o", 1), ("ffn", "down", 2)):
        w, got = (tree["blocks"]["moe"][group][name] for tree in (wide, params))
        assert got.values.dtype == jnp.uint4
        w = w.reshape(*w.shape[:stacked], -1, 256)
        assert got.scale.shape[stacked] == w.shape[stacked] // 64
        others = [axis for axis in range(w.ndim) if axis != stacked]
        right = qwix.dequantize(qwix.quantize(w, "nf4", channelwise_axes=others, tiled_axes={stacked: 64}))
        ours = got.dequantized(jnp.float32, stacked).reshape(w.shape)
        assert jnp.mean(ours != right) < 1e-5  # but for those half-way between two values


def test_nf4_is_looked_up_but_on_tpus():
    values = jnp.arange(16, dtype=jnp.uint4)
    np.testing.assert_array_equal(jax.jit(widen)(values), np.float32(NF4))
    text = {
        platform: jax.jit(widen).trace(values).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cuda", "tpu")
    }
    assert "gather" in text["cuda"] and "select" not in text["cuda"]
    assert "gather" not in text["tpu"]


@pytest.mark.parametrize("name", ["nekomind", "mixtral blocks"])
def test_decoding_gives_the_same(models, name):
    config, params, same = load(models, name)

    @jax.jit
    def run(params):
        cache = hidden_states(config, params, TOKENS[:, :8], cache=empty_cache(config, 2, 16, jnp.float32)).cache
        return forward(config, params, TOKENS[:, 8:], cache=cache).logits

    assert_same(run(params), run(same))


def test_adapters_on_a_base_in_fp8_learn_as_on_the_same_weights(models):
    config, params, same = load(models, "mixtral")
    targets = [lora.Target("blocks/*/ffn/*", 2, 4.0), lora.Target("blocks/*/attn/q", 2, 4.0)]
    generator = np.random.default_rng(1)
    adapters = jax.tree.map(
        lambda array: np.float32(0.1 * generator.standard_normal(array.shape)), lora.abstract(config, targets)
    )

    def loss(adapters, params):
        return jnp.mean(forward(config, params, TOKENS, adapters=adapters).logits ** 2)

    got, expected = (jax.jit(jax.grad(loss))(adapters, tree) for tree in (params, same))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(other).max(), 1e-3))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mixtral blocks", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("dense blocks", {"fsdp": 4, "tensor": 2}),
        ("mixtral nf4", {"fsdp": 2, "expert": 2, "tensor": 2}),
    ],
)
def test_meshes_give_the_same(models, name, sizes):
    config, _, same = load(models, name)
    mesh = make_mesh(sizes)
    _, params, _ = load(models, name, mesh)
    batch = np.concatenate([TOKENS, TOKENS])
    with jax.set_mesh(mesh):
        got = jax.jit(lambda params: forward(config, params, batch).logits)(params)
    assert_same(np.asarray(got)[:2], jax.jit(lambda params: forward(config, params, TOKENS).logits)(same))


@pytest.mark.parametrize(("name", "rows"), [("nekomind", 1), ("mixtral", 16), ("dense blocks", 1)])
def test_no_compiled_step_holds_a_float_copy_of_a_stack(models, name, rows):
    config, params, _ = load(models, name)
    cache = empty_cache(config, rows, 16, jnp.float32)
    step = jax.jit(lambda params, cache, tokens: forward(config, params, tokens, cache=cache).logits)
    text = step.lower(params, cache, jnp.zeros((rows, 1), jnp.int32)).compile().as_text()
    specs = [spec for spec in schema.leaves(schema.declare(config)).values() if is_quantized(spec)]
    sizes, layers = {math.prod(spec.shape) for spec in specs}, {str(spec.shape[0]) for spec in specs}
    found = re.findall(rf" = (?:f32|bf16|f16)\[((?:{'|'.join(layers)})(?:,\d+)+)\]", text)
    assert found and not sizes & {math.prod(map(int, shape.split(","))) for shape in found}


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_products_in_fp8_round_each_row_by_its_own_scale(platform, monkeypatch):
    """By the definition: both factors in float8_e4m3fn, sums in float32."""
    monkeypatch.setattr(fp8, "target_platform", lambda: platform)
    monkeypatch.setattr(fp8, "has_fp8_products", lambda dtype: True)
    monkeypatch.setattr(dispatch, "has_fp8_products", lambda dtype: True)
    generator = np.random.default_rng(1)
    x_RD = generator.standard_normal((6, 32)).astype(ml_dtypes.bfloat16)
    x_RD[2] = 0
    values_EDF = generator.standard_normal((3, 32, 8)).astype(ml_dtypes.float8_e4m3fn)
    scale_RX = np.maximum(np.abs(x_RD.astype(np.float32)).max(1, keepdims=True), 1e-30) / 448
    rounded_RD = (x_RD.astype(np.float32) / scale_RX).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale_RX
    for blocks in (1, 4):
        scale_EKF = generator.uniform(0.5, 2, (3, blocks, 8)).astype(np.float32)
        w_EDF = values_EDF.astype(np.float32) * np.repeat(scale_EKF, 32 // blocks, 1)
        weight = Fp8Weight(jnp.asarray(values_EDF), jnp.asarray(scale_EKF))
        got = fp8.fp8_matmul(jnp.asarray(x_RD), weight.at(1))
        np.testing.assert_allclose(got.astype(np.float32), rounded_RD @ w_EDF[1], rtol=2**-7, atol=1e-2)
        sizes_E = jnp.array([2, 0, 4])
        expected = np.concatenate([rounded_RD[:2] @ w_EDF[0], rounded_RD[2:] @ w_EDF[2]])
        if blocks == 1:
            got = dispatch._ragged_fp8(jnp.asarray(x_RD), weight, sizes_E)
            np.testing.assert_allclose(got.astype(np.float32), expected, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("outputs", [(8,), (2, 4)])
def test_gradients_go_past_the_rounding(blocks, outputs, monkeypatch):
    """As those of the product with the weights dequantized, however large they are."""
    monkeypatch.setattr(fp8, "has_fp8_products", lambda dtype: True)
    generator = np.random.default_rng(2)
    x_RD, dy = (generator.standard_normal(shape).astype(ml_dtypes.bfloat16) for shape in ((6, 32), (6, *outputs)))
    values = generator.standard_normal((32, *outputs)).astype(ml_dtypes.float8_e4m3fn)
    weight = Fp8Weight(jnp.asarray(values), jnp.asarray(generator.uniform(0.5, 2, (blocks, *outputs)), jnp.float32))
    wide = np.repeat(np.asarray(weight.scale).reshape(blocks, -1), 32 // blocks, 0)
    wide *= values.astype(np.float32).reshape(32, -1)
    expected = dy.astype(np.float32).reshape(6, -1) @ wide.T
    for size in (1e-3, 1.0, 1e4):
        _, pull = jax.vjp(lambda x: fp8.fp8_matmul(x, weight), jnp.asarray(x_RD))
        (dx_RD,) = pull(jnp.asarray(dy * ml_dtypes.bfloat16(size)))
        error = np.std(np.asarray(dx_RD, np.float32) / size - expected) / np.std(expected)
        assert error < 0.02, size


@pytest.fixture
def wide_keys(models, tmp_path):
    """A model in FP8 whose keys are beyond float8's range, with scales for its cache."""
    quantize(models / "dense", tmp_path / "wide", QuantizeOptions("fp8-dynamic"))
    path = tmp_path / "wide" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    for layer in range(DENSE.layers):
        name = f"model.layers.{layer}.self_attn."
        tensors[f"{name}q_proj.weight_scale"] /= 4096
        tensors[f"{name}k_proj.weight_scale"] *= 4096
        tensors |= {f"{name}k_scale": torch.tensor([24.0]), f"{name}v_scale": torch.tensor([0.011])}
    safetensors.torch.save_file(tensors, path)
    return path


def test_a_cache_in_fp8_takes_the_checkpoints_scales(wide_keys):
    config, params = load_pretrained(wide_keys.parent)

    @jax.jit
    def distance(params):
        cache = hidden_states(config, params, TOKENS[:, :8], cache=empty_cache(config, 2, 16, jnp.float8_e4m3fn)).cache
        got = forward(config, params, TOKENS[:, 8:], cache=cache).logits
        expected = forward(config, params, TOKENS).logits[:, 8:]
        return jnp.std(got - expected) / jnp.std(expected)

    without = schema.map_with_path(
        lambda path, leaf: Fp8Weight(leaf.values, leaf.scale) if isinstance(leaf, Fp8Weight) else leaf, params
    )
    assert distance(params) < 0.06 < 0.2 < distance(without)


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("self_attn.k_scale", None, "expected one scale for an FP8 cache, got none"),
        ("self_attn.v_scale", [1, 2], "expected one scale for an FP8 cache, got 2"),
        ("self_attn.k_scale", [0], "expected finite scales above 0"),
        ("mlp.down_proj.input_scale", [np.nan], "expected finite scales above 0"),
    ],
)
def test_bad_scales_of_activations_are_named(wide_keys, name, scale, message):
    tensors = safetensors.torch.load_file(wide_keys)
    tensors.pop(f"model.layers.1.{name}", None)
    tensors |= {} if scale is None else {f"model.layers.1.{name}": torch.tensor(scale).float()}
    safetensors.torch.save_file(tensors, wide_keys)
    with pytest.raises(UserError, match=message):
        load_pretrained(wide_keys.parent)
