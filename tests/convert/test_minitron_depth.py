"""Pruning of layers and heads, and the search to a size, against transformers with modules taken out or zeroed."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file

from convert import cli
from convert.layerwise import calibration_batches
from convert.minitron.importance import Scorer
from convert.minitron.minitron import minitron
from convert.minitron.search import candidate_shapes
from convert.streaming import MANIFEST
from convert.verify.logits import our_logits
from nemoe_jax.checkpoints.reader import Checkpoint, read_config
from nemoe_jax.spec.config import preset
from nemoe_jax.spec.schema import count
from tests.convert.test_minitron import options_for, random_params, save, score
from tests.support.configs import DENSE, NEKOMIND

MHA = DENSE.replace(kv_heads=6)
MODELS = {"dense": DENSE, "nekomind": NEKOMIND, "mha": MHA}
IDS = np.random.default_rng(1).integers(0, DENSE.vocab, (2, 9))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The models, and text."""
    root = tmp_path_factory.mktemp("minitron")
    for name, config in MODELS.items():
        save(root / name, config, random_params(config))
    letters = np.random.default_rng(0).integers(2, DENSE.vocab, 1700)
    (root / "text.txt").write_text("".join(chr(ord("0") + number) for number in letters))
    return root


def opened(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def without(model, layers):
    """The model with some of its layers."""
    kept = [model.model.layers[number] for number in layers]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model


def logits_of(model, ids_BT):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids_BT, np.int64)), use_cache=False).logits.double().numpy()


def loss_of(model, tokens_BS):
    logits = logits_of(model, tokens_BS[:, :-1])
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(logits, tokens_BS[:, 1:, None], -1).mean()


def cosines(model, ids_BT):
    """1 - cos of each layer's input and output, a mean over tokens."""
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, read, given: seen.append((read[0].double(), given.double())))
    logits_of(model, ids_BT)
    return [float((1 - torch.nn.functional.cosine_similarity(*pair, dim=-1)).mean()) for pair in seen]


def test_scores_of_layers_and_heads_are_transformers(place):
    name = "dense"
    source = Checkpoint(place / name)
    batches = calibration_batches(source, [str(place / "text.txt")], 700)
    (tokens_BS,) = batches
    turned = Scorer(source, batches, heads=True).all_layers()
    np.testing.assert_allclose(turned.layers_L, cosines(opened(place / name), tokens_BS[:, :-1]), rtol=1e-4)
    by_loss = Scorer(source, batches, by_loss=True).all_layers().layers_L
    for layer, loss in enumerate(by_loss):
        others = [other for other in range(MODELS[name].layers) if other != layer]
        assert loss == pytest.approx(loss_of(without(opened(place / name), others), tokens_BS), rel=1e-5)
    model, seen = opened(place / name), []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda _, read, given: seen.append(read[0].double().numpy()))
    logits_of(model, tokens_BS[:, :-1])
    for heads, neurons in zip(seen, turned.neurons, strict=True):
        norms_BTN = np.linalg.norm(heads.reshape(*heads.shape[:2], DENSE.heads, DENSE.head_dim), axis=-1)
        np.testing.assert_allclose(neurons["heads"], score(norms_BTN), rtol=1e-4)


@pytest.mark.parametrize("importance", ["influence", "loss"])
def test_a_shallower_model_is_the_source_without_its_least_layers(place, tmp_path, importance):
    options = options_for(place, layers=2, depth_importance=importance)
    manifest = minitron(place / "dense", tmp_path / "out", options)
    kept, scores = manifest.figures["kept_layers"], manifest.figures["layer_scores"]
    assert kept == sorted(sorted(range(3), key=lambda layer: -scores[layer])[:2])
    assert read_config(tmp_path / "out") == DENSE.replace(layers=2)
    expected = logits_of(without(opened(place / "dense"), kept), IDS)
    np.testing.assert_allclose(our_logits(tmp_path / "out", IDS), expected, atol=1e-5)


