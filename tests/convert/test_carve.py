import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import cli, streaming
from convert.carve import calibration as carve_calibration
from convert.carve import explore, self_text, token_clusters
from convert.carve.calibration import CalibrationStreams, activity
from convert.carve.carve import CarveOptions, carve
from convert.carve.layer import data_free_scale
from convert.carve.shape import with_refit_steps
from convert.layerwise import LayerwiseModel, calibration_batches, hash_of, logits
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.checkpoints.layout import INDEX, SINGLE
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.errors import UserError
from nemoe_jax.inference.generate import generate
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.text.corpus import spaced_batches, tokenize_corpus
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.compiled import forward, random_tokens
from tests.support.configs import write_tokenizer

EXPERTS, TOP_K = 4, 2
OPTIONS = CarveOptions(experts=EXPERTS, top_k=TOP_K, svd="exact")


def tensors_of(directory):
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def ffn_of(tensors, layer, name):
    keys = [f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight" for expert in range(EXPERTS)]
    return [tensors[key] for key in keys]


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_experts_are_the_dense_neurons_bit_for_bit(dense_directory, tmp_path, svd):
    carve(dense_directory, tmp_path / "moe", CarveOptions(experts=EXPERTS, top_k=TOP_K, svd=svd))
    dense, moe = tensors_of(dense_directory), tensors_of(tmp_path / "moe")
    scale = data_free_scale(OPTIONS)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp."
        gate = np.concatenate(ffn_of(moe, layer, "w1"))
        rows = {row.tobytes(): number for number, row in enumerate(dense[prefix + "gate_proj.weight"])}
        order = np.array([rows[row.tobytes()] for row in gate])  # which dense neuron each row is
        assert sorted(order) == list(range(48))
        up, down = np.concatenate(ffn_of(moe, layer, "w3")), np.concatenate(ffn_of(moe, layer, "w2"), axis=1)
        np.testing.assert_array_equal(up, dense[prefix + "up_proj.weight"][order])
        unscaled = (down.astype(np.float32) / scale).astype(down.dtype)
        np.testing.assert_array_equal(unscaled, dense[prefix + "down_proj.weight"][:, order])
        assert {len(expert) for expert in ffn_of(moe, layer, "w1")} == {48 // EXPERTS}
    for key in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.weight"):
        np.testing.assert_array_equal(moe[key], dense[key])


def test_the_router_is_orthogonal(dense_directory, tmp_path):
    manifest = carve(dense_directory, tmp_path / "moe", OPTIONS)
    moe = tensors_of(tmp_path / "moe")
    for layer, figures in enumerate(manifest.layers):
        router = moe[f"model.layers.{layer}.block_sparse_moe.gate.weight"].astype(np.float32)
        square = figures["router_temperature"] ** 2
        np.testing.assert_allclose(router @ router.T, square * np.eye(EXPERTS), atol=square * 2**-6)  # bf16 on disk
        assert figures["router_orthogonality_error"] < 1e-5


def test_all_experts_with_a_zero_router_are_the_dense_model(dense_directory, tmp_path):
    carve(dense_directory, tmp_path / "moe", CarveOptions(experts=EXPERTS, top_k=EXPERTS, output_scale=EXPERTS))
    config, params = pretrained.load_pretrained(tmp_path / "moe", dtype=jnp.float32)
    ffn = params["blocks"]["moe"]["ffn"]
    ffn["router"] = jnp.zeros_like(ffn["router"])
    dense_config, dense = pretrained.load_pretrained(dense_directory, dtype=jnp.float32)
    tokens = random_tokens(jax.random.key(0), (2, 9), 72)
    expected = forward(dense_config, dense, tokens).logits
    np.testing.assert_allclose(
        forward(config, params, tokens).logits, expected, atol=2e-6 * float(jnp.abs(expected).max())
    )


def test_transformers_opens_the_result(dense_directory, tmp_path):
    pytest.importorskip("torch")
    carve(dense_directory, tmp_path / "moe", OPTIONS)
    assert cli.main(["verify", str(tmp_path / "moe")]) == 0


@pytest.mark.parametrize(("top_k", "experts", "scale"), [(4, 16, 8), (2, 16, 4), (16, 16, 16), (4, 32, 8), (4, 64, 16)])
def test_the_data_free_scale_lies_between_k_and_e(top_k, experts, scale):
    assert data_free_scale(CarveOptions(experts=experts, top_k=top_k)) == scale
    assert top_k <= scale <= experts


def interrupted(*, after_layers, monkeypatch):
    """Carving stops with Ctrl-C in that layer."""
    from convert.carve import layer as module

    original, seen = module._dense_ffn, []

    def choose(*arguments):
        if len(seen) == after_layers:
            raise KeyboardInterrupt
        seen.append(1)
        return original(*arguments)

    monkeypatch.setattr(module, "_dense_ffn", choose)
    return seen


def test_an_interrupted_carve_goes_on_and_gives_the_same(dense_directory, tmp_path, monkeypatch):
    expected = carve(dense_directory, tmp_path / "whole", OPTIONS, streaming.ConversionSettings(shard_bytes=1))
    with monkeypatch.context() as patched:
        interrupted(after_layers=2, monkeypatch=patched)
        with pytest.raises(KeyboardInterrupt):
            carve(dense_directory, tmp_path / "moe", OPTIONS, streaming.ConversionSettings(shard_bytes=1))
    assert not (tmp_path / "moe").exists()
    with monkeypatch.context() as patched:
        seen = interrupted(after_layers=99, monkeypatch=patched)
        got = carve(dense_directory, tmp_path / "moe", OPTIONS, streaming.ConversionSettings(shard_bytes=1))
    assert len(seen) == 1  # two of three layers were there
    assert got == expected
    whole, resumed = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "moe")
    assert whole.keys() == resumed.keys()
    for key in whole:
        np.testing.assert_array_equal(resumed[key], whole[key])
    names = {path.name for path in (tmp_path / "moe").iterdir()} - {
        path.name for path in (tmp_path / "moe").glob("model-*")
    }
    assert names == {"config.json", INDEX, streaming.MANIFEST, streaming.REPORT}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experts", "5"], "48 FFN neurons do not divide into --experts 5"),
        (["--experts", "4", "--top-k", "5"], "--top-k: expected 1 to --experts 4, got 5"),
        (["--experts", "4", "--output-scale", "-1"], "--output-scale: expected a positive number"),
        (["--experts", "4", "--shard-gb", "0"], "--shard-gb: expected a positive number"),
        (["--experts", "4", "--rank", "0"], "svd rank: expected 1 to 24"),
        (["--experts", "4", "--keep-dense", "1"], "Mixtral's layout cannot express them"),
        (["--experts", "4", "--layout", "shared", "--keep-dense", "3"], "--keep-dense: expected 0 to 2, got 3"),
        (["--experts", "5", "--layout", "shared"], "39 of the 48 FFN neurons do not divide into --experts 5"),
        (["--experts", "4", "--router", "distilled"], "--router distilled: expected --calibration text"),
        (
            ["--experts", "8", "--top-k", "3", "--partition", "token-clusters"],
            "expected --experts to be a multiple of --top-k 3, or less than twice it and more than it, got 8",
        ),
        (["--experts", "4", "--explore"], "--explore: expected --calibration text"),
        (
            ["--experts", "4", "--partition", "token-clusters"],
            "--partition token-clusters: expected --calibration text",
        ),
        (["--experts", "4", "--shared-gate", "fitted"], "--shared-gate fitted: expected --layout shared, and --part"),
        (["--experts", "4", "--control"], "--control: expected --calibration text"),
        (["--experts", "8", "--overlap", "2"], "--overlap: expected --calibration text"),
        (["--experts", "4", "--refit-steps", "9"], "--refit-steps: expected 0, or more with"),
        (["--experts", "4", "--refit-steps", "-2"], "--refit-steps: expected 0, or more with"),
        (["--experts", "4", "--calibration", "nowhere.txt"], "no tokenizer (expected tekken.json, tokenizer.json or"),
    ],
)
def test_bad_options_are_one_line_and_exit_status_2(dense_directory, tmp_path, capsys, flags, message):
    flags = ["--top-k", "2", *flags]
    assert cli.main(["carve", str(dense_directory), str(tmp_path / "moe"), *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("9", "--calibration-tokens: expected more than 768, for two batches, one held out"),
        ("131072", "expected more than 131,328 tokens (--calibration-tokens 131072, in batches of 768), got 2,002"),
        ("0", "--calibration-tokens: expected a positive number, got 0"),
    ],
)
def test_text_that_is_too_short_for_the_fits(dense_directory, tmp_path, capsys, tokens, message):
    write_tokenizer(dense_directory)
    (tmp_path / "text.txt").write_text("word7 " * 2000)
    flags = ["--experts", "4", "--top-k", "2", "--calibration-tokens", tokens, "--calibration"]
    assert cli.main(["carve", str(dense_directory), str(tmp_path / "moe"), *flags, str(tmp_path / "text.txt")]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "text.txt"]


