"""Adapters to and from PEFT's directories, against PEFT itself on the models of transformers."""

import dataclasses
import errno
import functools
import json
import os
import socket
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.mesh import make_mesh

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.numpy import save_file

from nemoe_jax.adapters import lora, peft_save
from nemoe_jax.adapters.lora import Target
from nemoe_jax.adapters.peft_format import PeftAdapter
from nemoe_jax.adapters.peft_load import load_adapters, read_targets
from nemoe_jax.adapters.peft_save import save_adapters
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from tests.adapters.test_lora import every_weight
from tests.convert.test_merge import CASES, linear, older
from tests.support.compiled import forward, normal, random_adapters
from tests.support.configs import MIXTRAL, NEKOMIND
from tests.support.families import SIZES as FAMILY_SIZES
from tests.support.families import config_class
from tests.support.peft_models import IDS, SIZES, adapt, base, logits_of, mistral, mixtral, opened

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    return functools.cache(lambda kind: (base(kind, directory), *pretrained.load_pretrained(base(kind, directory))))


@functools.cache
def tied():
    config = transformers.MistralConfig(intermediate_size=48, tie_word_embeddings=True, **SIZES)
    return config, transformers.MistralForCausalLM


def of_family(name):
    def kind():
        # PEFT takes the dense layers of Qwen3-MoE for experts
        sizes = {key: value for key, value in FAMILY_SIZES[name].items() if key != "mlp_only_layers"}
        config = config_class(name)(**sizes)
        return config, getattr(transformers, FAMILIES[name].architecture)

    kind.__name__ = name
    return kind


QWEN2, QWEN2_MOE, QWEN3_MOE = map(of_family, ("qwen2", "qwen2_moe", "qwen3_moe"))


@functools.partial(jax.jit, static_argnums=0)
def run(config, params):
    return forward(config, params, IDS).logits


def assert_equal_trees(got, expected, atol=0.0):
    got, expected = schema.leaves(got), schema.leaves(expected)
    assert got.keys() == expected.keys()
    for path in expected:
        assert jax.tree.structure(got[path]) == jax.tree.structure(expected[path]), path
        for mine, other in zip(jax.tree.leaves(got[path]), jax.tree.leaves(expected[path]), strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=atol, err_msg=path)


RANKS = [Target("*/up", 2, 3.0), Target("*/router", 4, 2.0), Target("embed", 5, 1.0)]
SAVED = {
    "dense": (mistral, [Target("*", 3, 6.0)], {}),
    "dense, several ranks": (
        mistral,
        [Target("*/q", 5, 3.0, rslora=True), Target("*/ffn/*", 2, 7.0), Target("head", 4, 4.0)],
        {},
    ),
    "tied": (tied, [Target("embed", 4, 4.0), Target("*/q", 3, 6.0)], {}),
    "fused": (mixtral, [*RANKS, Target("*", 3, 6.0)], {}),
    "fused, gate and down": (mixtral, [Target("blocks/*/ffn/[gd]*", 3, 6.0)], {}),
    "fused, up": (mixtral, [Target("*/up", 3, 6.0)], {}),
    "qwen2": (QWEN2, [Target("*", 3, 6.0)], {}),
    "qwen2_moe": (QWEN2_MOE, [Target("*/shared_gate", 1, 6.0), *RANKS, Target("*", 3, 6.0)], {}),
    "qwen3_moe": (QWEN3_MOE, [*RANKS, Target("*", 3, 6.0)], {}),
    "linear": (mixtral, [*RANKS, Target("*", 3, 6.0)], {"experts": "linear"}),
    "linear, up and down": (mixtral, [Target("*/up", 2, 6.0), Target("*/down", 5, 3.0)], {"experts": "linear"}),
}


