"""Mistral's layout against its reference definition of attention, and there and back bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.layout import change_layout
from convert.options import LAYOUT, LayoutOptions
from convert.verify.logits import torch_logits
from nemoe_jax.checkpoints import mistral_format, pretrained
from nemoe_jax.checkpoints.layout import CONSOLIDATED, HUGGING_FACE, MISTRAL, PARAMS, SINGLE, layout_of
from nemoe_jax.checkpoints.reader import Checkpoint, read_config, units
from nemoe_jax.checkpoints.writer import Writer
from nemoe_jax.errors import UserError
from nemoe_jax.model.rope import rope, rope_cos_sin
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import PRESETS
from nemoe_jax.utils.command import Command
from tests.support.compiled import forward, random_tokens
from tests.support.configs import DENSE, MIXTRAL, NEKOMIND

CONFIGS = {
    "dense": DENSE.replace(dtype="bfloat16"),
    "tied": DENSE.replace(tied=True, dtype="float16"),
    "mixtral": MIXTRAL,
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def directory(request, tmp_path):
    """A Hugging Face directory with a tokenizer."""
    params = schema.initialize(request.param, jax.random.key(0))
    pretrained.save_pretrained(tmp_path / "hf", request.param, params)
    (tmp_path / "hf" / "tekken.json").write_text("{}")
    return tmp_path / "hf"


def to(layout, source, destination):
    return change_layout(source, destination, LayoutOptions(layout))


def test_there_and_back_is_the_same_bit_for_bit(directory, tmp_path):
    to("mistral", directory, tmp_path / "mistral")
    names = {path.name for path in (tmp_path / "mistral").iterdir() if path.stem != "conversion"}
    assert names == {CONSOLIDATED, PARAMS, "tekken.json"}
    to("huggingface", tmp_path / "mistral", tmp_path / "back")
    for name in (SINGLE, "config.json", "tekken.json"):
        assert (tmp_path / "back" / name).read_bytes() == (directory / name).read_bytes()
    to("mistral", tmp_path / "mistral", tmp_path / "copy")
    for name in (CONSOLIDATED, PARAMS):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "mistral" / name).read_bytes()


def test_both_directories_are_the_same_model(directory, tmp_path):
    theirs = tmp_path / "mistral"
    to("mistral", directory, theirs)
    config, params = pretrained.load_pretrained(directory)
    mistral_config, mistral = pretrained.load_pretrained(theirs)
    assert mistral_config == config
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), mistral, params)
    tokens = random_tokens(jax.random.key(1), (2, 7), config.vocab)
    logits = [
        forward(config, pretrained.load_pretrained(path, dtype=jnp.float32)[1], tokens).logits
        for path in (directory, theirs)
    ]
    np.testing.assert_array_equal(*logits)
    assert float(jnp.std(logits[0])) > 0.1


def rotated_neighbours(x_TNH, theta):
    """Mistral's reference RoPE: dimensions 2i and 2i + 1 are a complex number, turned by position · theta^(-2i/H)."""
    positions, _, size = x_TNH.shape
    angles = np.arange(positions)[:, None] * theta ** (-np.arange(0, size, 2) / size)
    turned = (x_TNH[..., ::2] + 1j * x_TNH[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([turned.real, turned.imag], -1).reshape(x_TNH.shape)


def test_attention_scores_are_those_of_the_reference_definition(tmp_path):
    config = DENSE
    pretrained.save_pretrained(tmp_path / "hf", config, schema.initialize(config, jax.random.key(0)))
    to("mistral", tmp_path / "hf", tmp_path / "mistral")
    ours, theirs = load_file(tmp_path / "hf" / SINGLE), load_file(tmp_path / "mistral" / CONSOLIDATED)
    x_TD = np.random.default_rng(0).normal(size=(11, config.hidden)).astype(np.float32)

    def heads(weight):
        return (x_TD @ weight.T).reshape(len(x_TD), -1, config.head_dim)

    def scores(q_TNH, k_TKH):
        return np.einsum("tnh,snh->nts", q_TNH, np.repeat(k_TKH, config.heads // config.kv_heads, 1))

    wq, wk = (theirs[f"layers.1.attention.{name}.weight"] for name in ("wq", "wk"))
    expected = scores(*(rotated_neighbours(heads(weight), config.rope_theta) for weight in (wq, wk)))
    q, k = (ours[f"model.layers.1.self_attn.{name}_proj.weight"] for name in ("q", "k"))
    turned = rope_cos_sin(config, jnp.arange(len(x_TD))[None])
    halves = [np.asarray(rope(heads(w)[None], turned))[0] for w in (q, k)]
    np.testing.assert_allclose(scores(*halves), expected, atol=1e-4 * np.abs(expected).max())
    assert not np.array_equal(q, wq) and not np.array_equal(k, wk)
    for key, name in (("v", "wv"), ("o", "wo")):
        np.testing.assert_array_equal(
            ours[f"model.layers.1.self_attn.{key}_proj.weight"], theirs[f"layers.1.attention.{name}.weight"]
        )


def test_the_names_are_those_of_published_directories(tmp_path):
    pretrained.save_pretrained(tmp_path / "hf", MIXTRAL, schema.initialize(MIXTRAL, jax.random.key(0)))
    to("mistral", tmp_path / "hf", tmp_path / "mistral")
    tensors = load_file(tmp_path / "mistral" / CONSOLIDATED)
    layer = ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "attention_norm", "ffn_norm"]
    layer += ["feed_forward.gate", *(f"feed_forward.experts.{e}.w{n}" for e in range(16) for n in (1, 2, 3))]
    names = ["tok_embeddings", "norm", "output", *(f"layers.{number}.{name}" for number in range(3) for name in layer)]
    assert tensors.keys() == {f"{name}.weight" for name in names}
    assert tensors["layers.2.feed_forward.experts.15.w2.weight"].shape == (24, 12)
    assert json.loads((tmp_path / "mistral" / PARAMS).read_text()) == {
        "dim": 24,
        "n_layers": 3,
        "head_dim": 10,
        "hidden_dim": 12,
        "n_heads": 6,
        "n_kv_heads": 2,
        "norm_eps": 1e-5,
        "vocab_size": 72,
        "rope_theta": 1e6,
        "max_position_embeddings": 96,
        "tied_embeddings": False,
        "moe": {"num_experts": 16, "num_experts_per_tok": 4},
    }


NEMO = {
    "dim": 5120,
    "n_layers": 40,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 131072,
    "rope_theta": 1000000.0,
}


def test_the_params_of_mistral_nemo_are_its_preset():
    assert mistral_format.from_params(NEMO) == PRESETS["mistral-nemo-12b"]
    assert mistral_format.from_params({**NEMO, "max_seq_len": 4096}).context == 4096
    assert mistral_format.from_params({**NEMO, "rope_theta": None}).rope_theta == 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": None, "n_heads": None}, "dim is missing; n_heads is missing"),
        ({"dim": "5120"}, "dim: expected an integer, got '5120'"),
        ({"n_layers": -1}, "layers: expected a positive number, got -1"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a finite number, got nan"),
        ({"sliding_window": [4096, 131072]}, r"sliding_window: expected an integer, got \[4096, 131072\]"),
        ({"vision_encoder": {"hidden_size": 1024}}, r"vision_encoder \(not supported\)"),
        ({"model_type": "mamba"}, r"model_type \(not supported\)"),
        ({"moe": 8}, "moe: expected an object, got 8"),
        ({"moe": {"num_experts": 8}}, "moe: num_experts_per_tok is missing"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2.0}}, "moe: num_experts_per_tok: expected an integer"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "shared": 1}}, r"moe: 'shared' \(not supported\)"),
    ],
)
def test_params_that_say_something_else_are_refused(change, message):
    with pytest.raises(UserError, match=f"^some/params.json: .*{message}"):
        mistral_format.from_params({**NEMO, **change}, "some/params.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NEKOMIND, "models of family mistral or mixtral, not nekomind"),
        (DENSE.replace(family="llama"), "models of family mistral or mixtral, not llama"),
        (DENSE.replace(eos_token_id=(2, 5)), r"cannot say eos_token_id = \(2, 5\) \(it means 2\)"),
    ],
)
def test_what_the_layout_cannot_say_is_not_lost_unseen(config, message, tmp_path, capsys):
    pretrained.save_pretrained(tmp_path / "hf", config, schema.initialize(config, jax.random.key(0)))
    command = Command("nemoe-convert", "")
    LAYOUT.add_to(command)
    assert command.main(["layout", str(tmp_path / "hf"), str(tmp_path / "mistral"), "--to", "mistral"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'hf'}: Mistral's layout ") and error.count("\n") == 1
    with pytest.raises(UserError, match=message):
        mistral_format.to_params(config)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_every_key_has_a_name_and_every_name_a_key():
    for config in CONFIGS.values():
        for spec in schema.leaves(schema.declare(config)).values():
            for _, key in spec.tensors():
                name = mistral_format.to_mistral_key(key)
                assert name != key and mistral_format.from_mistral_key(name) == key
                assert mistral_format.from_mistral_key(key) is None


def test_the_layout_of_hugging_face_wins_where_both_are_whole(tmp_path):
    pretrained.save_pretrained(tmp_path / "model", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    to("mistral", tmp_path / "model", tmp_path / "mistral")
    for name in (PARAMS, CONSOLIDATED):
        (tmp_path / "model" / name).write_bytes((tmp_path / "mistral" / name).read_bytes())
    assert layout_of(tmp_path / "model") is HUGGING_FACE
    (tmp_path / "model" / SINGLE).unlink()  # a config.json without its weights does not keep the others from being read
    assert layout_of(tmp_path / "model") is MISTRAL
    assert Checkpoint(tmp_path / "model").config_file == PARAMS
    (tmp_path / "model" / CONSOLIDATED).unlink()
    assert layout_of(tmp_path / "model") is HUGGING_FACE
    (tmp_path / "model" / "config.json").unlink()
    assert read_config(tmp_path / "model") == DENSE.replace(dtype="bfloat16")


def test_shards_of_this_layout_are_written_resumed_and_read(tmp_path):
    pretrained.save_pretrained(tmp_path / "hf", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    source = Checkpoint(tmp_path / "hf")

    def start():
        return Writer(tmp_path / "mistral", DENSE, 1, {"options": 1}, MISTRAL)

    def tensors(unit):
        return {ref.key: source.view(ref.key) for ref in units(DENSE)[unit]}

    with pytest.raises(KeyboardInterrupt), start() as interrupted:
        interrupted.write(1, tensors(1))
        raise KeyboardInterrupt
    with start() as resumed:
        for key, tensor in resumed.read(1).items():
            np.testing.assert_array_equal(tensor, source.view(key))
        for unit in (0, 2, 3, 4):
            resumed.write(unit, tensors(unit))
        resumed.finish()
    names = {path.name for path in (tmp_path / "mistral").iterdir()}
    shards = {f"consolidated-{number:05d}-of-00005.safetensors" for number in range(1, 6)}
    assert names == {PARAMS, "consolidated.safetensors.index.json", *shards}
    written = Checkpoint(tmp_path / "mistral")
    assert written.config == DENSE and written.files.keys() == source.files.keys()
    for key in source.files:
        np.testing.assert_array_equal(written.view(key), source.view(key))


def test_verify_says_what_to_do(tmp_path):
    pretrained.save_pretrained(tmp_path / "hf", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    to("mistral", tmp_path / "hf", tmp_path / "mistral")
    with pytest.raises(UserError, match=r"mistral: transformers does not read Mistral's layout.*--to huggingface"):
        torch_logits(tmp_path / "mistral", np.zeros((1, 3), np.int64))


def test_names_of_the_other_layout_are_refused(tmp_path):
    pretrained.save_pretrained(tmp_path / "hf", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    to("mistral", tmp_path / "hf", tmp_path / "mistral")
    tensors = load_file(tmp_path / "mistral" / CONSOLIDATED)
    tensors["model.norm.weight"] = tensors.pop("norm.weight")
    tensors["output.weight"] = tensors["output.weight"][:-1]
    save_file(tensors, tmp_path / "mistral" / CONSOLIDATED)
    with pytest.raises(UserError) as caught:
        Checkpoint(tmp_path / "mistral")
    message = str(caught.value)
    assert "unexpected model.norm.weight (24,) in consolidated.safetensors" in message
    assert "missing norm.weight (24,)" in message
    assert "head: expected output.weight of shape (72, 24), got (71, 24) from consolidated.safetensors" in message
