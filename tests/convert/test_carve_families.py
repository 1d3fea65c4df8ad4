"""A carve is written as the MoE family that its dense model's own features belong to, and transformers opens it."""

import numpy as np
import pytest
import torch
import transformers

from convert.carve.carve import CarveOptions, carve
from nemoe_jax.checkpoints.reader import read_config
from nemoe_jax.errors import UserError
from tests.support.families import lively, make, our_logits, torch_logits


@pytest.mark.parametrize(
    ("family", "options", "written"),
    [
        ("llama", CarveOptions(experts=4, top_k=2), "mixtral"),
        ("qwen3", CarveOptions(experts=4, top_k=2), "qwen3_moe"),
        ("qwen2", CarveOptions(experts=4, top_k=2, layout="shared", shared_ffn=16), "qwen2_moe"),
    ],
)
def test_a_carve_opens_in_transformers(family, options, written, tmp_path):
    lively(make(family, **({"attention_bias": False} if family == "llama" else {}))).save_pretrained(tmp_path / "dense")
    carve(tmp_path / "dense", tmp_path / "carved", options)
    assert read_config(tmp_path / "carved").family == written
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "carved", dtype=torch.float32).eval()
    expected = torch_logits(model)
    np.testing.assert_allclose(our_logits(tmp_path / "carved"), expected, atol=1e-4 * max(expected.std(), 1))


def test_a_layout_that_cannot_express_the_model_is_refused(tmp_path):
    lively(make("qwen2")).save_pretrained(tmp_path / "dense")
    with pytest.raises(
        UserError, match="without a shared expert expresses a qwen2 model; --layout shared writes qwen2_moe"
    ):
        carve(tmp_path / "dense", tmp_path / "carved", CarveOptions(experts=4, top_k=2))
    assert not (tmp_path / "carved").exists()
