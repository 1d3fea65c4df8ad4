"""Width pruning against transformers' activations and loops over their tokens in NumPy."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.numpy import load_file, save_file

from convert import cli
from convert.layerwise import calibration_batches
from convert.minitron import importance
from convert.minitron.minitron import Kept, MinitronOptions, minitron, pruned_config
from convert.streaming import MANIFEST, ConversionSettings
from convert.verify.logits import our_logits, torch_logits
from nemoe_jax.checkpoints import pretrained
from nemoe_jax.checkpoints.reader import Checkpoint, read_config
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import preset
from tests.convert.test_verify import write_tokenizer
from tests.support.configs import CONFIGS, DENSE, MIXTRAL, NEKOMIND

TOKENS = 700  # one batch: eight sequences of the context's 96
HIDDEN, FFN = 20, 8  # torch's experts want rows of a multiple of 16 bytes
NEVER_CHOSEN = (1, 5)  # a layer of the mixture and its expert
SIZES = {
    "dense": {"hidden": HIDDEN, "ffn": 30},
    "mixtral": {"hidden": HIDDEN, "ffn": FFN},
    "nekomind": {"hidden": HIDDEN, "ffn": FFN, "shared_ffn": 10, "dense_ffn": 31},
}


def save(directory, config, params):
    pretrained.save_pretrained(directory, config, params)
    write_tokenizer(directory, config.vocab)


def random_params(config):
    """Norms that are not ones; channel 0 is always positive, so that a router can leave an expert out for good."""
    random = np.random.default_rng(5)
    params = schema.leaves(schema.initialize(config, jax.random.key(1)))
    params = {path: np.array(array) for path, array in params.items()}
    for path, array in params.items():
        if path.endswith("norm"):
            array += 0.3 * random.random(array.shape, np.float32)
        if path.endswith(("/o", "/down")):
            array[..., 0] = 0
        if path.endswith("router"):
            array *= 3  # weights that differ
    params["embed"][:, 0] = 0.1
    if config is MIXTRAL:
        layer, expert = NEVER_CHOSEN
        params["blocks/moe/ffn/router"][layer, 0, expert] = -1000
    return schema.unflatten(params)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The three models, and text."""
    root = tmp_path_factory.mktemp("minitron")
    for name, config in CONFIGS.items():
        save(root / name, config, random_params(config))
    letters = np.random.default_rng(0).integers(2, DENSE.vocab, 900)
    (root / "text.txt").write_text("".join(chr(ord("0") + number) for number in letters))
    return root


def options_for(place, **changes):
    return MinitronOptions(calibration=(str(place / "text.txt"),), calibration_tokens=TOKENS, **changes)


@pytest.fixture(scope="module")
def pruned(place):
    """Each model pruned in all widths."""
    for name, sizes in SIZES.items():
        minitron(place / name, place / f"{name}-pruned", options_for(place, **sizes))
    return place


