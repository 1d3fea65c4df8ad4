"""What adapters hold beyond low-rank updates: saved embeddings, other vocabularies, DoRA, rows, biases; other tools."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convert.layout import LayoutOptions, change_layout
from convert.merge_lora import MergeOptions, merge
from nemoe_jax.adapters.peft_load import load_adapters
from nemoe_jax.checkpoints.reader import Checkpoint, read_config
from nemoe_jax.errors import UserError
from nemoe_jax.utils.note import note
from tests.support.families import lively, make, torch_logits

BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(autouse=True)
def notes():
    note.cache_clear()


def saved(family, directory, **changes):
    lively(make(family, **changes)).save_pretrained(directory)
    return directory


def opened(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def adapt(model, target, save="auto", **options):
    """Saves an adapter as if trained; returns PEFT's logits."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **options)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in adapted.parameters():
            if tensor.requires_grad:
                tensor.add_(0.3 * torch.randn_like(tensor))
    adapted.save_pretrained(target, save_embedding_layers=save)
    return torch_logits(adapted)


def check_merged(source, adapter, destination, expected, **options):
    merge(source, destination, MergeOptions(str(adapter), **options))
    np.testing.assert_allclose(torch_logits(opened(destination)), expected, atol=2e-4 * max(expected.std(), 1))
    Checkpoint(destination)


CASES = {
    "modules_to_save": ({}, {"target_modules": ["q_proj"], "modules_to_save": BOTH}, False),
    "modules_to_save under three names": ({}, {"target_modules": ["q_proj"], "modules_to_save": BOTH}, True),
    "targets with saved embedding layers": ({}, {"target_modules": ["q_proj", *BOTH]}, "auto"),
    "DoRA": ({}, {"target_modules": ["q_proj", "down_proj", *BOTH], "use_dora": True}, False),
    "rows": ({}, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 71]}, False),
    "rows of several modules": (
        {},
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [7, 1]}},
        False,
    ),
    "biases of LoRA": ({}, {"target_modules": ["q_proj", "o_proj"], "lora_bias": True}, False),
    "biases": ({}, {"target_modules": ["q_proj", "v_proj"], "bias": "all"}, False),
}
TIED = ("modules_to_save", "modules_to_save under three names", "targets with saved embedding layers", "rows")
CASES |= {f"{name}, tied": ({"tie_word_embeddings": True}, *CASES[name][1:]) for name in TIED}
CASES["head alone, tied"] = {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "lm_head"]}, False
CASES["embedding alone, tied"] = {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}, False


@pytest.mark.parametrize(("changes", "options", "save"), CASES.values(), ids=CASES.keys())
def test_merged_equals_peft(changes, options, save, tmp_path, capsys):
    source = saved("llama", tmp_path / "model", **changes)
    expected = adapt(opened(source), tmp_path / "adapter", save, **options)
    check_merged(source, tmp_path / "adapter", tmp_path / "merged", expected)
    tied = bool(changes) and "trainable_token_indices" in options
    assert read_config(tmp_path / "merged").tied == tied
    assert ("embedding and head apart" in capsys.readouterr().err) == (bool(changes) and not tied)


@pytest.mark.parametrize("tied", [False, True])
def test_a_larger_vocabulary_is_taken_with_its_tokenizer(tied, tmp_path):
    source = saved("mistral", tmp_path / "model", tie_word_embeddings=tied)
    (source / "tokenizer.json").write_text("{}")
    model = opened(source)
    model.resize_token_embeddings(75)
    expected = adapt(model, tmp_path / "adapter", True, target_modules=["q_proj"])
    (tmp_path / "adapter" / "tokenizer.json").write_text('{"grown": true}')
    with pytest.raises(UserError, match="a vocabulary of 75 tokens, the model's has 72; nemoe-convert merge --resize"):
        merge(source, tmp_path / "merged", MergeOptions(str(tmp_path / "adapter")))
    check_merged(source, tmp_path / "adapter", tmp_path / "merged", expected, resize_vocab=True)
    assert (read_config(tmp_path / "merged").vocab, read_config(tmp_path / "merged").tied) == (75, tied)
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == '{"grown": true}'
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    if not tied:
        save_file({key: value for key, value in load_file(path).items() if "lm_head" not in key}, path)
        with pytest.raises(UserError, match="75 tokens, and no lm_head of that size"):
            merge(source, tmp_path / "again", MergeOptions(str(tmp_path / "adapter"), resize_vocab=True))


