"""Training of the experts that a text uses, and a loss on what FFNs give: against loops, and the whole gradient."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.model.moe import _statistics
from nemoe_jax.spec.mesh import make_mesh
from nemoe_jax.spec.schema import leaves
from tests.support.train_runs import DENSE, log_of, make_workplace, random_params, write_recipe
from tests.train.test_train import batch_of
from train.cli import main
from train.recipe import read_recipe
from train.run.prepare import load, resolve, trainable_of
from train.step.chosen_experts import ChosenExperts, choose, own_sharding
from train.step.divergence import feature_distance
from train.step.step import Objective

ESFT = {"trainable": "esft", "esft_share": 0.6, "esft_batches": 2, "lora": [], "train_router": False, "distill": None}
FFN = "blocks/moe/ffn/"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = tmp_path_factory.mktemp("workplace")
    make_workplace(place)
    deeper = DENSE.replace(layers=3)
    pretrained.save_pretrained(place / "deeper", deeper, random_params(deeper))
    return place


@pytest.fixture
def write(workplace, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda **keys: write_recipe(tmp_path / "recipe.yaml", workplace, "repair", **{"steps": 4} | keys)


# experts


def test_the_fewest_experts_with_the_share_are_chosen():
    random = np.random.default_rng(0)
    for cumulative in (0.1, 0.5, 0.97, 1.0):
        shares_LE = random.random((3, 6)) ** 3
        places = choose(shares_LE, cumulative)
        for layer, shares_E in enumerate(shares_LE):
            own = [expert for at, expert in places if at == layer]
            parts = sorted(shares_E / shares_E.sum(), reverse=True)
            fewest = next(count for count in range(1, 7) if sum(parts[:count]) >= cumulative - 1e-9)
            assert len(own) == fewest and set(own) == set(np.argsort(-shares_E)[:fewest])
    assert choose(np.array([[0.0, 0.0, 1.0]]), 1.0) == ((0, 2),)


def test_chosen_experts_are_cut_over_the_devices_that_all_were():
    mesh = make_mesh({"fsdp": 2, "expert": 2}, jax.devices()[:4])

    def places(shape, *spec):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return own_sharding(jax.ShapeDtypeStruct(shape, "float32", sharding=place)).spec

    assert places((2, 4, 24, 12), None, ("fsdp", "expert")) == PartitionSpec(None, ("fsdp", "expert"), None)
    assert places((2, 4, 25, 12), None, "expert", "fsdp") == PartitionSpec(None, "fsdp", ("expert",))
    assert places((2, 4, 25, 9), None, "expert") == PartitionSpec(None, None, None)


def test_gate_shares_are_mean_routing_weights_of_tokens_that_are_no_padding():
    random = np.random.default_rng(1)
    weights, segments = random.random((2, 5, 2)).astype("f4"), np.array([[1, 1, 1, 0, 0], [1, 1, 2, 2, 2]])
    chosen = np.argsort(random.random((2, 5, 4)))[..., :2]
    gate_E = _statistics(random.random((2, 5, 4)).astype("f4"), weights, chosen, segments).gate_E
    expected = np.zeros(4)
    for row, token in zip(*np.nonzero(segments), strict=True):
        for expert, weight in zip(chosen[row, token], weights[row, token], strict=True):
            expected[expert] += weight / 8
    np.testing.assert_allclose(gate_E, expected, rtol=1e-5)


def test_the_gradient_of_chosen_experts_is_theirs_of_all(write):
    gradients, places = {}, ((0, 1), (0, 3), (1, 2))
    for name, keys in (("esft", {}), ("weights", {"weights": [FFN + "[gud]*"], "esft_share": None})):
        recipe = read_recipe(write(**ESFT | {"trainable": name} | keys))
        inputs, phase = resolve(recipe), recipe.phases[0]
        params = load(recipe, inputs.config, None)
        own = places if name == "esft" else ()
        trainable, frozen = trainable_of(recipe, phase, inputs.config, [], params, None, own)
        objective = Objective(recipe, phase, inputs.config, None)
        gradient = jax.jit(jax.grad(objective.loss, has_aux=True))
        gradients[name] = gradient(trainable, frozen, None, batch_of(4))[0]["params"]
    assert gradients["esft"].keys() == gradients["weights"].keys() == {FFN + name for name in ("gate", "up", "down")}
    for path, gradient in gradients["esft"].items():
        assert isinstance(gradient, ChosenExperts) and gradient.values.shape[0] == 3
        whole = np.array(gradients["weights"][path])[tuple(np.array(places).T)]
        np.testing.assert_allclose(gradient.values, whole, rtol=1e-5, atol=1e-8)


def test_a_run_changes_the_experts_that_it_names_and_nothing_else(write, workplace, capsys):
    assert main(["run", str(write(**ESFT)), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    table = json.loads(Path("out/adapters/1-train/experts.json").read_text())
    assert [one["layer"] for one in table] == [0, 1] and all(0.6 <= one["gate_share"] <= 1 for one in table)
    chosen = {(one["layer"], expert) for one in table for expert in one["experts"]}
    assert 0 < len(chosen) < 8 and report["params_trained"] == len(chosen) * 3 * 24 * 12
    before, after = (leaves(pretrained.load_pretrained(place)[1]) for place in (workplace / "mixture", Path("out")))
    for path, array in before.items():
        changed = np.array(array != after[path])
        if path.startswith(FFN) and path.endswith(("gate", "up", "down")):
            assert {tuple(map(int, place)) for place in np.argwhere(changed.any((2, 3)))} == chosen
        else:
            assert not changed.any(), path
    losses = [line["loss"] for line in log_of(Path("out")) if "loss" in line]
    assert losses[-1] < losses[0]


# what FFNs give


def test_distances_of_what_ffns_give_token_by_token():
    random = np.random.default_rng(2)
    student, teacher = random.normal(size=(2, 3, 2, 4, 5)).astype("f4")
    mask = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], "f4")
    student[1, 0, 1] = 0
    cosine, l2 = (np.array(feature_distance(kind, student, teacher, mask)) for kind in ("cosine", "l2"))
    square_L = [
        np.mean([(layer[place] ** 2).sum() for place in zip(*np.nonzero(mask), strict=True)]) for layer in teacher
    ]
    for row, token in np.ndindex(2, 4):
        pairs = [(student[layer, row, token], teacher[layer, row, token]) for layer in range(3)]
        away = [1 - s @ t / max(np.linalg.norm(s) * np.linalg.norm(t), 1e-30) for s, t in pairs]
        far = [((s - t) ** 2).sum() / square for (s, t), square in zip(pairs, square_L, strict=True)]
        assert cosine[row, token] == pytest.approx(np.mean(away), rel=1e-5)
        assert l2[row, token] == pytest.approx(np.mean(far), rel=1e-5)


@pytest.mark.parametrize("kind, of", [("cosine", ["ffn"]), ("l2", ["ffn", "attention"])])
def test_a_feature_loss_is_added_by_its_schedule(write, workplace, kind, of):
    distill = {
        "teacher": str(workplace / "dense"),
        "feature_loss": kind,
        "feature_of": of,
        "feature_weight": 3,
        "final_feature_weight": 0,
    }
    recipe = read_recipe(write(distill=distill))
    inputs, phase = resolve(recipe), recipe.phases[0]
    params, teacher = load(recipe, inputs.config, None), pretrained.load_pretrained(workplace / "dense")[1]
    trainable, frozen = trainable_of(recipe, phase, inputs.config, inputs.targets[0], params, None)
    loss = jax.jit(Objective(recipe, phase, inputs.config, inputs.teachers[0]).loss)
    for step, weight in ((0, 3), (1, 2), (3, 0)):
        total, parts = loss(trainable, frozen, teacher, batch_of(2), step)
        assert total == pytest.approx(float(parts["kl"] + weight * parts["feature_loss"]), rel=1e-5)
        assert parts["feature_loss"] > 0.1

    itself = Objective(recipe.model_copy(update={"remat": True}), phase, inputs.config, inputs.config)
    assert jax.jit(itself.loss)(trainable, frozen, params, batch_of(2), 0)[1]["feature_loss"] == pytest.approx(
        0, abs=1e-5
    )


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"trainable": "esft", "lora": []}, "esft_share: expected with trainable: esft alone, got None with esft"),
        ({"esft_share": 0.5}, "esft_share: expected with trainable: esft alone, got 0.5 with lora"),
        (ESFT | {"esft_share": 1.5}, "esft_share: expected less than or equal to 1, got 1.5"),
        (ESFT | {"model": "WORK/dense"}, "trainable: esft: expected an MoE model"),
        (
            {"distill": {"teacher": "WORK/dense", "feature_loss": "l2", "offline": "x"}},
            "feature_loss: expected none with",
        ),
        ({"distill": {"teacher": "WORK/deeper", "feature_loss": "l2"}}, "expected layers 2, the model's, got 3"),
    ],
)
def test_what_does_not_fit_is_said(write, workplace, capsys, keys, message):
    keys = json.loads(json.dumps(keys).replace("WORK", str(workplace)))
    assert main(["run", str(write(**keys))]) == 2
    assert message in capsys.readouterr().err and not Path("out").exists()