def norms_in_torch(directory, ids_BT):
    """{module: (what it reads, what it gives)}, float64, of the norms over the residual stream."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, trust_remote_code=True, experts_implementation="eager"
    ).eval()
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("layernorm", "model.norm")):
            module.register_forward_hook(
                lambda _, read, given, name=name: seen.update(
                    {name: (read[0].double().numpy(), given.double().numpy())}
                )
            )
    with torch.no_grad():
        model(torch.from_numpy(np.asarray(ids_BT, np.int64)))
    return seen


def score(activations):
    """√(Σ over sequences of (mean over tokens of |h|)²), one sequence and token at a time."""
    total = 0
    for sequence in activations:
        absolute = 0
        for token in sequence:
            absolute = absolute + np.abs(token)
        total = total + (absolute / len(sequence)) ** 2
    return np.sqrt(total)


def hidden(maps, x):
    gate = maps["gate"] @ x
    return gate / (1 + np.exp(-gate)) * (maps["up"] @ x)


def neuron_scores(config, tensors, layer, x_BTD):
    """{axis: scores}, token by token; tensors by checkpoint key."""
    prefix = f"model.layers.{layer}."

    def maps(names, stem):
        return {role: tensors[f"{prefix}{stem}.{name}.weight"].astype(np.float64) for role, name in names.items()}

    qwen = {"gate": "gate_proj", "up": "up_proj"}
    if config.family == "mistral" or layer < config.dense_layers:
        dense = maps(qwen, "mlp")
        return {"ffn": score([[hidden(dense, x) for x in x_TD] for x_TD in x_BTD])}
    names, stem = ({"gate": "w1", "up": "w3"}, "block_sparse_moe") if config.family == "mixtral" else (qwen, "mlp")
    router = tensors[f"{prefix}{stem}.gate.weight"].astype(np.float64)
    scores = []
    for expert in range(config.experts):
        own, weighted, plain = maps(names, f"{stem}.experts.{expert}"), [], []
        for x_TD in x_BTD:
            weighted.append([])
            plain.append([])
            for x in x_TD:
                logits = router @ x
                chosen = np.argsort(-logits)[: config.top_k]
                weight = np.exp(logits[expert]) / np.exp(logits[chosen]).sum() if expert in chosen else 0
                plain[-1].append(hidden(own, x))
                weighted[-1].append(weight * plain[-1][-1])
        scores.append(score(weighted) if np.any(weighted) else score(plain))
    result = {"expert_ffn": np.array(scores)}
    if config.shared_ffn:
        shared = maps(qwen, "mlp.shared_expert")
        gate = tensors[f"{prefix}mlp.shared_expert_gate.weight"][0].astype(np.float64)
        result["shared_ffn"] = score([[hidden(shared, x) / (1 + np.exp(-gate @ x)) for x in x_TD] for x_TD in x_BTD])
    return result


@pytest.fixture(scope="module", params=CONFIGS)
def expected(request, place):
    """(name, scores by the oracle)."""
    name, config = request.param, CONFIGS[request.param]
    ids_BT = calibration_batches(Checkpoint(place / name), [str(place / "text.txt")], TOKENS)[0][:, :-1]
    norms = norms_in_torch(place / name, ids_BT)
    tensors = load_file(place / name / "model.safetensors")
    shares = {}
    for module, (x_BTD, _) in norms.items():
        shares[f"{module}.weight"] = np.mean([x**2 / (x**2).sum() for x_TD in x_BTD for x in x_TD], axis=0)
    hidden_scores = sum(score(given) for module, (_, given) in norms.items() if module != "model.norm")
    neurons = [
        neuron_scores(config, tensors, layer, norms[f"model.layers.{layer}.post_attention_layernorm"][1])
        for layer in range(config.layers)
    ]
    return name, importance.Scores(hidden_scores, neurons, shares)


def test_scores_are_those_of_loops_over_transformers_activations(place, expected):
    name, scores = expected
    source = Checkpoint(place / name)
    got = importance.Scorer(source, calibration_batches(source, [str(place / "text.txt")], TOKENS)).all_layers()
    np.testing.assert_allclose(got.hidden_D, scores.hidden_D, rtol=1e-4)
    assert got.shares_D.keys() == scores.shares_D.keys()
    for key, share_D in scores.shares_D.items():
        np.testing.assert_allclose(got.shares_D[key], share_D, rtol=1e-4)
    for got_layer, layer in zip(got.neurons, scores.neurons, strict=True):
        assert got_layer.keys() == layer.keys()
        for axis in layer:
            np.testing.assert_allclose(got_layer[axis], layer[axis], rtol=1e-4, atol=1e-6)


def best(scores, size):
    return sorted(sorted(range(len(scores)), key=lambda index: -scores[index])[:size])


def test_every_tensor_is_the_source_s_at_the_best_channels_and_neurons(pruned, expected):
    name, scores = expected
    config = CONFIGS[name]
    source, result = (load_file(pruned / directory / "model.safetensors") for directory in (name, f"{name}-pruned"))
    channels = best(scores.hidden_D, HIDDEN)
    factors = {key: (share[channels].sum() * config.hidden / HIDDEN) ** 0.5 for key, share in scores.shares_D.items()}
    assert source.keys() == result.keys()
    for key, tensor in source.items():
        parts = key.split(".")
        if "layers" in parts:
            neurons = scores.neurons[int(parts[2])]
            if "experts" in parts:
                kept = best(neurons["expert_ffn"][int(parts[parts.index("experts") + 1])], FFN)
            elif "shared_expert" in parts:
                kept = best(neurons["shared_ffn"], SIZES[name]["shared_ffn"])
            elif "ffn" in neurons:
                kept = best(neurons["ffn"], SIZES[name].get("dense_ffn", SIZES[name]["ffn"]))
        last = parts[-2]
        if last in ("q_norm", "k_norm"):
            expected = tensor
        elif key in factors:
            expected = tensor[channels] * factors[key]
        elif last in ("gate_proj", "up_proj", "w1", "w3"):
            expected = tensor[kept][:, channels]
        elif last in ("down_proj", "w2"):
            expected = tensor[channels][:, kept]
        elif last == "o_proj":
            expected = tensor[channels]
        else:  # embedding, head, q, k, v, router, the shared expert's gate
            expected = tensor[:, channels]
        if key in factors:
            np.testing.assert_allclose(result[key], expected, rtol=1e-5, err_msg=key)
        else:
            np.testing.assert_array_equal(result[key], expected, err_msg=key)
    got = read_config(pruned / f"{name}-pruned")
    assert got.norm_eps == pytest.approx(config.norm_eps * np.mean([factor**2 for factor in factors.values()]))
    sizes = {"hidden": HIDDEN, "expert_ffn" if config.experts else "ffn": SIZES[name]["ffn"], "norm_eps": got.norm_eps}
    if name == "nekomind":
        sizes |= {"shared_ffn": SIZES[name]["shared_ffn"], "ffn": SIZES[name]["dense_ffn"]}
    assert got == config.replace(**sizes)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_opens_the_result(pruned, name):
    ids_BT = np.random.default_rng(1).integers(0, DENSE.vocab, (2, 9))
    directory = pruned / f"{name}-pruned"
    np.testing.assert_allclose(our_logits(directory, ids_BT), torch_logits(directory, ids_BT), atol=1e-5)


@pytest.mark.parametrize("config", [DENSE, MIXTRAL], ids=["dense", "mixtral"])
def test_channels_and_neurons_that_are_always_zero_go_without_a_trace(place, tmp_path, config):
    random, params = np.random.default_rng(3), schema.leaves(random_params(config))
    channels = random.permutation(np.arange(1, config.hidden))[: config.hidden - HIDDEN]
    ffn = config.expert_ffn or config.ffn
    keep = FFN if config.experts else 30
    params["embed"][:, channels] = 0
    params["embed"] *= 0.03  # so small that epsilon matters
    for path, array in params.items():
        if path.endswith(("/o", "/down")):
            array[..., channels] = 0
        if path.endswith("/up"):
            array[..., random.permutation(ffn)[keep:]] = 0
    save(tmp_path / "source", config, schema.unflatten(params))
    minitron(tmp_path / "source", tmp_path / "pruned", options_for(place, hidden=HIDDEN, ffn=keep))
    assert read_config(tmp_path / "pruned").norm_eps == pytest.approx(config.norm_eps * config.hidden / HIDDEN)
    ids_BT = random.integers(0, config.vocab, (2, 9))
    before, after = our_logits(tmp_path / "source", ids_BT), our_logits(tmp_path / "pruned", ids_BT)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_nothing_pruned_is_the_source_bit_for_bit(place, tmp_path):
    minitron(place / "dense", tmp_path / "same", options_for(place, hidden=DENSE.hidden, ffn=DENSE.ffn))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (place / "dense" / name).read_bytes()


def test_norms_can_stay_as_they_are_and_the_random_peer_keeps_others(place, pruned, tmp_path):
    sizes = {"hidden": HIDDEN, "rescale_norms": False}
    key = "model.norm.weight"
    source = load_file(place / "dense" / "model.safetensors")[key]
    kept = {}
    for name, changes in {"best": {}, "a": {"importance": "random"}, "b": {"importance": "random", "seed": 1}}.items():
        minitron(place / "dense", tmp_path / name, options_for(place, **sizes, **changes))
        result = load_file(tmp_path / name / "model.safetensors")[key]
        assert read_config(tmp_path / name) == DENSE.replace(hidden=HIDDEN)
        kept[name] = tuple(np.flatnonzero(np.isin(source, result)))
        np.testing.assert_array_equal(result, source[list(kept[name])])
    assert len(set(kept.values())) == 3


def test_the_12b_becomes_minitron_8b():
    options = MinitronOptions(hidden=4096, ffn=11520)
    config = pruned_config(preset("mistral-nemo-12b"), options, "nemo")
    assert config == preset("minitron-8b").replace(context=131072)
    assert round(schema.count(config)[0] / 1e9, 2) == 8.41


def contents(directory: Path):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_interrupted_job_goes_on_and_gives_the_same(pruned, tmp_path, monkeypatch):
    options, run = options_for(pruned, **SIZES["mixtral"]), ConversionSettings(shard_bytes=1)
    minitron(pruned / "mixtral", tmp_path / "whole", options, run)
    cut, calls = Kept.cut, []

    def interrupted_in_layer_2(kept, ref, tensor):
        calls.append(ref.key)
        if ref.key.startswith("model.layers.2."):
            raise KeyboardInterrupt
        return cut(kept, ref, tensor)

    with monkeypatch.context() as patched:
        patched.setattr(Kept, "cut", interrupted_in_layer_2)
        with pytest.raises(KeyboardInterrupt):
            minitron(pruned / "mixtral", tmp_path / "again", options, run)
    assert not (tmp_path / "again").exists()
    calls.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Kept, "cut", lambda kept, ref, tensor: (calls.append(ref.key), cut(kept, ref, tensor))[1])
        minitron(pruned / "mixtral", tmp_path / "again", options, run)
    assert not any(key.startswith("model.layers.0.") for key in calls)  # was finished
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


ERRORS = {
    "nothing": ("dense", [], "dense: nothing to prune; give --hidden or --ffn"),
    "wider": ("dense", ["--hidden", "25"], "--hidden: expected 1 to the source's 24, got 25"),
    "more neurons": ("dense", ["--ffn", "49"], "--ffn: expected 1 to the source's 48, got 49"),
    "more in an expert": ("mixtral", ["--ffn", "13"], "--ffn: expected 1 to the source's 12, got 13"),
    "none": ("mixtral", ["--ffn", "0"], "--ffn: expected 1 to the source's 12, got 0"),
    "negative": ("dense", ["--hidden", "-1"], "--hidden: expected 1 to the source's 24, got -1"),
    "no shared expert": ("mixtral", ["--shared-ffn", "2"], "--shared-ffn: the model has none; it can be pruned by"),
    "no dense layers": ("dense", ["--dense-ffn", "2"], "--dense-ffn: the model has none; it can be pruned by"),
    "too little text": ("dense", ["--ffn", "9", "--calibration-tokens", "900"], "expected more than 1,536 tokens"),
    "no tokens": (
        "dense",
        ["--ffn", "9", "--calibration-tokens", "0"],
        "--calibration-tokens: expected a positive number",
    ),
}


@pytest.mark.parametrize(("name", "flags", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_options_are_one_line_and_exit_status_2(place, tmp_path, capsys, name, flags, message):
    argv = ["minitron", str(place / name), str(tmp_path / "out"), "--calibration", str(place / "text.txt"), *flags]
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and message in printed.err and printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_text_or_with_broken_weights_nothing_is_made(place, tmp_path, capsys):
    assert cli.main(["minitron", str(place / "dense"), str(tmp_path / "out"), "--ffn", "9"]) == 2
    assert "minitron: wants --calibration text" in capsys.readouterr().err
    save(tmp_path / "bad", DENSE, random_params(DENSE))
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.inf
    save_file(tensors, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(UserError, match="bad: layer 1: activations on the calibration text are not finite"):
        minitron(tmp_path / "bad", tmp_path / "out", options_for(place, ffn=9))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_the_command_reports_and_a_dry_run_leaves_nothing(place, tmp_path, capsys):
    argv = ["minitron", str(place / "nekomind"), str(tmp_path / "out"), "--calibration", str(place / "text.txt")]
    argv += ["--calibration-tokens", str(TOKENS), "--json", "--hidden", str(HIDDEN), "--ffn", str(FFN)]
    assert cli.main([*argv, "--dry-run"]) == 0
    size = json.loads(capsys.readouterr().out)["gigabytes"]
    assert not list(tmp_path.iterdir())
    assert cli.main(argv) == 0
    figures = json.loads(capsys.readouterr().out)
    pruned = NEKOMIND.replace(hidden=HIDDEN, expert_ffn=FFN)
    assert (figures["parameters"], figures["active_parameters"]) == schema.count(pruned)
    assert size == pytest.approx(4e-9 * figures["parameters"], rel=0.5)  # and the header
    assert 0 < figures["hidden_kept"] < 1 and 0 < figures["expert_ffn_kept_min"] < 1
    assert figures["norm_factor_min"] < figures["norm_factor_max"]
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["options"]["importance"] == "activations" and len(manifest["layers"]) == NEKOMIND.layers