def test_a_mixture_is_not_carved_again_and_nothing_is_overwritten(dense_directory, tmp_path, capsys):
    carve(dense_directory, tmp_path / "moe", OPTIONS)
    with pytest.raises(UserError, match="has 4 experts already"):
        carve(tmp_path / "moe", tmp_path / "again", OPTIONS)
    before = (tmp_path / "moe" / "config.json").read_bytes()
    assert cli.main(["carve", str(dense_directory), str(tmp_path / "moe"), "--experts", "4", "--top-k", "2"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "moe" / "config.json").read_bytes() == before


def test_weights_that_are_not_numbers_are_refused(dense_directory, tmp_path):
    tensors = load_file(dense_directory / SINGLE)
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 5] = jnp.nan
    save_file(tensors, dense_directory / SINGLE)
    with pytest.raises(UserError, match=r"dense: model\.layers\.1\.mlp\.gate_proj\.weight: not finite"):
        carve(dense_directory, tmp_path / "moe", OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_report_of_the_command(dense_directory, tmp_path, capsys):
    flags = ["--experts", "4", "--top-k", "2", "--shard-gb", "1e-9", "--json"]
    assert cli.main(["carve", str(dense_directory), str(tmp_path / "moe"), *flags]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["experts"], figures["top_k"], figures["expert_ffn"], figures["layers"]) == (4, 2, 12, 3)
    assert len(list((tmp_path / "moe").glob("*.safetensors"))) == 3 + 2  # a file for each layer, and for the ends


SHARED = CarveOptions(experts=4, top_k=2, svd="exact", layout="shared", keep_dense=1, shared_ffn=8, output_scale=4)


def test_a_shared_expert_and_dense_layers_sum_to_the_dense_model(dense_directory, tmp_path):
    """With all experts chosen by a zero router, whatever went to the shared expert."""
    options = dataclasses.replace(SHARED, top_k=4)
    carve(dense_directory, tmp_path / "moe", options)
    config, params = pretrained.load_pretrained(tmp_path / "moe", dtype=jnp.float32)
    assert (config.family, config.dense_layers, config.shared_ffn, config.expert_ffn) == ("nekomind", 1, 8, 10)
    params["blocks"]["moe"]["ffn"]["router"] *= 0
    dense_config, dense = pretrained.load_pretrained(dense_directory, dtype=jnp.float32)
    tokens = random_tokens(jax.random.key(0), (2, 9), 72)
    expected = forward(dense_config, dense, tokens).logits
    np.testing.assert_allclose(
        forward(config, params, tokens).logits, expected, atol=2e-6 * float(jnp.abs(expected).max())
    )


def test_the_shared_expert_has_the_neurons_with_the_largest_weights(dense_directory, tmp_path):
    carve(dense_directory, tmp_path / "moe", SHARED)
    dense, moe = tensors_of(dense_directory), tensors_of(tmp_path / "moe")
    up, down = (dense[f"model.layers.1.mlp.{name}_proj.weight"].astype(np.float32) for name in ("up", "down"))
    largest = np.sort(np.argsort(-np.linalg.norm(up, axis=1) * np.linalg.norm(down, axis=0))[:8])
    shared = moe["model.layers.1.mlp.shared_expert.up_proj.weight"]
    np.testing.assert_array_equal(shared.astype(np.float32), up[largest])
    assert not moe["model.layers.1.mlp.shared_expert_gate.weight"].any()
    np.testing.assert_array_equal(moe["model.layers.0.mlp.up_proj.weight"], dense["model.layers.0.mlp.up_proj.weight"])


def test_torch_agrees_on_the_shared_layout(dense_directory, tmp_path):
    pytest.importorskip("torch")
    carve(dense_directory, tmp_path / "moe", SHARED)
    assert cli.main(["verify", str(tmp_path / "moe")]) == 0


@pytest.fixture
def calibration(dense_directory, tmp_path, monkeypatch):
    """Options for a carve with calibration text, which is written beside the model; routers learn for fewer steps."""
    monkeypatch.setattr(carve_calibration, "ROUTER_STEPS", 60)
    monkeypatch.setattr(token_clusters, "ROUTER_STEPS", (40, 20))
    write_tokenizer(dense_directory)
    words = np.random.default_rng(0).integers(0, 69, 2000)
    (tmp_path / "text.txt").write_text(" ".join(f"word{number}" for number in words))
    return {"calibration": (str(tmp_path / "text.txt"),), "calibration_tokens": 1500}


@pytest.mark.parametrize("layout", ["mixtral", "shared"])
def test_an_interrupted_calibrated_carve_gives_the_same_bytes(
    dense_directory, tmp_path, monkeypatch, layout, calibration
):
    more = {"shared_ffn": 8, "keep_dense": 1, "partition": "gate-kmeans"} if layout == "shared" else {}
    options = dataclasses.replace(OPTIONS, layout=layout, **more, **calibration)
    expected = carve(dense_directory, tmp_path / "whole", options)
    last = expected.layers[-1]
    assert 0 < last["reconstruction_error"] < 1 and last["load_max_over_mean"] < 1.9
    assert layout == "mixtral" or last["recall"] > 0.3
    assert expected.figures["held_out_loss_carved"] == pytest.approx(expected.figures["held_out_loss_dense"], abs=0.2)
    with monkeypatch.context() as patched:
        interrupted(after_layers=1, monkeypatch=patched)
        with pytest.raises(KeyboardInterrupt):
            carve(dense_directory, tmp_path / "moe", options)
    with monkeypatch.context() as patched:
        seen = interrupted(after_layers=99, monkeypatch=patched)
        carve(dense_directory, tmp_path / "moe", options)
    assert len(seen) == (1 if more else 2)  # the first carved layer was there
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "moe" / path.name).read_bytes() == path.read_bytes(), path.name


