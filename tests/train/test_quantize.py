"""Quantization-aware training: what is trained is what FP8 holds, and gradients go straight through."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.quantize import QuantizeOptions, quantize
from nemoe_jax.adapters.lora import Adapter
from nemoe_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from nemoe_jax.model.layers import project
from nemoe_jax.spec.fp8_weight import FakeQuantized, Fp8Weight
from tests.support.train_runs import make_workplace, write_recipe
from tests.train.test_train import held_out_loss
from train.cli import main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = tmp_path_factory.mktemp("workplace")
    make_workplace(place)
    return place


@pytest.mark.parametrize("trainable", ["lora", "all"])
def test_what_comes_out_scores_in_fp8_as_in_training(workplace, tmp_path, monkeypatch, trainable):
    monkeypatch.chdir(tmp_path)
    keys = {} if trainable == "lora" else {"trainable": "all", "train_router": False, "lora": []}
    assert (
        main(["run", str(write_recipe(Path("recipe.yaml"), workplace, "repair", quantize="fp8", steps=3, **keys))]) == 0
    )
    report = json.loads(Path("out/report.json").read_text())
    quantize("out", "fp8", QuantizeOptions("fp8-dynamic"))
    config, params = load_pretrained("fp8")
    assert isinstance(params["blocks"]["moe"]["ffn"]["gate"], Fp8Weight)
    in_fp8 = held_out_loss(config, params, workplace)
    assert in_fp8 == pytest.approx(report["held_out_loss_after"], abs=1e-5)
    gate = load_pretrained("out")[1]["blocks"]["moe"]["ffn"]["gate"]
    rounded = params["blocks"]["moe"]["ffn"]["gate"].dequantized(jnp.float32, 2)
    assert float(jnp.abs(gate - rounded).max() / jnp.std(gate)) > 1e-3  # unrounded it is another model


def test_rounding_is_that_of_fp8_and_gradients_go_straight_through():
    generator = np.random.default_rng(0)
    x_TD, w_DF, a_DK, b_KF = (
        np.float32(generator.standard_normal(shape)) for shape in ((3, 8), (8, 4), (8, 2), (2, 4))
    )
    adapter = Adapter(jnp.asarray(a_DK), jnp.asarray(b_KF), 0.5)
    merged_DF = w_DF + 0.5 * a_DK @ b_KF
    scale_F = np.abs(merged_DF).max(0) / 448
    rounded_DF = (merged_DF / scale_F).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale_F

    def y(x_TD, w_DF, adapter):
        return project(x_TD, FakeQuantized(w_DF), 1, adapter)

    np.testing.assert_allclose(y(x_TD, w_DF, adapter), x_TD @ rounded_DF, rtol=1e-5, atol=1e-5)
    dx_TD, dw_DF, dadapter = jax.grad(lambda *of: jnp.sum(y(*of) ** 2), argnums=(0, 1, 2))(x_TD, w_DF, adapter)
    dy_TF = 2 * x_TD @ rounded_DF
    np.testing.assert_allclose(dx_TD, dy_TF @ rounded_DF.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dw_DF, x_TD.T @ dy_TF, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dadapter.a, 0.5 * x_TD.T @ dy_TF @ b_KF.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base", ["fp8", "nf4"])
def test_adapters_over_a_quantized_base_learn_as_over_the_same_weights(workplace, tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    config, params = load_pretrained(workplace / "mixture", dtype=base)
    save_pretrained("rounded", config, params, tokenizer_from=workplace / "mixture", dtype="float32")
    losses = []
    for model, keys in (
        (workplace / "mixture", {"quantize": "fp8-base" if base == "fp8" else base}),
        (Path("rounded").resolve(), {}),
    ):
        recipe = write_recipe(
            Path("recipe.yaml"), workplace, "repair", model=str(model), output=f"out{len(losses)}", steps=3, **keys
        )
        assert main(["run", str(recipe)]) == 0
        losses.append(json.loads(Path(f"out{len(losses)}/report.json").read_text())["held_out_loss_after"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("base", ["fp8-base", "nf4"])
def test_quantized_bases_are_for_frozen_weights(workplace, tmp_path, monkeypatch, capsys, base):
    monkeypatch.chdir(tmp_path)
    keys = {"trainable": "all", "train_router": False, "lora": []}
    assert main(["run", str(write_recipe(Path("recipe.yaml"), workplace, "repair", quantize=base, **keys))]) == 2
    assert f"quantize: {base} is for frozen weights" in capsys.readouterr().err


def test_dropout_is_refused(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lora = [{"pattern": "blocks/*/attn/*", "rank": 3, "dropout": 0.1}]
    recipe = write_recipe(Path("recipe.yaml"), workplace, "repair", quantize="fp8", lora=lora)
    assert main(["run", str(recipe)]) == 2
    assert "lora.dropout: expected 0 with quantize" in capsys.readouterr().err