@pytest.mark.parametrize("name, heads", [("dense", 4), ("mha", 2)])
def test_without_heads_it_is_the_source_with_their_outputs_zeroed(place, tmp_path, name, heads):
    manifest = minitron(place / name, tmp_path / "out", options_for(place, heads=heads))
    config = MODELS[name]
    kv_heads = heads if name == "mha" else config.kv_heads
    assert read_config(tmp_path / "out") == config.replace(heads=heads, kv_heads=kv_heads)
    model, source = opened(place / name), Checkpoint(place / name)
    neurons = (
        Scorer(source, calibration_batches(source, [str(place / "text.txt")], 700), heads=True).all_layers().neurons
    )
    groups = 1 if name == "mha" else config.kv_heads
    for layer, scores in enumerate(neurons):
        of_group = np.split(np.arange(6), groups)
        dropped = [
            head for own in of_group for head in sorted(own, key=lambda n: scores["heads"][n])[: (6 - heads) // groups]
        ]
        places = (np.array(dropped)[:, None] * 10 + np.arange(10)).ravel()
        model.model.layers[layer].self_attn.o_proj.weight.data[:, places] = 0
    np.testing.assert_allclose(our_logits(tmp_path / "out", IDS), logits_of(model, IDS), atol=1e-5)
    assert all(0 < layer["heads_kept"] < 1 for layer in manifest.layers)


def test_depth_and_width_together_in_a_model_with_dense_layers(place, tmp_path):
    options = options_for(place, layers=3, hidden=20, ffn=8, heads=4)
    kept = minitron(place / "nekomind", tmp_path / "out", options).figures["kept_layers"]
    config = read_config(tmp_path / "out")
    dense = sum(layer < 2 for layer in kept)
    shape = NEKOMIND.replace(layers=3, dense_layers=dense, hidden=20, expert_ffn=8, heads=4, norm_eps=config.norm_eps)
    assert config == shape
    source, result = (load_file(place_ / "model.safetensors") for place_ in (place / "nekomind", tmp_path / "out"))
    for number, layer in enumerate(kept):
        names = {key.split(".", 3)[3] for key in source if key.startswith(f"model.layers.{layer}.")}
        assert names == {key.split(".", 3)[3] for key in result if key.startswith(f"model.layers.{number}.")}
        q_norm = "self_attn.q_norm.weight"
        np.testing.assert_array_equal(
            result[f"model.layers.{number}.{q_norm}"], source[f"model.layers.{layer}.{q_norm}"]
        )
    assert np.isfinite(our_logits(tmp_path / "out", IDS)).all()


def test_a_search_takes_the_shape_of_the_lowest_held_out_loss(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("convert.minitron.search.ROUND", 1)
    argv = ["minitron", str(place / "dense"), str(tmp_path / "out"), "--calibration", str(place / "text.txt")]
    assert cli.main([*argv, "--calibration-tokens", "1500", "--target", "0.7", "--json"]) == 0
    printed = capsys.readouterr()
    table = json.loads((tmp_path / "out" / MANIFEST).read_text())["candidates"]
    assert len(table) > 2 and len(printed.err.splitlines()) == len(table) + 1
    assert {row["layers"] for row in table} == {2, 3} and len({row["ffn"] for row in table}) > 2
    assert all(0.63 <= row["parameters"] / count(DENSE)[0] <= 0.7 for row in table)
    best = min(table, key=lambda row: row["held_out_loss"])
    config = read_config(tmp_path / "out")
    assert (config.layers, config.hidden, config.ffn) == (best["layers"], best["hidden"], best["ffn"])
    assert json.loads(printed.out)["parameters"] == best["parameters"]
    held_out = calibration_batches(Checkpoint(place / "dense"), [str(place / "text.txt")], 1500)[-1]
    assert loss_of(opened(tmp_path / "out"), held_out) == pytest.approx(best["held_out_loss"], abs=1e-4)


def test_candidates_of_the_12b_are_near_the_target():
    whole = preset("mistral-nemo-12b")
    shapes = candidate_shapes(whole, 8.4e9, "nemo")
    assert {shape.layers for shape in shapes} == {40, 36, 32, 28}
    for shape in shapes:
        assert 0.9 * 8.4e9 <= count(shape)[0] <= 8.4e9 and shape.hidden % 64 == shape.ffn % 64 == 0
    both = next(shape for shape in shapes if shape.layers == 40 and shape.hidden < 5120 and shape.ffn < 14336)
    assert (both.hidden, both.ffn) == (3968, 11136) or both.hidden / 5120 == pytest.approx(both.ffn / 14336, abs=0.02)


ERRORS = {
    "more layers": ("dense", ["--layers", "4"], "--layers: expected 1 to the source's 3, got 4"),
    "no layers": ("dense", ["--layers", "0"], "--layers: expected 1 to the source's 3, got 0"),
    "uneven heads": ("dense", ["--heads", "3"], "--heads: expected a multiple of 2 key/value heads, got 3"),
    "target and sizes": ("dense", ["--target", "0.7", "--ffn", "9"], "--target: expected without --hidden, --ffn"),
    "too large": ("dense", ["--target", "1e9"], "--target: expected fewer than the source's"),
    "too small": ("dense", ["--target", "0.01"], "keeps a quarter of each width"),
    "negative": ("dense", ["--target", "-1"], "--target: expected fewer than the source's"),
    "one batch": ("dense", ["--target", "0.7"], "for two batches, one held out"),
}


@pytest.mark.parametrize(("name", "flags", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_options_are_one_line_and_exit_status_2(place, tmp_path, capsys, name, flags, message):
    argv = ["minitron", str(place / name), str(tmp_path / "out"), "--calibration", str(place / "text.txt")]
    assert cli.main([*argv, "--calibration-tokens", "700", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