def test_calibration_texts_are_mixed_by_their_shares(dense_directory, tmp_path, calibration):
    """The windows of each are those that it gives alone, spread over the whole."""
    source, (whole,) = Checkpoint(dense_directory), calibration["calibration"]
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"word{number % 7}" for number in range(1500)))
    mixed = np.concatenate(calibration_batches(source, [f"{whole}:0.75,{other}:0.25"], 1500))
    assert mixed.shape == (16, 97)
    for path, count in ((whole, 12), (str(other), 4)):
        stream = tokenize_corpus([path], load_tokenizer(dense_directory))
        alone = np.concatenate([row for row, _ in spaced_batches(stream, 96, 1, count)])
        found = np.array([np.flatnonzero((mixed == row).all(1))[0] for row in alone])
        assert np.abs(found + 0.5 - (np.arange(count) + 0.5) * 16 / count).max() < 1
    np.testing.assert_array_equal(
        np.concatenate(calibration_batches(source, [f"{whole}:3", f"{other}:1"], 1500)), mixed
    )
    for texts, error in (
        ([f"{whole}:0.5", str(other)], "expected a share of the tokens behind each text, or none"),
        ([f"{whole}:0,{other}:1"], "expected positive shares"),
        ([f"{whole}:0.1,{other}:9"], "other.txt: expected more than"),
    ):
        with pytest.raises(UserError, match=error):
            calibration_batches(source, texts, 1500)


