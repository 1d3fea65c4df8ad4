"""FP8 checkpoints: each format's definition, and what other programs read of what is written here."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from convert.cli import main
from convert.quantize import QuantizeOptions, quantize
from nemoe_jax.checkpoints import fp8
from nemoe_jax.checkpoints.pretrained import load_pretrained
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.model.transformer import forward

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "sliding_window": None,
}
STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
SCALE = "model.layers.0.mlp.up_proj.weight_scale"
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 9))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model and a Mixtral of random weights, saved by transformers in bfloat16."""
    root = tmp_path_factory.mktemp("fp8")
    torch.manual_seed(0)
    dense = transformers.MistralForCausalLM(transformers.MistralConfig(intermediate_size=160, **SIZES))
    config = transformers.MixtralConfig(intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, **SIZES)
    for name, model in (("dense", dense), ("moe", transformers.MixtralForCausalLM(config))):
        model.to(torch.bfloat16).save_pretrained(root / name)
    return root


def logits(directory, dtype=jnp.bfloat16):
    """Ours in float32, of weights rounded to `dtype`."""
    config, params = load_pretrained(directory, dtype=dtype)
    params = jax.tree.map(lambda array: array.astype(jnp.float32), params)
    return np.asarray(forward(config.replace(dtype="float32"), params, jnp.asarray(TOKENS)).logits)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_transformers_opens_blocks_with_the_same_logits(models, tmp_path, name):
    quantize(models / name, tmp_path / "fp8", QuantizeOptions(to="fp8-block"))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        output_loading_info=True,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )
    assert not any(report.values())
    with torch.no_grad():
        expected = theirs.float().eval()(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(tmp_path / "fp8"), expected, atol=1e-5 * expected.std())
    assert 1e-3 < np.abs(expected - logits(models / name)).max() / expected.std() < 0.5  # it is another model


def test_compressed_tensors_opens_rows_with_the_same_logits(models, tmp_path):
    for name in ("dense", "moe"):
        quantize(models / name, tmp_path / name, QuantizeOptions(to="fp8-dynamic"))
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name,
            dtype=torch.bfloat16,
            attn_implementation="eager",
            output_loading_info=True,
            quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
        )
        assert not any(report.values())
        with torch.no_grad():
            expected = theirs.float().eval()(torch.from_numpy(TOKENS)).logits.numpy()
        np.testing.assert_allclose(logits(tmp_path / name), expected, atol=1e-5 * expected.std())


def test_rows_blocks_and_wholes_are_scaled_by_their_largest_weight():
    weight = np.random.default_rng(1).standard_normal((40, 33)).astype(np.float32)
    weight[7] = 0
    for options, shape in (({}, (1,)), ({"per_row": True}, (40, 1)), ({"block": (16, 32)}, (3, 2))):
        quantized, scale = fp8.quantize(weight, np.float32, **options)
        assert quantized.dtype == ml_dtypes.float8_e4m3fn and scale.shape == shape
        back = fp8.dequantize(quantized, scale, options.get("block"))
        # 3 bits of mantissa: half a unit in the last place is 1/16 of a value, and 2^-10 of the scale where it is small
        spread = fp8.dequantize(np.ones_like(quantized), scale, options.get("block"))
        assert (np.abs(back - weight) <= np.maximum(np.abs(weight) / 16, spread * 2**-10) * 1.0001).all()
        np.testing.assert_allclose(np.abs(back).max(), np.abs(weight).max(), rtol=1e-6)
    tile = np.abs(weight[16:32, 32:]).max() / 448
    np.testing.assert_allclose(fp8.quantize(weight, np.float32, block=(16, 32))[1][1, 1], tile, rtol=1e-6)


def rewritten(source, directory, change, quantization, config="config.json", key="quantization_config"):
    """A copy of a bfloat16 model whose linear maps are replaced by `change(name, weight)`: {name: tensor}."""
    directory.mkdir()
    tensors = {}
    for name, tensor in safetensors.numpy.load_file(source / "model.safetensors").items():
        quantized = name.split(".")[-2].endswith("_proj")
        tensors |= change(name.removesuffix(".weight"), tensor.astype(np.float32)) if quantized else {name: tensor}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    content = json.loads((source / "config.json").read_text())
    content |= {key: quantization} if config == "config.json" else {}
    (directory / "config.json").write_text(json.dumps(content))
    if config != "config.json":
        (directory / config).write_text(json.dumps(quantization))


