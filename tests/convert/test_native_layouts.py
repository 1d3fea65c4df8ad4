"""MoEs with a shared expert as Qwen3-Next and Ernie 4.5 MoE: transformers opens them, and its logits are ours."""

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from convert.layout import change_layout
from convert.options import LAYOUT, LayoutOptions
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.errors import UserError
from nemoe_jax.inference.generate import generate
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.utils.command import Command
from tests.support.configs import DENSE, MIXTRAL, NEKOMIND

CARVED = NEKOMIND.replace(qk_norm=False, shared_ffn=24, dense_layers=1, tied=False)
MODELS = {
    "qwen3-next": (NEKOMIND, "Qwen3NextForCausalLM"),
    "ernie tied": (CARVED.replace(tied=True, dense_layers=0, shared_ffn=12), "Ernie4_5_MoeForCausalLM"),
}


def write(directory, config: ModelConfig, gate: float = 0.0) -> None:
    """A model whose norms are no ones; the gates of its shared experts are the noise times `gate`."""
    rng = np.random.default_rng(0)
    pretrained.save_pretrained(directory, config, schema.initialize(config, jax.random.key(0)))
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = (1 + 0.4 * rng.standard_normal(tensor.shape)).astype(tensor.dtype)
        elif "shared_expert_gate" in name:
            tensors[name] = (gate * rng.standard_normal(tensor.shape)).astype(tensor.dtype)
        elif "embed_tokens" not in name:
            tensors[name] = (rng.standard_normal(tensor.shape) * tensor.shape[-1] ** -0.5).astype(tensor.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
def test_transformers_opens_it_with_the_same_logits_and_the_same_response(name, tmp_path):
    config, architecture = MODELS[name]
    write(tmp_path / "source", config, gate=1.0 if config.qk_norm else 0.0)
    change_layout(tmp_path / "source", tmp_path / "native", LayoutOptions(to=name.split()[0]))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "native", dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert type(model.eval()).__name__ == architecture
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]

    loaded, params = pretrained.load_pretrained(tmp_path / "source")
    tokens = np.random.default_rng(1).integers(3, config.vocab, (3, 29))
    with torch.inference_mode():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(jax.jit(forward, static_argnums=0)(loaded, params, tokens)[0])
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * theirs.std(), rtol=0)

    prompt = tokens[:1, :8]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        said = model.generate(torch.tensor(prompt), eos_token_id=None, **options)[0, 8:].tolist()
    assert [int(token[0]) for token in generate(loaded, params, prompt.tolist(), 12)] == said


def test_bfloat16_norms_below_a_half_stay_exact(tmp_path):
    write(tmp_path / "source", NEKOMIND.replace(dtype="bfloat16"))
    change_layout(tmp_path / "source", tmp_path / "native", LayoutOptions(to="qwen3-next"))
    source, native = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "native"))
    norms = [name for name in source if name.endswith("norm.weight")]
    assert min(source[name].astype(np.float32).min() for name in norms) < 0.5
    for name in norms:
        np.testing.assert_array_equal(native[name] + 1, source[name].astype(np.float32))


@pytest.mark.parametrize(
    ("to", "config", "gate", "message"),
    [
        ("qwen3-next", DENSE, 0, "expected an MoE, got a dense model, which MistralForCausalLM opens as it is"),
        ("ernie", MIXTRAL, 0, "expected a shared expert, got none; MixtralForCausalLM opens as it is"),
        ("ernie", NEKOMIND.replace(shared_ffn=0, qk_norm=False), 0, "got none; carve with --layout mixtral"),
        ("qwen3-next", CARVED, 0, "expected QK-norm, which this model does not have; use --to ernie"),
        ("ernie", NEKOMIND, 0, "it has no QK-norm, which this model has; use --to qwen3-next"),
        ("ernie", CARVED.replace(normalize_top_k=False), 0, "divides top-k weights by their sum"),
        ("ernie", CARVED.replace(shared_ffn=14), 0, "expected a shared expert of a multiple of 12 neurons.* got 14"),
        ("ernie", CARVED, 1, r"model.layers.\d.mlp.shared_expert_gate.weight \(4 of 4\) is not all zeros"),
    ],
)
def test_what_the_architecture_cannot_express_is_refused(to, config, gate, message, tmp_path):
    write(tmp_path / "source", config, gate)
    with pytest.raises(UserError, match=f"source: --to {to}: .*{message}"):
        change_layout(tmp_path / "source", tmp_path / "native", LayoutOptions(to=to))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command_writes_it(tmp_path, capsys):
    write(tmp_path / "source", CARVED)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    command = Command("nemoe-convert", "")
    LAYOUT.add_to(command)
    words = [str(tmp_path / "source"), str(tmp_path / "native"), "--to", "ernie", "--json"]
    command.main(["layout", *words])
    assert '"layout": "ernie"' in capsys.readouterr().out
    assert (tmp_path / "native" / "tokenizer.json").is_file()
