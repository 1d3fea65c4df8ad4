"""Damaged model directories end in one line that names the file, never in a traceback and never half done."""

import json
import random
import re
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import cli
from convert.layout import LayoutOptions, change_layout
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.checkpoints.layout import CONFIG, CONSOLIDATED, INDEX, PARAMS, SINGLE
from nemoe_jax.checkpoints.reader import Checkpoint, read_config
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from tests.support.configs import DENSE, MIXTRAL, NEKOMIND

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # a warning of NumPy's is a second line

SHARD = "model-00002-of-00005.safetensors"  # the first layer
Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Sound directories: one file, shards, a mixture, NekoMind, and Mistral's layout of a dense model and a mixture."""
    base = tmp_path_factory.mktemp("sound")
    dense = DENSE.replace(dtype="bfloat16")
    for name, config, shard_bytes in (
        ("dense", dense, 10**9),
        ("shards", dense, 1),
        ("mixtral", MIXTRAL, 10**9),
        ("nekomind", NEKOMIND, 10**9),
    ):
        pretrained.save_pretrained(
            base / name, config, schema.initialize(config, jax.random.key(0)), shard_bytes=shard_bytes
        )
    for name in ("dense", "mixtral"):
        change_layout(base / name, base / f"mistral-{name}", LayoutOptions("mistral"))
    return base


@pytest.fixture
def directory(sound, tmp_path):
    """A function: a copy of one of them, to damage."""
    return lambda name: Path(shutil.copytree(sound / name, tmp_path / "model"))


def refusal(directory):
    """The message that a directory is refused with, None where it is not."""
    try:
        Checkpoint(directory)
    except UserError as error:
        message = str(error)
        assert message.startswith(str(directory)) and message.isprintable()
        return message
    return None


def refuses(directory, message):
    refused = refusal(directory)
    assert refused is not None and re.search(message, refused), refused


def carving(source, capsys, destination=None):
    """Carves by the command; returns the error line, None where it succeeded."""
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    destination = destination or source.parent / "carved"
    existed = destination.exists()
    status = cli.main(["carve", str(source), str(destination), "--experts", "4", "--top-k", "2"])
    printed = capsys.readouterr().err
    if status == 0:
        assert "error: " not in printed
    else:
        assert status == 2 and printed.startswith("error: ") and printed.count("\n") == 1
        assert printed.removesuffix("\n").isprintable()
    assert destination.exists() == (status == 0 or existed)
    assert not [*source.parent.rglob(".*partial")]
    assert all(path.read_bytes() == content for path, content in before.items())
    if status == 0:
        Checkpoint(destination)
        shutil.rmtree(destination)
    else:
        assert str(source) in printed
    return printed if status else None


def damaged(content, upto, seed):
    """Bytes with a few bits flipped, a few bytes replaced or swapped before `upto`, or cut anywhere."""
    chosen = random.Random(seed)
    changed = bytearray(content)
    kind = chosen.choice(["flip", "replace", "swap", "cut"])
    for _ in range(chosen.choice([1, 1, 3])):
        place, other = chosen.randrange(upto), chosen.randrange(upto)
        if kind == "flip":
            changed[place] ^= 1 << chosen.randrange(8)
        elif kind == "replace":
            changed[place] = chosen.choice(b'0123456789-eE.[]{}",:n \x00\xff')
        elif kind == "swap":
            changed[place], changed[other] = changed[other], changed[place]
    return bytes(changed[: chosen.randrange(len(changed))] if kind == "cut" else changed)


def header_end(content):
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("name", ["shards", "mixtral", "nekomind", "mistral-dense", "mistral-mixtral"])
def test_random_damage_is_refused_or_harmless(directory, name):
    model = directory(name)
    config = read_config(model)
    refused = total = 0
    for path in sorted(path for path in model.iterdir() if path.stem != "conversion" and path.suffix != ".py"):
        content = path.read_bytes()
        upto = header_end(content) if path.suffix == ".safetensors" else len(content)
        for seed in range(40):
            path.write_bytes(damaged(content, upto, seed))
            message = refusal(model)
            if message is None and path.suffix == ".safetensors":
                assert read_config(model).replace(dtype=config.dtype) == config
            refused, total = refused + (message is not None), total + 1
        path.write_bytes(content)
    assert 0.7 * total < refused < total  # harmless: a space, the rope_theta, an ignored key
    assert refusal(model) is None


