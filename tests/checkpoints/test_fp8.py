"""FP8 checkpoints: each format's definition, and what other programs read of what is written here."""

import functools
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
from convert.layerwise import calibration_batches
from convert.quantize import QuantizeOptions, quantize
from nemoe_jax.checkpoints import fp8
from nemoe_jax.checkpoints.pretrained import load_pretrained
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from tests.support.command_models import write_tokenizer
from tests.support.compiled import forward

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 400,
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
        write_tokenizer(root / name, SIZES["vocab_size"])
    (root / "text.txt").write_text("".join(f"{number} times {number} is {number**2}. " for number in range(300)))
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
        theirs, report = opened_by_compressed_tensors(tmp_path / name, False)
        assert not any(report.values())
        with torch.no_grad():
            expected = theirs.float().eval()(torch.from_numpy(TOKENS)).logits.numpy()
        np.testing.assert_allclose(logits(tmp_path / name), expected, atol=1e-5 * expected.std())


@pytest.fixture(scope="module")
def static(models):
    """Both models with static scales of activations, keys and values; the tokens that they were measured on."""
    text = (str(models / "text.txt"),)
    for name in ("dense", "moe"):
        options = QuantizeOptions(to="fp8-static", calibration=text, calibration_tokens=700, kv_cache=True)
        quantize(models / name, models / f"{name}-static", options)
    batches = calibration_batches(Checkpoint(models / "dense"), text, 700)
    return models, torch.from_numpy(np.concatenate([tokens[:, :-1] for tokens in batches])).long()


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_static_scales_are_the_largest_activations_of_transformers(static, name):
    models, tokens = static
    model = transformers.AutoModelForCausalLM.from_pretrained(
        models / name, dtype=torch.float32, attn_implementation="eager"
    )
    largest = {}

    def see(module, inputs, name):
        largest[name] = max(largest.get(name, 0), inputs[0].abs().max().item())

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(functools.partial(see, name=path))
        if path.endswith("experts"):
            module.register_forward_pre_hook(functools.partial(see_experts, largest=largest, path=path))
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    tensors = safetensors.torch.load_file(models / f"{name}-static" / "model.safetensors")
    scales = {name: scale.item() for name, scale in tensors.items() if name.endswith("input_scale")}
    assert len(scales) == 2 * (7 if name == "dense" else 4 + 3 * 4)
    for path, scale in scales.items():
        path = path.removesuffix(".input_scale").replace("block_sparse_moe", "mlp")
        np.testing.assert_allclose(scale, largest[path] / 448, rtol=2**-8)  # they are bfloat16
    for number, layer in enumerate(cache.layers):
        for what, seen in (("k", layer.keys), ("v", layer.values)):
            scale = tensors[f"model.layers.{number}.self_attn.{what}_scale"]
            np.testing.assert_allclose(scale.float(), [seen.abs().max() / 448], rtol=2**-8)


def see_experts(module, inputs, largest, path):
    x, chosen = inputs[:2]
    for expert in range(4):
        own = x[(chosen == expert).any(-1)]
        gate, up = (own @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        for name, array in (("w1", own), ("w3", own), ("w2", hidden)):
            largest[f"{path}.{expert}.{name}"] = array.abs().max().item()


def opened_by_compressed_tensors(directory, run_compressed):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.bfloat16,
        attn_implementation="eager",
        output_loading_info=True,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=run_compressed),
    )


def test_compressed_tensors_opens_static_scales(static):
    models, _ = static
    theirs, report = opened_by_compressed_tensors(models / "dense-static", True)
    assert not any(report.values())
    tensors = safetensors.torch.load_file(models / "dense-static" / "model.safetensors")
    scales = [name for name in tensors if name.endswith("_scale")]
    assert len(scales) == 2 * (7 + 7 + 2)
    for name in scales:
        torch.testing.assert_close(theirs.get_parameter(name), tensors[name], rtol=0, atol=0)
    theirs, report = opened_by_compressed_tensors(models / "moe-static", False)  # fused experts are no linear modules
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(fp8.is_activation_scale(name) for name in report["unexpected_keys"])
    with torch.no_grad():
        expected = theirs.float().eval()(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(models / "moe-static"), expected, atol=1e-5 * expected.std())


def test_experts_with_few_tokens_are_named_and_get_the_layers_largest_scale(static, tmp_path, capsys, monkeypatch):
    models, _ = static
    monkeypatch.setattr("convert.activation_scales.FEWEST_TOKENS", 1 << 30)
    arguments = ["--calibration", str(models / "text.txt"), "--calibration-tokens", "700"]
    assert main(["quantize", str(models / "moe"), str(tmp_path / "fp8"), "--to", "fp8-static", *arguments]) == 0
    assert "layer 0: 0, 1, 2, 3; layer 1: 0, 1, 2, 3" in capsys.readouterr().err
    before, after = (
        safetensors.torch.load_file(directory / "model.safetensors")
        for directory in (models / "moe-static", tmp_path / "fp8")
    )
    for name in ("w1", "w2"):
        keys = [f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.input_scale" for expert in range(4)]
        assert {after[key].item() for key in keys} == {max(before[key].item() for key in keys)}


def test_mistrals_layout_holds_static_scales(static, tmp_path):
    models, _ = static
    options = QuantizeOptions("mistral", (str(models / "text.txt"),), 700, kv_cache=True)
    quantize(models / "dense", tmp_path / "fp8", options)
    assert json.loads((tmp_path / "fp8" / "params.json").read_text())["quantization"]["qscheme_act"] == "TENSOR"
    ours = safetensors.torch.load_file(tmp_path / "fp8" / "consolidated.safetensors")
    other = safetensors.torch.load_file(models / "dense-static" / "model.safetensors")
    for name, key in {
        "layers.1.attention.wo.qscale_act": "model.layers.1.self_attn.o_proj.input_scale",
        "layers.1.attention.k_fake_quantizer.qscale_act": "model.layers.1.self_attn.k_scale",
    }.items():
        assert ours[name].item() == pytest.approx(other[key].item(), rel=2**-8)
    Checkpoint(tmp_path / "fp8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "fp8-static"], "--to fp8-static: expected --calibration text"),
        (["--kv-cache"], "--kv-cache: expected --calibration text"),
        (["--to", "fp8-block", "--kv-cache"], "--to fp8-block has no scales of keys and values"),
        (["--calibration", "text.txt"], "without --kv-cache has no scales to measure"),
        (["--to", "fp8-static", "--calibration", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_flags_that_do_not_go_together(models, tmp_path, capsys, flags, message):
    assert main(["quantize", str(models / "dense"), str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


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