def test_the_control_keeps_the_most_active_neurons_and_refits_them(dense_directory, tmp_path, calibration, capsys):
    """The first layer against NumPy's least squares on the dense model's own activations, with its tokens' weights."""
    text, tokens = calibration["calibration"][0], str(calibration["calibration_tokens"])
    flags = ["--experts", "4", "--top-k", "2", "--calibration", text, "--calibration-tokens", tokens, "--control"]
    assert cli.main(["carve", str(dense_directory), str(tmp_path / "control"), *flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    config, _ = pretrained.load_pretrained(tmp_path / "control")
    assert (config.experts, config.ffn, printed["ffn"]) == (0, 24, 24)
    assert config.family == pretrained.load_pretrained(dense_directory)[0].family
    assert printed["held_out_loss_above_dense"] == pytest.approx(
        printed["held_out_loss_carved"] - printed["held_out_loss_dense"]
    )

    checkpoint = Checkpoint(dense_directory)
    batches = calibration_batches(checkpoint, calibration["calibration"], calibration["calibration_tokens"])
    layers = LayerwiseModel(checkpoint)
    weights = layers.weights(0)
    attended = [layers.attend(0, weights, layers.embed(batch[:, :-1])) for batch in batches]
    middle, x = (
        np.float64(np.concatenate(parts)).reshape(-1, parts[0].shape[-1]) for parts in zip(*attended, strict=True)
    )
    ffn = {name: np.float64(weights["ffn"][name]) for name in ("gate", "up", "down")}
    gate = x @ ffn["gate"]
    hidden = gate / (1 + np.exp(-gate)) * (x @ ffn["up"])
    output = hidden @ ffn["down"]
    relative = 1 / np.mean((middle + output) ** 2, axis=1)
    square = np.sum(output**2, axis=1)  # of what is wanted: the streams are still the same
    weight = relative / (relative @ square) * square.sum() + 1
    fitted = slice(0, x.shape[0] - batches[-1][:, :-1].size)
    x, hidden, output, weight = x[fitted], hidden[fitted], output[fitted], weight[fitted]
    activity = (hidden**2).mean(0) * (ffn["down"] ** 2).sum(1)
    kept = np.sort(np.argsort(-activity)[:24])
    control = tensors_of(tmp_path / "control")
    dense = tensors_of(dense_directory)
    np.testing.assert_array_equal(
        control["model.layers.0.mlp.up_proj.weight"], dense["model.layers.0.mlp.up_proj.weight"][kept]
    )
    weighted = hidden[:, kept] * weight[:, None]
    gram = weighted.T @ hidden[:, kept] / len(x)
    ridge = 2 * 24 / len(x) * np.trace(gram) / 24 * np.eye(24)
    expected = np.linalg.solve(gram + ridge, weighted.T @ output / len(x) + ridge @ ffn["down"][kept])
    got = np.float64(control["model.layers.0.mlp.down_proj.weight"].astype(np.float32)).T
    np.testing.assert_allclose(got, expected, atol=2**-7 * np.abs(expected).max())  # bfloat16 on disk


def test_overlapping_experts_hold_more_neurons_and_gradient_steps_bring_them_nearer(
    dense_directory, tmp_path, calibration
):
    options = dataclasses.replace(OPTIONS, experts=8, overlap=2, **calibration)
    errors = {}
    for steps in (0, 60):
        manifest = carve(dense_directory, tmp_path / f"moe{steps}", dataclasses.replace(options, refit_steps=steps))
        errors[steps] = [layer["error_to_dense_stream"] for layer in manifest.layers]
    config, _ = pretrained.load_pretrained(tmp_path / "moe0")
    assert (config.experts, config.top_k, config.expert_ffn) == (8, 2, 12)
    assert errors[60][0] < errors[0][0]  # the first layer, whose inputs are the same
    dense, plain, refitted = (tensors_of(tmp_path / name) for name in ("dense", "moe0", "moe60"))
    up = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    rows = {row.tobytes() for row in dense["model.layers.1.mlp.up_proj.weight"]}
    assert {row.tobytes() for row in plain[up]} < rows and (refitted[up] != plain[up]).any()


def test_a_shared_expert_is_what_all_groups_have_in_common_times_a_fitted_gate(dense_directory, tmp_path, calibration):
    """The model that was written has the error that the fit says."""
    options = dataclasses.replace(
        OPTIONS, experts=8, layout="shared", shared_ffn=8, shared_gate="fitted", **calibration
    )
    manifest = carve(dense_directory, tmp_path / "moe", options)
    moe, dense = tensors_of(tmp_path / "moe"), tensors_of(dense_directory)
    streams = CalibrationStreams(Checkpoint(dense_directory), *calibration.values())
    fitted, held_out = streams.enter(0)
    shared, up = moe["model.layers.0.mlp.shared_expert.up_proj.weight"], dense["model.layers.0.mlp.up_proj.weight"]
    most_active = np.sort(np.argsort(-np.asarray(activity(fitted)))[:8])
    assert np.mean((shared[:, None] == up[most_active]).all(-1).any(1)) > 0.8  # whose activity tokens' weights count
    assert moe["model.layers.0.mlp.shared_expert_gate.weight"].any()
    router = moe["model.layers.0.mlp.gate.weight"].reshape(4, 2, -1)
    np.testing.assert_array_equal(router[:, 0], router[:, 1])
    error = wanted = 0.0
    config = pretrained.load_pretrained(tmp_path / "moe")[0]
    after = streams.held_out_through(0, config, moe)
    for x, y, weight, dense_after in zip(
        after, held_out.wanted, held_out.weights, streams.dense[streams.fitted :], strict=True
    ):
        error += float(jnp.sum(weight * jnp.sum((x - dense_after) ** 2, axis=-1)))
        wanted += float(jnp.sum(weight * jnp.sum(y**2, axis=-1)))
    assert error / wanted == pytest.approx(manifest.layers[0]["error_to_dense_stream"], rel=0.02)  # bfloat16 on disk


def test_above_half_of_the_experts_two_groups_share_some(dense_directory, tmp_path, calibration):
    """Six experts, top-4: two in both groups, with router rows of 0, and two in each; every neuron in one expert."""
    options = dataclasses.replace(OPTIONS, experts=6, top_k=4, **calibration)
    errors = {}
    for steps in (0, 60):
        manifest = carve(dense_directory, tmp_path / f"moe{steps}", dataclasses.replace(options, refit_steps=steps))
        errors[steps] = [layer["error_to_dense_stream"] for layer in manifest.layers]
        assert manifest.layers[0]["load_max_over_mean"] == pytest.approx(6 / 4)
    assert errors[60][0] < errors[0][0]
    dense, carved = tensors_of(dense_directory), tensors_of(tmp_path / "moe0")
    block = "model.layers.1.block_sparse_moe."
    rows = np.concatenate([carved[f"{block}experts.{expert}.w3.weight"] for expert in range(6)])
    assert {row.tobytes() for row in rows} == {row.tobytes() for row in dense["model.layers.1.mlp.up_proj.weight"]}
    router = np.float32(carved[f"{block}gate.weight"])
    assert not router[:2].any() and router[2].any()
    np.testing.assert_array_equal(router[[2, 3, 4, 5]], router[2] * np.array([[1], [1], [-1], [-1]]))
    config, params = pretrained.load_pretrained(tmp_path / "moe60", dtype=jnp.float32)
    tokens = calibration_batches(Checkpoint(dense_directory), *calibration.values())[-1][:, :-1]
    load_LE = np.asarray(forward(config, params, tokens).routing.load_E)
    np.testing.assert_allclose(load_LE[:, :2], load_LE.max())
    np.testing.assert_allclose(load_LE[:, [2, 4]], load_LE[:, [3, 5]])
    np.testing.assert_allclose(load_LE[:, 2] + load_LE[:, 4], load_LE.max(), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"calibration_tokens": 32768}, 150),
        ({"calibration_tokens": 32767}, 0),
        ({"control": True}, 150),
        ({"refit_steps": 7}, 7),
        ({"refit_steps": 0}, 0),
        ({"refit": False, "partition": "gate-kmeans"}, 0),
        ({"partition": "gate-kmeans"}, 0),
        ({"calibration": ()}, 0),
    ],
)
def test_gradient_steps_are_taken_where_there_is_text_for_them(changes, steps):
    options = dataclasses.replace(CarveOptions(calibration=("text",)), **changes)
    assert with_refit_steps(options).refit_steps == steps


