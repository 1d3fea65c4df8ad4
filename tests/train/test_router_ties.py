"""Router rows that a carve made alike stay so: against plain loops, and over whole runs."""

import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.spec.router_ties import find_ties
from tests.support.train_runs import MIXTURE, make_workplace, random_params, write_recipe
from train.recipe import read_recipe
from train.run.loop import train
from train.run.run_directory import Interrupted, Signals

ROUTER = "blocks/moe/ffn/router"


def router_of(directory) -> np.ndarray:
    return np.asarray(pretrained.load_pretrained(directory)[1]["blocks"]["moe"]["ffn"]["router"])


def carved(top_k: int, seed: int = 0) -> np.ndarray:
    """(layers, embed, 4 experts): two groups of two, or v, -v and two shared experts; tiny, as a carve leaves them."""
    first, second = 1e-3 * np.random.default_rng(seed).normal(size=(2, MIXTURE.layers, MIXTURE.hidden)).astype("f4")
    rows = (first, second, first, second) if top_k == 2 else (first, 0 * first, -first, 0 * first)
    return np.stack(rows, axis=-1)


def test_ties_are_those_of_groups_that_tokens_choose_whole():
    pairs, signed = find_ties(carved(2), 2), find_ties(carved(3), 3)
    assert pairs.leader_LE.tolist() == [[0, 1, 0, 1]] * 2 and pairs.sign_LE.tolist() == [[1] * 4] * 2
    assert signed.sign_LE.tolist() == [[1, 0, -1, 0]] * 2
    assert pairs.groups(0) == [[0, 2], [1, 3]] and signed.groups(1) == [[0, 1, 3], [1, 2, 3]]
    rows = np.random.default_rng(1).normal(size=(2, 5, 4)).astype("f4")
    a, b, c, d = np.moveaxis(rows, -1, 0)
    for ties, expected in ((pairs, [(a + c) / 2, (b + d) / 2] * 2), (signed, [(a - c) / 2, 0 * a, (c - a) / 2, 0 * a])):
        mean = np.asarray(ties.mean(rows))
        np.testing.assert_allclose(mean, np.stack(expected, -1), rtol=1e-6)
        assert (np.asarray(ties.copied(mean)) == mean).all()

    untied = np.random.default_rng(2).normal(size=(1, 5, 4)).astype("f4")
    assert find_ties(untied, 2) is None and find_ties(0 * untied, 2) is None
    assert find_ties(np.repeat(untied[..., :1], 4, -1), 2) is None  # all alike: they have to part to be of use
    assert find_ties(carved(2), 3) is None and find_ties(carved(2), 1) is None
    mixed = find_ties(np.concatenate([untied[:, :, :], carved(2)[:, :5]]), 2)
    assert mixed.groups(0) == [[0], [1], [2], [3]] and mixed.groups(1) == pairs.groups(0)
    np.testing.assert_array_equal(np.asarray(mixed.mean(np.repeat(untied, 3, 0)))[0], untied[0])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    place = tmp_path_factory.mktemp("workplace")
    make_workplace(place)
    for top_k in (2, 3):
        config = MIXTURE.replace(top_k=top_k)
        params = random_params(config)
        params["blocks"]["moe"]["ffn"]["router"] = carved(top_k)
        pretrained.save_pretrained(place / f"carved{top_k}", config, params)
        (place / f"carved{top_k}" / "tekken.json").write_bytes((place / "tekken.json").read_bytes())
    return place


TWO = {"lora": [{"pattern": "blocks/moe/ffn/*", "rank": 2}], "mesh": "fsdp=2", "router_bias_rate": 0.01}
ALL = {"lora": [], "train_router": False, "trainable": "all", "optimizer": {"name": "muon", "learning_rate": 1e-2}}


@pytest.mark.parametrize("top_k, keys", [(2, TWO), (3, ALL)], ids=["adamw, adapters, two devices", "muon, all"])
def test_rows_stay_tied_to_the_last_bit(workplace, tmp_path, monkeypatch, top_k, keys):
    monkeypatch.chdir(tmp_path)
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    data = {"train": str(workplace / "train.jsonl"), "sequence_length": 32, "batch_size": 4}
    model, more = str(workplace / f"carved{top_k}"), {"steps": 4, "distill": None, "data": data}
    recipe = write_recipe(tmp_path / "recipe.yaml", workplace, "repair", **more | keys | {"model": model})
    if top_k == 3:
        with monkeypatch.context() as patch:
            patch.setattr(Signals, "received", lambda self, step: signal.SIGTERM if step == 2 else 0)
            with pytest.raises(Interrupted):
                train(read_recipe(recipe))
    train(read_recipe(recipe))
    before, after = carved(top_k), router_of(Path("out"))
    a, b, c, d = np.moveaxis(after, -1, 0)
    assert np.abs(after - before)[..., 0].min() > 0
    assert (a == (c if top_k == 2 else -c)).all() and (b == d).all()
    assert (b != before[..., 1]).all() if top_k == 2 else not b.any()
