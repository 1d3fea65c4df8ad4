"""Our logits against transformers' own models, in torch, on weights that transformers itself saved; and back."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from convert import cli
from convert.verify.logits import compare
from nemoe_jax.checkpoints import pretrained, reader
from nemoe_jax.inference.generate import generate
from nemoe_jax.spec import schema
from tests.support.compiled import forward
from tests.support.configs import NEKOMIND, TORCH_SIZES

pytestmark = pytest.mark.usefixtures("optimized")


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(intermediate_size=48, **TORCH_SIZES))


def llama():
    sizes = {key: value for key, value in TORCH_SIZES.items() if key != "sliding_window"}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=48, **sizes))


def mixtral(top_k):
    config = transformers.MixtralConfig(
        intermediate_size=16, num_local_experts=16, num_experts_per_tok=top_k, **TORCH_SIZES
    )
    return transformers.MixtralForCausalLM(config)


MODELS = {"mistral": mistral, "llama": llama, "mixtral top-2": lambda: mixtral(2), "mixtral top-4": lambda: mixtral(4)}


def lively(model):
    """Weights large enough for logits of unit scale, and norms that are not all ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def torch_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def our_logits(directory, ids):
    config, params = pretrained.load_pretrained(directory)
    return np.asarray(jax.jit(lambda params, ids: forward(config, params, ids).logits)(params, ids))


IDS = np.random.default_rng(0).integers(0, 72, (3, 29))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_logits_agree_in_float32(make, tmp_path):
    model = lively(make())
    model.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    expected = torch_logits(model, IDS)
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(our_logits(tmp_path / "model", IDS), expected, atol=1e-5)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_logits_agree_in_bfloat16(make, tmp_path):
    lively(make()).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    result = compare(torch_logits(model, IDS), our_logits(tmp_path / "model", IDS), 1)
    assert result.kl_divergence < 2e-3
    assert result.argmax_agreement > 0.9


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_what_we_save_opens_in_transformers(make, tmp_path):
    model = lively(make())
    model.save_pretrained(tmp_path / "theirs")
    config, params = pretrained.load_pretrained(tmp_path / "theirs")
    pretrained.save_pretrained(tmp_path / "ours", config, params, shard_bytes=30_000)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    np.testing.assert_allclose(torch_logits(again, IDS), torch_logits(model, IDS), atol=1e-6)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("config", [NEKOMIND, NEKOMIND.replace(qk_norm=False, tied=False)], ids=["tied", "no QK-norm"])
def test_nekomind_opens_with_the_code_beside_its_weights(config, tmp_path):
    params = schema.initialize(config, jax.random.key(0))
    pretrained.save_pretrained(tmp_path / "ours", config, params)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        trust_remote_code=True,
        dtype=torch.float32,
        output_loading_info=True,
        experts_implementation="eager",  # the grouped kernels want rows of a multiple of 16 bytes
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = np.asarray(forward(config, params, IDS).logits)
    np.testing.assert_allclose(torch_logits(model.eval(), IDS), expected, atol=1e-5)

    lively(model).save_pretrained(tmp_path / "theirs")
    assert (tmp_path / "theirs" / "modeling_nekomind.py").exists()
    assert reader.read_config(tmp_path / "theirs") == config
    expected = torch_logits(model, IDS)
    assert 0.5 < expected.std() < 2
    np.testing.assert_allclose(our_logits(tmp_path / "theirs", IDS), expected, atol=1e-5)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        said = model.generate(torch.tensor(IDS[:1, :8]), **options)[0, 8:].tolist()
    loaded = pretrained.load_pretrained(tmp_path / "theirs")
    assert [int(token[0]) for token in generate(*loaded, IDS[:1, :8].tolist(), 12)] == said


@pytest.mark.parametrize("family", ["mixtral", "nekomind"])
def test_the_verify_command_agrees_and_disagrees(family, tmp_path, capsys, monkeypatch):
    if family == "mixtral":
        lively(mixtral(2)).save_pretrained(tmp_path / "model")
    else:
        pretrained.save_pretrained(tmp_path / "model", NEKOMIND, schema.initialize(NEKOMIND, jax.random.key(0)))
    assert cli.main(["verify", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agrees"] is True

    # one expert's rows in another order: a mistake that only logits show
    view = reader.Checkpoint.view

    def shuffled(self, key, *dtype):
        tensor = view(self, key, *dtype)
        return tensor[::-1] if ".experts.3." in key else tensor

    monkeypatch.setattr(reader.Checkpoint, "view", shuffled)
    assert cli.main(["verify", str(tmp_path / "model"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["agrees"] is False