def test_exploring_ranks_points_and_gives_their_commands(dense_directory, tmp_path, calibration, capsys, monkeypatch):
    timed = explore.tokens_per_second
    monkeypatch.setattr(explore, "tokens_per_second", lambda config: 1.0)
    flags = ["--calibration", *calibration["calibration"]]
    flags += ["--calibration-tokens", str(calibration["calibration_tokens"])]
    command = ["carve", str(dense_directory), str(tmp_path / "points"), "--experts", "4", *flags, "--explore"]
    assert cli.main([*command, "--explore-layers", "1"]) == 0
    printed = capsys.readouterr().err
    report = json.loads((tmp_path / "points" / explore.REPORT).read_text())
    assert report["layers"] == [1] and (tmp_path / "points" / explore.PLOT).stat().st_size
    assert all(row["command"] in printed for row in report["points"])
    rows = {row["command"].partition(" DST ")[2].partition(" --calibration ")[0]: row for row in report["points"]}
    few, many = rows["--experts 4 --top-k 1"], rows["--experts 4 --top-k 3"]
    assert few["active"] < many["active"] and few["parameters"] == many["parameters"]
    # four groups of four experts are the same function as four groups of one
    finer = rows["--experts 16 --top-k 4 --partition token-clusters"]
    assert finer["kl_divergence"] == pytest.approx(few["kl_divergence"], rel=1e-3)
    # layer 1 of that carve between the dense model's own layers
    monkeypatch.setattr(CalibrationStreams, "leave", lambda streams, *_: streams.pass_by())
    carve(dense_directory, tmp_path / "moe", dataclasses.replace(OPTIONS, experts=4, top_k=1, **calibration))
    layers, carved = (LayerwiseModel(Checkpoint(tmp_path / name)) for name in ("dense", "moe"))
    tokens = calibration_batches(Checkpoint(dense_directory), *calibration.values())[-1][:, :-1]
    log_p = []
    for middle in (layers, carved):
        x = layers.embed(tokens)
        for layer, model in enumerate((layers, middle, layers)):
            weights = model.weights(layer)
            after_attention, normed = model.attend(layer, weights, x)
            x = after_attention + model.feed_forward(layer, weights, normed)
        log_p.append(np.float64(jax.nn.log_softmax(logits(layers.config.norm_eps, layers.head(), x))))
    kl = (np.exp(log_p[0]) * (log_p[0] - log_p[1])).sum(-1).mean()
    assert few["kl_divergence"] == pytest.approx(3 * kl, rel=0.01)
    assert timed(carved.config) > 0


