"""Merged models against PEFT itself: the logits of its adapted models, on adapters that it saved."""

import functools
import json

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.numpy import load_file, save_file

from convert import cli
from convert.merge_lora import MergeOptions, merge
from nemoe_jax.adapters.peft_load import load_adapters
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec import schema
from tests.support.configs import DENSE, NEKOMIND
from tests.support.peft_models import EXPERTS, IDS, adapt, base, logits_of, mistral, mixtral, opened

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    return lambda kind: base(kind, directory)


@functools.partial(jax.jit, static_argnums=0)
def run(config, params):
    return forward(config, params, IDS).logits


def our_logits(directory):
    return np.asarray(run(*pretrained.load_pretrained(directory)))


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "attention and MLP": (mistral, {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}, (14, 0)),
    "embedding and head": (mistral, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, (4, 2)),
    "patterns": (
        mistral,
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 2},
            "alpha_pattern": {"self_attn.o_proj": 1.5, "layers.0.self_attn.q_proj": 20},
        },
        (6, 0),
    ),
    "rank-stabilized, as parameters": (
        mistral,
        {
            "target_modules": [],
            "target_parameters": ["q_proj.weight", "down_proj.weight"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 5, "down_proj.weight": 4},  # the first matches no parameter
        },
        (4, 0),
    ),
    "whole tensors": (mistral, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}, (2, 6)),
    "router and experts": (
        mixtral,
        {"target_modules": ATTENTION, "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
        (8 + 2 + 2 * 4 * 3, 0),
    ),
    "fused patterns": (
        mixtral,
        {
            "target_modules": [],
            "target_parameters": [*EXPERTS, "mlp.gate.weight"],
            "use_rslora": True,
            "rank_pattern": {"experts.down_proj": 5, "gate.weight": 2},
            "alpha_pattern": {"gate_up_proj": 9, r"layers\.1.*": 4},
        },
        (2 + 2 * 4 * 3, 0),
    ),
    "down alone": (mixtral, {"target_modules": [], "target_parameters": EXPERTS[1:]}, (2 * 4, 0)),
    "gate and up alone": (mixtral, {"target_modules": [], "target_parameters": EXPERTS[:1]}, (2 * 4 * 2, 0)),
    "converted names": (mixtral, {"target_modules": ["gate", "w1", "w2", "w3"]}, (2 + 2 * 4 * 3, 0)),
}


@pytest.mark.parametrize(("kind", "options", "counts"), CASES.values(), ids=CASES.keys())
def test_merged_logits_are_those_of_peft(kind, options, counts, bases, tmp_path):
    model = adapt(bases(kind), tmp_path / "adapter", **options)
    manifest = merge(bases(kind), tmp_path / "merged", MergeOptions(str(tmp_path / "adapter")))
    expected = logits_of(model)
    assert np.abs(expected - our_logits(bases(kind))).max() > 0.1  # the adapter does something
    np.testing.assert_allclose(our_logits(tmp_path / "merged"), expected, atol=2e-5)
    assert (manifest.figures["tensors_updated"], manifest.figures["tensors_replaced"]) == counts
    theirs = model.merge_and_unload()
    np.testing.assert_allclose(logits_of(theirs), expected, atol=2e-5)


def older(directory, config):
    """Writes an adapter with a module for each expert, as PEFT did while transformers held experts apart."""
    generator = np.random.default_rng(2)

    def pair(module, outputs, inputs, rank=3):
        return {
            f"base_model.model.model.{module}.lora_A.weight": (rank, inputs),
            f"base_model.model.model.{module}.lora_B.weight": (outputs, rank),
        }

    shapes = {}
    for layer in range(config.num_hidden_layers):
        moe = f"layers.{layer}.block_sparse_moe"
        shapes |= pair(f"{moe}.gate", 4, 24)
        for expert in range(4):
            shapes |= pair(f"{moe}.experts.{expert}.w1", 16, 24)
            shapes |= pair(f"{moe}.experts.{expert}.w2", 24, 16)
            shapes |= pair(f"{moe}.experts.{expert}.w3", 16, 24)
    directory.mkdir()
    tensors = {key: (0.3 * generator.normal(size=shape)).astype(np.float32) for key, shape in shapes.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["gate", "w1", "w2", "w3"]}
    (directory / "adapter_config.json").write_text(json.dumps(options))