@pytest.mark.parametrize(("kind", "targets", "options"), SAVED.values(), ids=SAVED.keys())
def test_peft_loads_what_is_saved(kind, targets, options, bases, tmp_path):
    directory, config, params = bases(kind)
    adapters = random_adapters(config, targets, 0.1)
    save_adapters(tmp_path / "adapter", config, adapters, base_model=str(directory), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        model = peft.PeftModel.from_pretrained(opened(directory), tmp_path / "adapter").eval()
    expected = run(config, lora.merge(config, params, adapters))
    assert np.abs(expected - run(config, params)).max() > 0.1  # the adapter does something
    np.testing.assert_allclose(logits_of(model), expected, atol=2e-5)

    found, loaded = load_adapters(tmp_path / "adapter", config)
    assert read_targets(tmp_path / "adapter", config) == found
    # the shapes that are planned with are those that come
    assert jax.tree.structure(lora.abstract(config, found)) == jax.tree.structure(loaded)
    merged = lora.merge(config, params, adapters)
    assert_equal_trees(lora.merge(config, params, loaded), merged, 1e-6)
    assert_equal_trees(merged_by(PeftAdapter(tmp_path / "adapter", config), config, params), merged, 1e-6)
    if not options:
        for path, adapter in schema.leaves(adapters).items():
            again = schema.leaves(loaded)[path]
            np.testing.assert_array_equal(again.a, adapter.a, err_msg=path)
            np.testing.assert_allclose(again.scale * again.b, adapter.scale * adapter.b, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize(("kind", "options", "counts"), CASES.values(), ids=CASES.keys())
def test_what_peft_saves_is_loaded(kind, options, counts, bases, tmp_path):
    directory, config, params = bases(kind)
    model = adapt(directory, tmp_path / "adapter", **options)
    if "modules_to_save" in options:
        with pytest.raises(
            UserError, match=r"norm.weight replaces model.norm.weight: .*merge the adapter into its model"
        ):
            load_adapters(tmp_path / "adapter", config)
        return
    _, adapters = load_adapters(tmp_path / "adapter", config)
    np.testing.assert_allclose(run(config, lora.merge(config, params, adapters)), logits_of(model), atol=2e-5)


def merged_by(source, config, params):
    """The model's weights with an adapter in them, tensor by tensor."""
    expected = {}
    for path, spec in schema.leaves(schema.declare(config)).items():
        leaf = np.array(schema.leaves(params)[path])
        for place, key in spec.tensors():
            tensor = source.merged(key, np.ascontiguousarray(spec.to_torch(leaf[place])))
            leaf[place] = (tensor.T if spec.transposed else tensor).reshape(leaf[place].shape)
        expected[path] = leaf
    return schema.unflatten(expected)


def test_an_adapter_with_a_module_for_each_expert(bases, tmp_path):
    _, config, params = bases(mixtral)
    older(tmp_path / "adapter", mixtral()[0])
    targets, adapters = load_adapters(tmp_path / "adapter", config)
    assert {target.pattern: (target.rank, target.scale) for target in targets} == {
        f"blocks/moe/ffn/{name}": (3, 2.0) for name in ("router", "gate", "up", "down")
    }
    merged = lora.merge(config, params, adapters)
    assert_equal_trees(merged, merged_by(PeftAdapter(tmp_path / "adapter", config), config, params), 1e-6)


def write(directory, tensors, **options):
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 3, "lora_alpha": 6} | options
    (directory / "adapter_config.json").write_text(json.dumps(options))
    return directory


def test_layers_and_experts_without_an_adapter_and_of_other_ranks(tmp_path):
    ranks = {
        "model.layers.1.self_attn.q_proj": (60, 24, 5),
        "model.layers.4.self_attn.q_proj": (60, 24, 3),
        "model.layers.3.mlp.experts.5.up_proj": (12, 24, 3),
        "model.layers.2.mlp.shared_expert.down_proj": (24, 14, 3),
        "model.layers.0.mlp.gate_proj": (40, 24, 3),
        "model.layers.4.mlp.gate": (8, 24, 3),
    }
    tensors, generator = {}, np.random.default_rng(0)
    for module, (outputs, inputs, rank) in ranks.items():
        tensors |= linear(module, outputs, inputs, rank)
    tensors = {name: generator.normal(size=tensor.shape).astype(np.float32) for name, tensor in tensors.items()}
    pattern = {"layers.1.self_attn.q_proj": 5}
    write(
        tmp_path / "adapter",
        tensors,
        rank_pattern=pattern,
        alpha_pattern={"layers.4.self_attn.q_proj": 7},
        lora_dropout=0.1,
    )
    targets, adapters = load_adapters(tmp_path / "adapter", NEKOMIND)
    assert targets[0] == Target("blocks/dense/attn/q", 5, 6.0, dropout=0.1)
    assert adapters["blocks"]["dense"]["attn"]["q"].a.shape == (2, 24, 5)
    params = schema.initialize(NEKOMIND, jax.random.key(0))
    merged = lora.merge(NEKOMIND, params, adapters)
    assert_equal_trees(merged, merged_by(PeftAdapter(tmp_path / "adapter", NEKOMIND), NEKOMIND, params), 1e-6)
    q = adapters["blocks"]["moe"]["attn"]["q"]
    assert not q.a[:2].any() and not q.b[:2].any() and q.b[2].any()


@pytest.mark.parametrize("experts", ["fused", "linear"])
def test_nekomind_is_read_back(experts, tmp_path):
    targets = [Target("blocks/dense/attn/q", 4, 2.0), *every_weight(NEKOMIND)]  # another rank than the MoE layers' q
    adapters = random_adapters(NEKOMIND, targets, 0.1)
    save_adapters(tmp_path / "adapter", NEKOMIND, adapters, base_model="base", experts=experts)
    found, loaded = load_adapters(tmp_path / "adapter", NEKOMIND)
    assert {target.pattern: target.rank for target in found} == {
        path: target.rank for path, (_, target) in lora.match(NEKOMIND, targets).items()
    }
    assert_equal_trees(loaded, adapters)


def test_a_router_that_was_trained_whole(bases, tmp_path):
    directory, config, params = bases(mixtral)
    change = normal(jax.random.key(5), (2, 24, 4), 0.3)
    wide = normal(jax.random.key(6), (2, 24, 6, 10), 0.1)
    changes = {"blocks/moe/ffn/router": change, "blocks/moe/attn/q": wide}
    adapters = random_adapters(config, [Target("blocks/moe/ffn/[rd]*", 3, 6.0)], 0.1)  # of the router, too
    save_adapters(tmp_path / "adapter", config, adapters, base_model=str(directory), changes=changes)
    model = peft.PeftModel.from_pretrained(opened(directory), tmp_path / "adapter").eval()
    flat = schema.leaves(params)
    flat |= {path: flat[path] + change for path, change in changes.items()}
    expected = run(config, lora.merge(config, schema.unflatten(flat), adapters))
    np.testing.assert_allclose(logits_of(model), expected, atol=2e-5)
    with pytest.raises(UserError, match="norm: was trained whole and is no linear map"):
        save_adapters(tmp_path / "other", config, adapters, base_model="base", changes={"norm": jnp.ones(24)})
    assert not list(tmp_path.glob("*other*"))


def test_a_mesh_holds_the_same_adapters(bases, tmp_path):
    _, config, _ = bases(mixtral)
    targets = [Target("blocks/moe/*/[qdr]*", 3, 6.0, dropout=0.25)]
    mesh = make_mesh({"fsdp": 2, "expert": 4})
    placed = lora.initialize(config, targets, jax.random.key(1), lora.shardings(config, targets, mesh))
    save_adapters(tmp_path / "adapter", config, placed, base_model="base")
    found, loaded = load_adapters(tmp_path / "adapter", config, mesh)
    for path, adapter in schema.leaves(loaded).items():
        place = schema.leaves(lora.shardings(config, found, mesh))[path]
        assert (adapter.a.sharding, adapter.b.sharding) == (place.a, place.b), path
        np.testing.assert_array_equal(adapter.a, schema.leaves(placed)[path].a)


COPY = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from nemoe_jax.adapters.peft_load import load_adapters
from nemoe_jax.adapters.peft_save import save_adapters
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.mesh import make_mesh
config = ModelConfig(**json.loads(sys.argv[3]))
_, adapters = load_adapters("adapter", config, make_mesh({"fsdp": 2}))
assert not jax.tree.leaves(adapters)[0].is_fully_addressable
save_adapters("copy", config, adapters, base_model="base")
"""


def test_two_processes_read_and_write_what_one_does(tmp_path):
    adapters = random_adapters(MIXTRAL, [Target("*/q", 4, 6.0), Target("blocks/moe/ffn/[gud]*", 2, 3.0)], 0.1)
    save_adapters(tmp_path / "adapter", MIXTRAL, adapters, base_model="base")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", COPY, address]
    environment = os.environ | {"XLA_FLAGS": ""}  # one device each
    config = json.dumps(dataclasses.asdict(MIXTRAL))
    processes = [
        subprocess.Popen([*command, str(number), config], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        for number in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes(), name


def test_bad_adapters(bases, tmp_path):
    _, config, _ = bases(mistral)
    adapters = random_adapters(config, [Target("*/q", 3, 6.0)], 0.1)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: exists already"):
        save_adapters(tmp_path / "there", config, adapters, base_model="base")
    with pytest.raises(UserError, match="no adapters to write"):
        save_adapters(tmp_path / "none", config, {}, base_model="base")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        save_adapters(tmp_path / "file" / "adapter", config, adapters, base_model="base")
    write(tmp_path / "wide", linear("model.layers.0.self_attn.k_proj", 20, 24, 21), r=21)
    with pytest.raises(
        UserError, match=r"wide/adapter_model.safetensors: LoRA target blocks/dense/attn/k: rank 21 is above 20"
    ):
        load_adapters(tmp_path / "wide", config)
    write(tmp_path / "nan", linear("model.layers.0.self_attn.k_proj", 20, 24, value=np.nan))
    with pytest.raises(UserError, match=r"nan/adapter_model.safetensors: .*k_proj.lora_A.weight: NaN or infinite"):
        load_adapters(tmp_path / "nan", config)
    write(tmp_path / "dropout", linear("model.layers.0.self_attn.k_proj", 20, 24), lora_dropout=1.0)
    with pytest.raises(UserError, match=r"LoRA target blocks/dense/attn/k: dropout: expected 0 to below 1, got 1.0"):
        read_targets(tmp_path / "dropout", config)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file", "wide", "nan", "dropout"}


def test_nothing_is_left_of_a_file_that_cannot_be_written(bases, tmp_path, monkeypatch):
    _, config, _ = bases(mistral)
    adapters = random_adapters(config, [Target("*/q", 3, 6.0)], 0.1)
    diverged = jax.tree.map(lambda x: x.at[1].set(jnp.nan), adapters)
    with pytest.raises(UserError, match=r"adapter: model.layers.1.self_attn.q_proj.lora_A.weight: NaN or infinite"):
        save_adapters(tmp_path / "adapter", config, diverged, base_model="base")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(peft_save, "write_at", full)
    with pytest.raises(UserError, match=r"\.adapter\.partial: No space left"):
        save_adapters(tmp_path / "adapter", config, adapters, base_model="base")
    monkeypatch.setattr(peft_save, "check_room", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_adapters(tmp_path / "adapter", config, adapters, base_model="base")
    assert not list(tmp_path.iterdir())