def test_a_carve_says_what_it_has_lost_or_that_it_has_not_looked(dense_directory, tmp_path, calibration, capsys):
    flags = ["--experts", "4", "--top-k", "2"]
    assert cli.main(["carve", str(dense_directory), str(tmp_path / "blind"), *flags]) == 0
    assert "wants repair" in capsys.readouterr().err.splitlines()[-1]
    manifest = carve(dense_directory, tmp_path / "moe", dataclasses.replace(OPTIONS, **calibration))
    batches = calibration_batches(Checkpoint(dense_directory), *calibration.values())[-1:]
    losses, log_p = {}, {}
    for name, directory in (("dense", dense_directory), ("carved", tmp_path / "moe")):
        config, params = pretrained.load_pretrained(directory, dtype=jnp.float32)
        log_p[name] = np.float64(jax.nn.log_softmax(forward(config, params, batches[0][:, :-1]).logits))
        losses[name] = -np.take_along_axis(log_p[name], batches[0][:, 1:, None], axis=-1).mean()
    for name, loss in losses.items():
        assert manifest.figures[f"held_out_loss_{name}"] == pytest.approx(loss, abs=2e-4)
    kl = (np.exp(log_p["dense"]) * (log_p["dense"] - log_p["carved"])).sum(-1).mean()
    assert manifest.figures["held_out_kl_divergence"] == pytest.approx(kl, rel=0.01)
    agreement = (log_p["dense"].argmax(-1) == log_p["carved"].argmax(-1)).mean()
    assert manifest.figures["held_out_argmax_agreement"] == pytest.approx(agreement, abs=0.01)
    # a model that was never trained is worse than the words' frequencies, and so is what is carved of it
    assert manifest.figures["destroyed"] and "the model is destroyed" in manifest.figures["verdict"]
    assert f"so is the {manifest.figures['held_out_loss_dense']:.2f} of what" in manifest.figures["verdict"]