def test_two_values_of_one_saved_module_are_refused(tmp_path):
    source = saved("mistral", tmp_path / "model")
    adapt(opened(source), tmp_path / "adapter", True, target_modules=["q_proj"], modules_to_save=BOTH)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name = "base_model.model.lm_head.modules_to_save.weight"
    save_file(load_file(path) | {name: torch.ones(72, 24)}, path)
    with pytest.raises(
        UserError, match=r"modules_to_save\.weight: expected what base_model\.model\.lm_head\.weight holds"
    ):
        merge(source, tmp_path / "merged", MergeOptions(str(tmp_path / "adapter")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "lora_magnitude_vector scales"),
        ({"trainable_token_indices": [3]}, "replaces rows of model.embed_tokens.weight"),
        ({"lora_bias": True}, "is added to model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_what_is_no_low_rank_update_is_merged_first(options, message, tmp_path):
    source = saved("llama", tmp_path / "model")
    adapt(opened(source), tmp_path / "adapter", False, target_modules=["q_proj"], **options)
    with pytest.raises(UserError, match=f"{message}.*merge the adapter into its model first"):
        load_adapters(tmp_path / "adapter", read_config(source))


def test_a_bias_that_the_model_does_not_have_is_refused(tmp_path):
    source = saved("mistral", tmp_path / "model")
    adapt(opened(source), tmp_path / "adapter", False, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(UserError, match=r"lora_B\.bias: model\.layers\.0\.self_attn\.q_proj has no bias"):
        merge(source, tmp_path / "merged", MergeOptions(str(tmp_path / "adapter")))


@pytest.mark.parametrize("scaling", [None, 3.0])
@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_adapters_of_mistral_finetune(family, scaling, tmp_path):
    """W + scaling · B A of every tensor in Mistral's own layout, which its names and its rows follow."""
    source = saved(family, tmp_path / "model")
    change_layout(source, tmp_path / "mistral", LayoutOptions("mistral"))
    tensors = load_file(tmp_path / "mistral" / "consolidated.safetensors")
    torch.manual_seed(2)
    (tmp_path / "adapter").mkdir()
    lora = {}
    for name, weight in tensors.items():
        if ".attention." in name or ".w1." in name or ".w2." in name:
            a, b = torch.randn(3, weight.shape[1]) * 0.2, torch.randn(weight.shape[0], 3) * 0.2
            base = name.removesuffix(".weight")
            lora |= {f"{base}.lora_A.weight": a, f"{base}.lora_B.weight": b}
            tensors[name] = weight + (scaling or 2.0) * b @ a
    save_file(lora, tmp_path / "adapter" / "lora.safetensors")
    if scaling:
        (tmp_path / "adapter" / "params.json").write_text(json.dumps({"dim": 24, "lora": {"scaling": scaling}}))
    save_file(tensors, tmp_path / "mistral" / "consolidated.safetensors")
    merge(source, tmp_path / "merged", MergeOptions(str(tmp_path / "adapter")))
    expected, merged = Checkpoint(tmp_path / "mistral"), Checkpoint(tmp_path / "merged")
    for key in expected.files:
        np.testing.assert_allclose(merged.view(key), expected.view(key), atol=1e-6, err_msg=key)
    save_file({"layers.0.attention.wq.lora_A.weight": torch.ones(3, 24)}, tmp_path / "adapter" / "lora.safetensors")
    with pytest.raises(UserError, match="expected a pair of A and B"):
        merge(source, tmp_path / "again", MergeOptions(str(tmp_path / "adapter")))
