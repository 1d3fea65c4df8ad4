"""Checkpoints whose tensors have other names than usual, and tensors that the config does not speak of."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convert.layout import LayoutOptions, change_layout
from nemoe_jax.checkpoints.reader import Checkpoint, read_config
from nemoe_jax.errors import UserError
from nemoe_jax.utils.note import note
from tests.support.families import lively, make, our_logits, torch_logits


@pytest.fixture(autouse=True)
def notes():
    note.cache_clear()


def rewrite(directory, change):
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def same_tensors(directory, other):
    one, two = Checkpoint(directory), Checkpoint(other)
    assert one.config == two.config and one.files.keys() == two.files.keys()
    assert all(np.array_equal(one.view(key), two.view(key)) for key in one.files)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts_fused_as_transformers_holds_them(family, tmp_path):
    model = lively(make(family))
    model.save_pretrained(tmp_path / "usual")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any("gate_up_proj" in name for name in load_file(tmp_path / "fused" / "model.safetensors"))
    same_tensors(tmp_path / "fused", tmp_path / "usual")


def test_fused_experts_of_another_shape_are_refused(tmp_path):
    lively(make("mixtral")).save_pretrained(tmp_path, save_original_format=False)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rewrite(tmp_path, lambda tensors: {**tensors, name: tensors[name][:, :-1].clone()})
    with pytest.raises(
        UserError, match=r"expected model\.layers\.1\.mlp\.experts\.gate_up_proj of shape \(4, 32, 24\)"
    ):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral", "qwen2"])
def test_a_head_of_its_own_is_kept_whatever_the_config_says(family, tmp_path, capsys):
    model = lively(make(family))
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert not read_config(tmp_path / "model").tied
    assert "weights hold another one" in capsys.readouterr().err
    np.testing.assert_allclose(our_logits(tmp_path / "model"), torch_logits(expected), atol=2e-5)
    if family in ("mistral", "mixtral"):
        change_layout(tmp_path / "model", tmp_path / "mistral", LayoutOptions("mistral"))
        params = tmp_path / "mistral" / "params.json"
        assert json.loads(params.read_text())["tied_embeddings"] is False
        params.write_text(json.dumps(json.loads(params.read_text()) | {"tied_embeddings": True}))
        assert not read_config(tmp_path / "mistral").tied


def test_a_head_that_is_the_embedding_stays_tied(tmp_path, capsys):
    lively(make("llama", tie_word_embeddings=True)).save_pretrained(tmp_path)
    embedding = "model.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors[embedding].clone()})
    assert read_config(tmp_path).tied and "note:" not in capsys.readouterr().err
    Checkpoint(tmp_path)


def test_a_tied_embedding_may_be_saved_as_the_head(tmp_path):
    """As `safetensors.torch.save_model` does, which keeps one name of each array."""
    lively(make("llama", tie_word_embeddings=True)).save_pretrained(tmp_path)
    rewrite(
        tmp_path, lambda tensors: {name.replace("model.embed_tokens", "lm_head"): tensors[name] for name in tensors}
    )
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    np.testing.assert_allclose(our_logits(tmp_path), torch_logits(expected), atol=2e-5)


def test_the_value_head_of_trl_is_named_and_left_out(tmp_path, capsys):
    lively(make("llama")).save_pretrained(tmp_path / "model")
    lively(make("llama")).save_pretrained(tmp_path / "plain")
    head = {"v_head.summary.weight": torch.ones(1, 24), "v_head.summary.bias": torch.ones(1)}
    rewrite(tmp_path / "model", lambda tensors: {**tensors, **head})
    same_tensors(tmp_path / "model", tmp_path / "plain")
    printed = capsys.readouterr().err
    assert "left out TRL's value head: v_head.summary.bias, v_head.summary.weight" in printed


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_within_another_is_read(prefix, tmp_path, capsys):
    model = lively(make("mistral"))
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "model")
    head = "lm_head.weight" if prefix.startswith("model") else "language_model.lm_head.weight"

    def wrap(tensors):
        renamed = {
            name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items() if "lm_head" not in name
        }
        return {**renamed, head: tensors["lm_head.weight"], "vision_tower.ln_pre.weight": torch.ones(8)}

    rewrite(tmp_path / "model", wrap)
    path = tmp_path / "model" / "config.json"
    text = json.loads(path.read_text())
    outer = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "dtype": text["dtype"]}
    path.write_text(json.dumps({**outer, "text_config": text, "vision_config": {"model_type": "pixtral"}}))
    same_tensors(tmp_path / "model", tmp_path / "plain")
    assert "left out a vision tower: vision_tower.ln_pre.weight" in capsys.readouterr().err