def test_an_interrupted_carve_does_not_go_on_with_other_calibration_text(
    dense_directory, tmp_path, calibration, monkeypatch
):
    options = dataclasses.replace(OPTIONS, **calibration)
    with monkeypatch.context() as patched:
        interrupted(after_layers=2, monkeypatch=patched)
        with pytest.raises(KeyboardInterrupt):
            carve(dense_directory, tmp_path / "moe", options)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(reversed(text.read_text().split())))
    seen = interrupted(after_layers=99, monkeypatch=monkeypatch)
    manifest = carve(dense_directory, tmp_path / "moe", options)
    assert len(seen) == 3  # every layer anew
    assert len(manifest.inputs["calibration_sha256"]) == 64


def test_a_model_writes_its_own_calibration_text(dense_directory, tmp_path, monkeypatch):
    write_tokenizer(dense_directory, 60)  # of 72 rows: the others stand for nothing
    options = dataclasses.replace(OPTIONS, calibration=("self",), calibration_tokens=1500)
    manifest = carve(dense_directory, tmp_path / "moe", options)
    records = [json.loads(line) for line in (tmp_path / "moe" / "calibration.jsonl").read_text().splitlines()]
    assert len(records) == 16 and len({record["text"] for record in records}) == 16
    assert {record["temperature"] for record in records} == set(self_text.TEMPERATURES)
    config, params = pretrained.load_pretrained(dense_directory)
    tokenizer = load_tokenizer(dense_directory)
    known_V = np.arange(72) < 60
    sampled = records[::5]  # a seed and a temperature give the text again
    sampling = [SamplingParams(temperature=record["temperature"], seed=record["seed"]) for record in sampled]
    prompts = [[1]] * len(sampled)
    again_BT = np.stack(list(generate(config, params, prompts, 95, sampling, known_V=known_V)), axis=1)
    assert again_BT.max() < 60 and [tokenizer.decode(row) for row in again_BT] == [one["text"] for one in sampled]
    assert np.max(list(generate(config, params, prompts, 95, sampling))) >= 60
    again = self_text.sample_text(Checkpoint(dense_directory), options.calibration_tokens, options.seed)
    assert hash_of(again.batches) == manifest.inputs and again.lines.count("\n") == len(records)
    monkeypatch.setattr(self_text, "generate", lambda *given, **_: iter([np.full(len(given[2]), 7)] * 95))
    with pytest.raises(UserError, match="sequences begin in 1 ways only, expected 16"):
        carve(dense_directory, tmp_path / "third", options)