@pytest.mark.parametrize("name", ["dense", "mistral-dense"])
def test_random_damage_to_a_carve(directory, name, capsys):
    model = directory(name)
    weights = model / (SINGLE if name == "dense" else CONSOLIDATED)
    settings = model / (CONFIG if name == "dense" else PARAMS)
    errors = []
    for path, first in ((weights, 0), (settings, 0), (weights, header_end(weights.read_bytes()))):
        content = path.read_bytes()
        for seed in range(6):
            path.write_bytes(content[:first] + damaged(content[first:], len(content) - first, seed))
            errors.append(carving(model, capsys))
        path.write_bytes(content)
    assert len(list(filter(None, errors))) >= 6


KINDS = {
    "embedding": "model.embed_tokens.weight",
    "attention norm": NORM,
    "q": Q,
    "k": "model.layers.1.self_attn.k_proj.weight",
    "v": "model.layers.1.self_attn.v_proj.weight",
    "o": "model.layers.2.self_attn.o_proj.weight",
    "FFN norm": "model.layers.2.post_attention_layernorm.weight",
    "gate": "model.layers.2.mlp.gate_proj.weight",
    "up": "model.layers.0.mlp.up_proj.weight",
    "down": "model.layers.1.mlp.down_proj.weight",
    "last norm": "model.norm.weight",
    "head": "lm_head.weight",
}


@pytest.mark.parametrize("key", KINDS.values(), ids=KINDS.keys())
def test_weights_that_are_no_numbers_are_named(directory, key, capsys):
    model = directory("dense")
    tensors = load_file(model / SINGLE)
    for bad in (np.nan, np.inf, -np.inf):
        tensors[key].reshape(-1)[17] = bad
        save_file(tensors, model / SINGLE)
        error = carving(model, capsys)
        assert error is not None and f"{model}: {key}: " in error and "finite" in error


@pytest.mark.parametrize("key", ["gate", "up", "down"])
def test_weights_at_the_end_of_the_range_are_carved_or_named(directory, key, capsys):
    model = directory("dense")
    tensors = load_file(model / SINGLE)
    largest = ml_dtypes.finfo(ml_dtypes.bfloat16).max
    tensors[KINDS[key]][...] = np.where(np.arange(tensors[KINDS[key]].shape[1]) % 2, largest, -largest)
    save_file(tensors, model / SINGLE)
    error = carving(model, capsys)
    assert (error is None) == (key == "up")  # the others overflow: norms of gate rows, and `down` times its scale


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_json(path, change):
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def edit_header(path, change):
    content = path.read_bytes()
    end = header_end(content)
    header = json.loads(content[8:end])
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def in_index(**changes):
    return lambda model: edit_json(model / INDEX, lambda index: index.update(changes))


def mapped(key, file):
    return lambda model: edit_json(model / INDEX, lambda index: index["weight_map"].update({key: file}))


def beside(model):
    """A shard outside of the directory, and the index that leads there."""
    shutil.copy(model / SHARD, model.parent / "x.safetensors")
    mapped(Q, "../x.safetensors")(model)


def twice(model):
    rewrite(model / "model-00001-of-00005.safetensors", lambda tensors: tensors.update({NORM: np.ones(24, np.float32)}))


def with_tensor(key, make):
    return lambda model: rewrite(model / SHARD, lambda tensors: tensors.update({key: make(tensors[key])}))


def with_entry(**fields):
    return lambda model: edit_header(model / SHARD, lambda header: header[Q].update(fields))


def shifted(by):
    """The entry of q begins and ends elsewhere."""

    def change(header):
        header[Q]["data_offsets"] = [offset + by for offset in header[Q]["data_offsets"]]

    return lambda model: edit_header(model / SHARD, change)


def with_header(text):
    return lambda model: edit_header(model / SHARD, lambda header: text)


def named(name):
    return lambda model: edit_header(model / SHARD, lambda header: header.update({name: header.pop(Q)}))


def longer_header(model):
    content = (model / SHARD).read_bytes()
    (model / SHARD).write_bytes((2**63).to_bytes(8, "little") + content[8:])