def test_an_adapter_with_a_module_for_each_expert(bases, tmp_path):
    older(tmp_path / "adapter", mixtral()[0])
    merge(bases(mixtral), tmp_path / "merged", MergeOptions(str(tmp_path / "adapter")))
    expected = logits_of(peft.PeftModel.from_pretrained(opened(bases(mixtral)), tmp_path / "adapter").eval())
    assert np.abs(expected - our_logits(bases(mixtral))).max() > 0.1
    np.testing.assert_allclose(our_logits(tmp_path / "merged"), expected, atol=2e-5)


def linear(module, outputs, inputs, rank=3, value=0.25):
    """The tensors of a hand-made adapter of one module."""
    return {
        f"base_model.model.{module}.lora_A.weight": np.full((rank, inputs), value, np.float32),
        f"base_model.model.{module}.lora_B.weight": np.full((outputs, rank), value, np.float32),
    }


Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path):
    def write(tensors=None, **options):
        directory = tmp_path / "adapter"
        directory.mkdir(exist_ok=True)
        save_file(linear(Q, 60, 24) if tensors is None else tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6} | options)
        )
        return MergeOptions(str(directory))

    return write


def test_the_sum_is_formed_in_float32_and_the_rest_is_copied(adapter, dense_directory, tmp_path):
    merge(dense_directory, tmp_path / "merged", adapter())
    before, after = load_file(dense_directory / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        changed = weight if key != f"{Q}.weight" else (weight.astype(np.float32) + 2 * 3 / 16).astype(weight.dtype)
        np.testing.assert_array_equal(after[key], changed, err_msg=key)


def test_nekomind_has_experts_one_by_one_a_shared_one_and_dense_layers(adapter, tmp_path):
    params = {path: np.zeros(spec.shape) for path, spec in schema.leaves(schema.declare(NEKOMIND)).items()}
    pretrained.save_pretrained(tmp_path / "model", NEKOMIND, schema.unflatten(params))
    adapted = {
        "model.layers.0.mlp.gate_proj": (40, 24),
        "model.layers.2.mlp.shared_expert.down_proj": (24, 14),
        "model.layers.3.mlp.experts.5.up_proj": (12, 24),
        "model.layers.4.mlp.gate": (8, 24),
    }
    tensors = {}
    for module, (outputs, inputs) in adapted.items():
        tensors |= linear(module, outputs, inputs)
    manifest = merge(tmp_path / "model", tmp_path / "merged", adapter(tensors))
    assert [layer["tensors_changed"] for layer in manifest.layers] == [1, 0, 1, 1, 1]
    merged = Checkpoint(tmp_path / "merged")
    for key in merged.files:
        np.testing.assert_array_equal(merged.view(key), 0.375 if key.removesuffix(".weight") in adapted else 0)


def test_a_tied_embedding_takes_an_update_that_was_tied(adapter, tmp_path):
    config = DENSE.replace(tied=True)
    pretrained.save_pretrained(tmp_path / "model", config, schema.initialize(config, jax.random.key(0)))
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors = {f"{name}A": np.full((3, 72), 0.5, np.float32), f"{name}B": np.full((24, 3), 0.5, np.float32)}
    with pytest.raises(UserError, match="adapted apart from the head"):
        load_adapters(adapter(tensors).adapter, config)
    tensors |= linear("lm_head", 72, 24, value=0.5)
    merge(tmp_path / "model", tmp_path / "merged", adapter(tensors, ensure_weight_tying=True))
    before, after = (Checkpoint(tmp_path / name).view("model.embed_tokens.weight") for name in ("model", "merged"))
    np.testing.assert_allclose(after, before + 1.5, atol=1e-6)


def test_the_command(adapter, dense_directory, tmp_path, capsys):
    arguments = ["merge", str(dense_directory), adapter().adapter, str(tmp_path / "merged"), "--json"]
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "merged").exists()
    capsys.readouterr()
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {
        "destination": str(tmp_path / "merged"),
        "tensors_updated": 1,
        "tensors_replaced": 0,
    }
    manifest = json.loads((tmp_path / "merged" / "conversion.json").read_text())
    assert [layer["tensors_changed"] for layer in manifest["layers"]] == [0, 1, 0]
    assert manifest["options"]["adapter_sha256"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert cli.main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


A, B = (f"base_model.model.{Q}.lora_{factor}.weight" for factor in "AB")
BAD = {
    "another method": ({}, {"peft_type": "IA3"}, "peft_type: expected LORA, got IA3"),
    "transposed": ({}, {"fan_in_fan_out": True}, "fan_in_fan_out = True"),
    "changed base": ({}, {"init_lora_weights": "pissa"}, "init_lora_weights = pissa changed the base"),
    "rank": ({}, {"r": 0}, "expected positive integers, got 0"),
    "alpha": ({}, {"alpha_pattern": {"q_proj": "6"}}, "expected numbers, got 6"),
    "alpha that is no number": ({}, {"lora_alpha": np.nan}, "expected numbers, got nan"),
    "parameters": ({}, {"target_parameters": True}, "target_parameters: expected a list, got True"),
    "pattern": ({}, {"rank_pattern": {"(": 3}}, r"expected regular expressions, got \("),
    "pattern list": ({}, {"alpha_pattern": ["q_proj"]}, "alpha_pattern: expected an object"),
    "whole and low-rank": (
        linear(Q, 60, 24) | {A.replace("lora_A.", ""): np.zeros((60, 24), np.float32)},
        {},
        "expected a pair of A and B",
    ),
    "rank against config": (
        {},
        {"rank_pattern": {"q_proj": 4}},
        rf"adapter_model.safetensors: {A}: expected shape \(4, 24\), got \(3, 24\)",
    ),
    "shape": (linear(Q, 61, 24), {}, rf"adapter_model.safetensors: {B}: expected shape \(60, 3\), got \(61, 3\)"),
    "no such layer": (
        linear("model.layers.3.self_attn.q_proj", 60, 24) | linear("visual.proj", 4, 24),
        {},
        r"model.layers.3.self_attn.q_proj.lora_A.weight: matches nothing in a mistral model; .*visual.proj.lora_B",
    ),
    "experts of a dense model": (linear("model.layers.0.mlp.experts", 24, 16), {}, "matches nothing"),
    "half": ({A: np.zeros((3, 24), np.float32)}, {}, f"{A}: expected a pair of A and B"),
    "magnitudes": (
        {A.replace("lora_A", "lora_magnitude_vector"): np.zeros(60, np.float32)},
        {},
        "lora_magnitude_vector.weight: matches nothing",
    ),
    "not an adapter": ({f"{Q}.weight": np.zeros(60, np.float32)}, {}, f"{Q}.weight: not a tensor of a LoRA adapter"),
    "a norm": (linear("model.norm", 24, 24), {}, "model.norm.weight is no linear map"),
    "not finite": (linear(Q, 60, 24, value=np.nan), {}, f"{A}: NaN or infinite"),
}


@pytest.mark.parametrize(("tensors", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_adapters(tensors, options, message, adapter, dense_directory, tmp_path):
    with pytest.raises(UserError, match=message):
        merge(dense_directory, tmp_path / "merged", adapter(tensors or None, **options))
    assert not list(tmp_path.glob("*merged*"))


def test_directories_that_are_no_adapters(adapter, dense_directory, tmp_path):
    def refused(message, name):
        with pytest.raises(UserError, match=message):
            merge(dense_directory, tmp_path / "merged", MergeOptions(str(tmp_path / name)))

    refused("no such directory", "nowhere")
    refused("not a PEFT adapter directory: no adapter_config.json", "dense")
    adapter({})
    refused("no tensors", "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused("adapter_model.bin: a pickle file, which can run code", "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
    refused("not a JSON object", "adapter")
