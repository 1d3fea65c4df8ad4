import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nemoe_jax.checkpoints import pretrained, reader
from nemoe_jax.checkpoints.layout import INDEX, SINGLE
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.hf_config import to_hf
from nemoe_jax.spec.mesh import make_mesh
from tests.support.configs import DENSE, MIXTRAL


def assert_equal(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_saved_is_loaded_bit_for_bit(config, tmp_path, dtype):
    params = schema.initialize(config, jax.random.key(0), jnp.dtype(dtype))
    pretrained.save_pretrained(tmp_path / "model", config, params, dtype=dtype)
    loaded_config, loaded = pretrained.load_pretrained(tmp_path / "model")
    assert loaded_config == config.replace(dtype=dtype)
    assert_equal(loaded, params)


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 4}, {"data": 4, "tensor": 2}, {"fsdp": 8}])
def test_each_devices_shard_is_filled(config, tmp_path, sizes):
    params = schema.initialize(config, jax.random.key(0))
    pretrained.save_pretrained(tmp_path / "model", config, params, shard_bytes=20_000)
    mesh = make_mesh(sizes)
    _, loaded = pretrained.load_pretrained(tmp_path / "model", mesh=mesh)
    assert_equal(jax.device_get(loaded), params)
    expected = schema.leaves(sharding.shardings(config, mesh))
    assert {path: array.sharding for path, array in schema.leaves(loaded).items()} == expected
    pretrained.save_pretrained(tmp_path / "again", config, loaded)  # and back, from the mesh
    assert_equal(pretrained.load_pretrained(tmp_path / "again")[1], params)


def test_shards_hold_whole_layers_and_the_index_names_every_tensor(tmp_path):
    params = schema.initialize(MIXTRAL, jax.random.key(0))
    pretrained.save_pretrained(tmp_path / "model", MIXTRAL, params, shard_bytes=1)
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1  # weights can be read by whoever can read config.json
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    keys = {ref.key for unit in reader.units(MIXTRAL) for ref in unit}
    assert set(index["weight_map"]) == keys
    assert index["metadata"]["total_size"] == 4 * schema.count(MIXTRAL)[0]
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "model" / name)
        assert {index["weight_map"][key] for key in tensors} == {name}
        assert len({key.split(".")[2] for key in tensors if ".layers." in key}) <= 1


def test_tokenizer_files_are_carried_along(tmp_path):
    params = schema.initialize(DENSE, jax.random.key(0))
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "tekken.json", "chat_template.jinja", "model.safetensors"):
        (source / name).write_text(name)
    pretrained.save_pretrained(tmp_path / "model", DENSE, params, tokenizer_from=source)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "tekken.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "model" / "tekken.json").read_text() == "tekken.json"


@pytest.fixture
def model(tmp_path):
    """A saved model to damage."""
    pretrained.save_pretrained(tmp_path / "model", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    return tmp_path / "model"


def rewrite(directory, change):
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def test_every_bad_tensor_is_listed_in_one_error(model):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(60, np.float32)
        tensors["lm_head.weight"] = np.zeros((72, 23), np.float32)

    rewrite(model, change)
    with pytest.raises(UserError) as caught:
        pretrained.load_pretrained(model)
    message = str(caught.value)
    assert "missing model.norm.weight (24,)" in message
    assert "missing model.layers.1.mlp.up_proj.weight (48, 24)" in message
    assert "unexpected model.layers.0.self_attn.q_proj.bias (60,) in model.safetensors" in message
    assert "head: expected lm_head.weight of shape (72, 24), got (72, 23) from model.safetensors" in message


def test_what_transformers_ignores_is_ignored(tmp_path):
    tied = DENSE.replace(tied=True)
    params = schema.initialize(tied, jax.random.key(0))
    pretrained.save_pretrained(tmp_path / "model", tied, params)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float32)

    rewrite(tmp_path / "model", change)
    assert_equal(pretrained.load_pretrained(tmp_path / "model")[1], params)


def test_a_truncated_file_is_named(model):
    path = model / SINGLE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated: tensor \S+ ends at byte"):
        pretrained.load_pretrained(model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or no safetensors file"):
        pretrained.load_pretrained(model)
    path.write_bytes((20).to_bytes(8, "little") + b"{this is not JSON   ")
    with pytest.raises(UserError, match=r"model\.safetensors: the safetensors header is damaged"):
        pretrained.load_pretrained(model)


def test_a_missing_shard_is_named(tmp_path):
    pretrained.save_pretrained(tmp_path / "model", DENSE, schema.initialize(DENSE, jax.random.key(0)), shard_bytes=1)
    (tmp_path / "model" / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(UserError, match=r"missing shard model-00002-of-00005\.safetensors"):
        pretrained.load_pretrained(tmp_path / "model")


def test_not_a_model_directory(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        pretrained.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a model directory: no config\.json"):
        pretrained.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        pretrained.load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(DENSE)))
    with pytest.raises(UserError, match="no weights"):
        pretrained.load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"only pickle files \(pytorch_model.bin\), which can run code"):
        pretrained.load_pretrained(tmp_path)


def test_an_integer_tensor_is_refused(model):
    def change(tensors):
        tensors["model.norm.weight"] = np.ones(24, np.int32)

    rewrite(model, change)
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight has dtype I32; expected one of BF16, F16, F32"):
        pretrained.load_pretrained(model)


def test_nothing_is_overwritten_and_nothing_left_behind(model, tmp_path):
    params = schema.initialize(DENSE, jax.random.key(1))
    before = load_file(model / SINGLE)
    with pytest.raises(UserError, match="exists already"):
        pretrained.save_pretrained(model, DENSE, params)
    assert_equal(load_file(model / SINGLE), before)
    with pytest.raises(KeyError):
        pretrained.save_pretrained(tmp_path / "other", DENSE, {"embed": params["embed"]}, shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_are_cast_on_the_way(model):
    _, params = pretrained.load_pretrained(model, dtype=jnp.bfloat16)
    assert params["norm"].dtype == jnp.bfloat16
    expected = load_file(model / SINGLE)["lm_head.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["head"]), expected.T)