def pickles_only(model):
    for path in (*model.glob("*.safetensors"), model / INDEX):
        path.unlink()
    (model / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x02")


HEADER = rf"{SHARD}: the safetensors header is damaged \("
NO_INDEX = rf"{INDEX}: not an index of safetensors shards"
DAMAGES = {
    "a shard that is not there": (mapped(Q, "gone.safetensors"), r"missing shard gone\.safetensors \(listed in"),
    "the index names another shard": (
        mapped(Q, "model-00003-of-00005.safetensors"),
        rf"{Q} is in {SHARD}; {INDEX} has it in model-00003-of-00005",
    ),
    "a shard outside": (beside, NO_INDEX + r" \(expected names of files beside it, got '\.\./x\.safetensors'"),
    "an absolute path": (mapped(Q, "/etc/hostname"), NO_INDEX + r".*'/etc/hostname'"),
    "a shard with a line break": (mapped(Q, "a\nb"), NO_INDEX + r".*'a\\nb'"),
    "a key with a line break": (mapped("a\nb", SHARD), NO_INDEX + r".*'a\\nb'"),
    "a number for a shard": (mapped(Q, 7), NO_INDEX + ".* got 7"),
    "a list for a shard": (mapped(Q, [SHARD]), NO_INDEX + ".* got \\["),
    "no map": (in_index(weight_map=None), NO_INDEX + r" \(no weight_map"),
    "an empty map": (in_index(weight_map={}), NO_INDEX + r" \(no weight_map"),
    "a list for a map": (in_index(weight_map=[SHARD]), NO_INDEX + r" \(no weight_map"),
    "a list for an index": (lambda model: edit_json(model / INDEX, lambda index: [index]), NO_INDEX),
    "an endless index": (lambda model: (model / INDEX).write_text("[" * 100_000), NO_INDEX),
    "no text in the index": (lambda model: (model / INDEX).write_bytes(b"\xff\xfe\x00"), NO_INDEX),
    "a tensor in two shards": (twice, rf"{NORM} is in both model-00001-of-00005.safetensors and {SHARD}"),
    "transposed": (with_tensor(Q, lambda q: q.T.copy()), r"q: expected \S+ of shape \(60, 24\), got \(24, 60\)"),
    "one row less": (with_tensor(NORM, lambda norm: norm[1:]), r"expected \S+ of shape \(24,\), got \(23,\)"),
    "one axis more": (with_tensor(NORM, lambda norm: norm[None]), r"expected \S+ of shape \(24,\), got \(1, 24\)"),
    "no elements": (with_tensor(NORM, lambda norm: norm[:0]), r"expected \S+ of shape \(24,\), got \(0,\)"),
    "a scalar": (with_tensor(NORM, lambda norm: np.array(norm[0])), r"expected \S+ of shape \(24,\), got \(\)"),
    "I32": (with_tensor(Q, lambda q: q.astype(np.int32)), rf"tensor {Q} has dtype I32; expected one of BF16, F16, F32"),
    "F64": (with_tensor(Q, lambda q: q.astype(np.float64)), rf"tensor {Q} has dtype F64; expected one of"),
    "F8_E4M3": (
        with_tensor(Q, lambda q: q.astype(ml_dtypes.float8_e4m3fn)),
        rf"{Q} is F8_E4M3, and config.json announces no quantization \({SHARD}\)",
    ),
    "overlapping": (shifted(-2), HEADER + r"tensor \S+ begins at byte [\d,]+ of the data, the one before it ends at"),
    "a gap": (shifted(2), HEADER + r"tensor \S+ begins at byte"),
    "beyond the end": (shifted(10**9), HEADER + r"tensor \S+ begins at byte"),
    "negative offsets": (shifted(-(10**9)), HEADER + f"tensor '{Q}': shape"),
    "backwards": (with_entry(dtype="I32", data_offsets=[8, 0]), HEADER + f"tensor '{Q}': shape"),
    "three offsets": (with_entry(data_offsets=[0, 1, 2]), HEADER + f"tensor '{Q}': too many values"),
    "offsets that are texts": (with_entry(data_offsets=["0", "1"]), HEADER + f"tensor '{Q}': shape"),
    "offsets that are no whole numbers": (with_entry(data_offsets=[0.0, 2880.0]), HEADER + f"tensor '{Q}': shape"),
    "a negative shape": (with_entry(shape=[-60, -24]), HEADER + f"tensor '{Q}': shape"),
    "a huge shape": (with_entry(shape=[10**30, 10**30]), HEADER + f"tensor '{Q}': shape"),
    "a shape that is a number": (with_entry(shape=1440), HEADER + f"tensor '{Q}': "),
    "a dtype that is a list": (with_entry(dtype=["BF16"]), HEADER + f"tensor '{Q}': not a name"),
    "a dtype with a line break": (with_entry(dtype="BF\n16"), HEADER + f"tensor '{Q}': not a name"),
    "a name with a line break": (named("a\nb"), HEADER + r"tensor 'a\\nb': not a name"),
    "an entry that is a list": (
        lambda model: edit_header(model / SHARD, lambda header: header.update({Q: []})),
        HEADER + f"tensor '{Q}': ",
    ),
    "a name twice in a header": (with_header(b'{"a":{},"a":{}}'), HEADER + "a name comes twice"),
    "a header that is a list": (with_header(b"[]"), HEADER + "not a JSON object"),
    "an endless header": (with_header(b"[" * 100_000), HEADER),
    "no header": (with_header(b""), HEADER),
    "an empty header": (with_header(b"{}"), "missing model.layers.0"),
    "a header longer than its file": (longer_header, rf"{SHARD}: truncated or no safetensors file"),
    "an empty file": (lambda model: (model / SHARD).write_bytes(b""), rf"{SHARD}: truncated or no safetensors file"),
    "pickles only": (pickles_only, r"only pickle files \(pytorch_model-00001"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_weights_are_refused(directory, damage, message):
    model = directory("shards")
    damage(model)
    refuses(model, message)


@pytest.mark.parametrize("name", ["dense", "mixtral", "nekomind", "mistral-dense", "mistral-mixtral"])
@pytest.mark.parametrize(
    "value",
    [-1, 0, 1.5, "24", 10**12, 10**400, float("nan"), float("inf"), -1e9, [3], {"a": 1}, True, "a\nb", ""],
    ids=lambda value: repr(value)[:14],
)
def test_absurd_values_in_a_config_are_refused_or_harmless(directory, name, value):
    model = directory(name)
    path = model / (PARAMS if name.startswith("mistral") else CONFIG)
    content = json.loads(path.read_text())
    moe = content.get("moe", {})
    refused = set()
    for place, keys in ((content, list(content)), (moe, list(moe))):
        for key in keys:
            before, place[key] = place[key], value
            path.write_text(json.dumps(content))
            if refusal(model):
                refused.add(key)
            place[key] = before
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"}
    sizes = {"dim", "n_layers", "n_heads", "vocab_size", "max_position_embeddings"} if path.name == PARAMS else sizes
    assert refused >= sizes | set(moe)


@pytest.mark.parametrize("content", ["", "[]", "null", "7", '"x"', "{}", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"])
@pytest.mark.parametrize("name", ["dense", "mistral-dense"])
def test_a_config_that_is_something_else_is_refused(directory, name, content):
    model = directory(name)
    path = model / (PARAMS if name.startswith("mistral") else CONFIG)
    path.write_text(content)
    assert refusal(model).startswith(str(path))


def test_a_model_of_many_more_layers_is_not_listed(directory):
    model = directory("dense")
    edit_json(model / CONFIG, lambda config: config.update(num_hidden_layers=2_000_000_000))
    refuses(model, r"config\.json: a model of 2000000000 layers has \d+ tensors, the weight files hold 30")


@pytest.mark.parametrize(("said", "message"), [(8, "unexpected .*experts.8.w1"), (32, "missing .*experts.16.w1")])
@pytest.mark.parametrize("name", ["mixtral", "mistral-mixtral"])
def test_another_number_of_experts_than_the_config_says(directory, name, said, message):
    model = directory(name)
    if name == "mixtral":
        edit_json(model / CONFIG, lambda config: config.update(num_local_experts=said))
    else:
        edit_json(model / PARAMS, lambda params: params["moe"].update(num_experts=said))
    assert len(refusal(model)) < 3000
    refuses(model, message)


def test_source_and_destination_in_one_place(directory, capsys):
    model = directory("dense")
    assert "exists already" in carving(model, capsys, model)
    assert "exists already" in carving(model, capsys, model / CONFIG)
    assert carving(model, capsys, model / "inside") is None
    assert carving(model, capsys, model / SINGLE / "below a file").startswith("error: ")


def test_pickles_of_mistral(directory):
    model = directory("mistral-dense")
    (model / CONSOLIDATED).rename(model / "consolidated.00.pth")
    refuses(model, r"only pickle files \(consolidated\.00\.pth\)")


def test_a_value_too_large_for_the_dtype_is_named(directory, capsys):
    model = directory("dense")
    edit_json(model / CONFIG, lambda config: config.update(dtype="float16", torch_dtype="float16"))
    rewrite(model / SINGLE, lambda tensors: tensors["lm_head.weight"].fill(ml_dtypes.bfloat16(1e6)))
    assert "lm_head.weight: NaN or infinite" in carving(model, capsys)