def per_tensor(weight_scale, input_scale):
    def change(name, weight):
        scale = np.abs(weight).max() / 448
        return {
            f"{name}.weight": (weight / scale).astype(ml_dtypes.float8_e4m3fn),
            f"{name}.{weight_scale}": np.array(scale, np.float32),
            f"{name}.{input_scale}": np.array(0.5, np.float32),
        }

    return change


@pytest.mark.parametrize(
    ("quantization", "names", "config"),
    [
        (STATIC, ("weight_scale", "input_scale"), "config.json"),
        (STATIC, ("weight_scale_inv", "activation_scale"), "config.json"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ("weight_scale", "input_scale"), "config.json"),
        ({"quantization": {"quant_algo": "FP8"}}, ("weight_scale", "input_scale"), "hf_quant_config.json"),
    ],
)
def test_scales_of_whole_matrices_are_read_under_every_name(models, tmp_path, quantization, names, config):
    rewritten(models / "dense", tmp_path / "fp8", per_tensor(*names), quantization, config)
    key = "model.layers.1.mlp.down_proj.weight"
    weight = Checkpoint(models / "dense").view(key).astype(np.float32)
    scale = np.abs(weight).max() / np.float32(448)
    expected = (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(Checkpoint(tmp_path / "fp8").view(key), expected)


def test_mistrals_own_layout_there_and_back(models, tmp_path):
    quantize(models / "dense", tmp_path / "fp8", QuantizeOptions(to="mistral"))
    params = json.loads((tmp_path / "fp8" / "params.json").read_text())
    assert params["quantization"] == {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}
    tensors = safetensors.torch.load_file(tmp_path / "fp8" / "consolidated.safetensors")
    assert tensors["layers.0.attention.wq.weight"].dtype == torch.float8_e4m3fn
    weight = Checkpoint(models / "dense").view("model.layers.0.mlp.gate_proj.weight").astype(np.float32)
    scale = tensors["layers.0.feed_forward.w1.qscale_weight"]
    np.testing.assert_allclose(scale, [np.abs(weight).max() / 448], rtol=1e-6)
    assert main(["quantize", str(tmp_path / "fp8"), str(tmp_path / "back"), "--to", "bf16"]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    np.testing.assert_array_equal(logits(tmp_path / "back"), logits(tmp_path / "fp8"))


def test_widths_choose_the_block(models, tmp_path):
    quantize(models / "moe", tmp_path / "fp8", QuantizeOptions(to="fp8-block"))  # experts of 96
    content = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert content["weight_block_size"] == [32, 32]
    assert "model.layers.1.block_sparse_moe.gate" in content["modules_to_not_convert"]


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        (SCALE, None, "missing the scales of model.layers.0.mlp.up_proj"),
        (SCALE, np.ones((3, 1)), "expected the shape"),
        (SCALE, np.zeros(1), "expected finite scales"),
        (SCALE, np.full(1, np.nan), "expected finite scales"),
        ("model.norm.weight_scale", np.ones(1), "which is not F8_E4M3"),
    ],
)
def test_bad_scales_are_named(models, tmp_path, capsys, name, scale, message):
    rewritten(models / "dense", tmp_path / "bad", per_tensor("weight_scale", "input_scale"), {"quant_method": "fp8"})
    tensors = safetensors.torch.load_file(tmp_path / "bad" / "model.safetensors")
    tensors.pop(name, None)
    tensors |= {} if scale is None else {name: torch.from_numpy(scale).float()}
    safetensors.torch.save_file(tensors, tmp_path / "bad" / "model.safetensors")
    assert main(["quantize", str(tmp_path / "bad"), str(tmp_path / "out"), "--to", "bf16"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq weights are not supported"),
        ({"quant_method": "awq"}, "awq weights are not supported"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes weights are not supported"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4 weights are not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "expected two positive integers"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {"weights": {}}}},
            "compressed-tensors pack-quantized",
        ),
    ],
)
def test_other_schemes_are_refused_by_name(models, tmp_path, quantization, message):
    rewritten(models / "dense", tmp_path / "m", lambda name, weight: {f"{name}.weight": weight}, quantization)
    with pytest.raises(UserError, match=message):
        Checkpoint(tmp_path / "m")
