"""Adapters that are loaded and unloaded while the engine runs."""

import jax
import pytest

httpx = pytest.importorskip("httpx")

from nemoe_jax.adapters import lora, peft_save
from nemoe_jax.adapters.loaded import AdapterPlaces
from nemoe_jax.errors import UserError
from nemoe_jax.serving.api.api_keys import ApiKey
from nemoe_jax.serving.engine.engine import Engine
from nemoe_jax.serving.engine.request import Request
from tests.support.served_models import CONFIG, adapter, serve, weights, words

PLACES = AdapterPlaces(2, 4, ("blocks/dense/*/*",))
TREES = {name: adapter(seed) for seed, name in enumerate(("red", "blue", "green"), 5)}
PROMPT = tuple(range(5, 205))  # more than a page


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def engine(tokenizer):
    with Engine(CONFIG, weights(), tokenizer, max_num_seqs=2, kv_tokens=2048, adapter_places=PLACES) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    for name in engine.adapters:
        engine.unload_adapter(name)
    assert engine.statistics().running == 0


@pytest.fixture(scope="module")
def expected(tokenizer):
    """The tokens of each adapter by an engine that has them from the start, without places."""
    with Engine(CONFIG, weights(), tokenizer, max_num_seqs=2, adapters=TREES) as engine:
        return {name: tokens_of(ask(engine, name)) for name in (None, *TREES)}


def ask(engine, name, prompt=PROMPT, count=8):
    return engine.submit(Request(prompt, count, adapter=name, ignore_eos=True))


def tokens_of(response):
    response.result(60)
    assert response.error is None
    return [one.token for one in response.tokens]


def test_adapters_come_and_go_and_their_tokens_are_those_of_adapters_from_the_start(engine, expected):
    assert len({*map(tuple, expected.values())}) == 4
    assert tokens_of(ask(engine, None)) == expected[None]
    engine.load_adapter("red", TREES["red"])
    engine.load_adapter("blue", TREES["blue"])
    both = [ask(engine, name) for name in ("red", "blue")]
    assert [tokens_of(one) for one in both] == [expected["red"], expected["blue"]]
    with pytest.raises(UserError, match=r"all 2 places for adapters are taken$"):
        engine.load_adapter("green", TREES["green"])
    engine.unload_adapter("red")
    with pytest.raises(UserError, match="no adapter 'red'; there are: blue"):
        ask(engine, "red")
    engine.load_adapter("green", TREES["green"])
    assert engine.adapters == ("blue", "green")
    assert [tokens_of(ask(engine, name)) for name in ("blue", "green", None)] == [
        expected[name] for name in ("blue", "green", None)
    ]


def test_pages_belong_to_what_an_adapter_holds_and_not_to_its_name_or_place(engine):
    other = PROMPT[::-1]  # of which no page is there
    engine.load_adapter("x", TREES["red"])
    red = tokens_of(ask(engine, "x", other))
    engine.unload_adapter("x")
    engine.load_adapter("x", TREES["blue"])  # another one by the same name, in the same place
    response = ask(engine, "x", other)
    assert tokens_of(response) != red and response.cached_tokens == 0
    engine.load_adapter("y", TREES["red"])
    again = ask(engine, "y", other)
    assert (tokens_of(again), again.cached_tokens) == (red, len(other) - 1)


def test_requests_of_an_adapter_that_is_unloaded_end_properly(engine, expected):
    engine.load_adapter("red", TREES["red"])
    engine.load_adapter("blue", TREES["blue"])
    long = [ask(engine, "red", count=120) for _ in range(3)]  # one of them waits for a slot
    next(iter(long[0]))
    engine.unload_adapter("red")
    with pytest.raises(UserError, match="taken, 1 of them by adapters that are unloaded and still used"):
        engine.load_adapter("green", TREES["green"])
    for one in long:
        assert tokens_of(one)[:8] == expected["red"] and len(one.tokens) == 120
    engine.load_adapter("green", TREES["green"])
    assert tokens_of(ask(engine, "green")) == expected["green"]


def test_what_does_not_fit_is_refused_and_changes_nothing(engine, expected):
    engine.load_adapter("red", TREES["red"])
    big = lora.initialize(CONFIG, [lora.Target("blocks/dense/*/*", 5, 1)], jax.random.key(0))
    head = lora.initialize(CONFIG, [lora.Target("head", 2, 1)], jax.random.key(0))
    for name, tree, message in (
        ("red", TREES["blue"], "'red' is loaded already"),
        ("big", big, "blocks/dense/attn/q: expected a rank of at most 4, got 5"),
        ("head", head, "head: there is no room for an adapter of it; there is for blocks/dense/attn/q"),
        ("odd", {"blocks": {"other": next(iter(TREES["red"].values()))}}, "no such linear map"),
    ):
        with pytest.raises(UserError, match=message):
            engine.load_adapter(name, tree)
    with pytest.raises(UserError, match="no adapter 'blue'"):
        engine.unload_adapter("blue")
    assert engine.adapters == ("red",) and tokens_of(ask(engine, "red")) == expected["red"]


def test_engines_with_fixed_adapters_and_bad_places(tokenizer):
    for places, message in ((AdapterPlaces(0), "adapters at a time: expected a posi"), (AdapterPlaces(1, 0), "rank")):
        with pytest.raises(UserError, match=message):
            Engine(CONFIG, weights(), tokenizer, max_num_seqs=2, kv_tokens=128, adapter_places=places)
    with pytest.raises(UserError, match="matches no weight"):
        Engine(CONFIG, weights(), tokenizer, kv_tokens=128, adapter_places=AdapterPlaces(targets=("nothing",)))
    with pytest.raises(UserError, match="all 1 places"):
        Engine(CONFIG, weights(), tokenizer, kv_tokens=128, adapters=TREES, adapter_places=AdapterPlaces(1, 4))
    with Engine(CONFIG, weights(), tokenizer, max_num_seqs=2, kv_tokens=128) as fixed:
        with pytest.raises(UserError, match="cannot be loaded"):
            fixed.load_adapter("red", TREES["red"])
        with pytest.raises(UserError, match="cannot be unloaded"):
            fixed.unload_adapter("red")


KEYS = ["may", ApiKey(name="ops", key="ops", adapters=True), ApiKey(name="search", key="search")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    outer = tmp_path_factory.mktemp("models")
    for place in ("adapters/red", "adapters/blue", "secret"):
        name = place.rpartition("/")[2]
        peft_save.save_adapters(outer / place, CONFIG, TREES.get(name, TREES["green"]), base_model="nano")
    root = outer / "adapters"
    (root / "linked").symlink_to(root / "red")
    (root / "out").symlink_to(outer / "secret")
    (root / "mixed").mkdir()
    (root / "mixed/adapter_config.json").symlink_to(root / "red/adapter_config.json")
    (root / "mixed/adapter_model.safetensors").symlink_to(outer / "secret/adapter_model.safetensors")
    (root / "circle").symlink_to(root / "circle")
    (root / "empty").mkdir()
    return root


def post(address, path, body, key="ops"):
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{address}{path}", json=body, headers=headers, trust_env=False, timeout=60)


def test_over_http_as_in_vllm(engine, tokenizer, folder):
    with serve(engine, tokenizer, folder, api_key=KEYS) as address:

        def load(name, path, key="ops", **more):
            return post(address, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more}, key)

        def refused(response, status, message):
            assert response.status_code == status and message in response.json()["error"]["message"], response.text

        done = load("red", "red")
        assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'red' added successfully.")
        asked = {"model": "red", "prompt": [*PROMPT], "max_tokens": 4, "temperature": 0}
        text = post(address, "/v1/completions", asked).json()["choices"][0]["text"]
        models = httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer may"}, trust_env=False).json()
        assert [one["id"] for one in models["data"]] == ["nano", "red"]
        refused(load("red", "blue"), 400, "the name 'red' is taken")
        refused(load("nano", "blue"), 400, "the name 'nano' is taken")
        refused(load("blue", "blue", "search"), 403, "may not load or unload adapters")
        outside = "expected a directory in the server's adapter folder"
        for path in ("../secret", str(folder.parent / "secret"), "out", ".", "circle", "x\0y", "x" * 5000, "/etc"):
            refused(load("blue", path), 400, outside)
        refused(load("blue", "mixed"), 400, "adapter_model.safetensors leads out of")
        refused(load("blue", "empty"), 400, "adapter_config.json")
        refused(load("blue", "nowhere"), 400, outside)
        refused(load("", "red"), 400, "lora_name")
        assert load("linked", str(folder / "linked"), "may").status_code == 200
        refused(load("blue", "blue"), 400, "all 2 places for adapters are taken")
        asked["model"] = "linked"
        assert post(address, "/v1/completions", asked).json()["choices"][0]["text"] == text
        done = post(address, "/v1/unload_lora_adapter", {"lora_name": "linked"})
        assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'linked' removed successfully.")
        refused(post(address, "/v1/unload_lora_adapter", {"lora_name": "linked"}), 404, "no adapter 'linked' is loaded")
        refused(post(address, "/v1/unload_lora_adapter", {"lora_name": "red"}, "search"), 403, "may not load")
        refused(post(address, "/v1/completions", asked), 404, "no model 'linked'")
        assert load("red", "blue", load_inplace=True).status_code == 200
        asked["model"] = "red"
        assert post(address, "/v1/completions", asked).json()["choices"][0]["text"] != text
        schema = httpx.get(f"{address}/openapi.json", headers={"Authorization": "Bearer may"}, trust_env=False).json()
        assert "/v1/load_lora_adapter" in schema["paths"]
        assert "enum" not in schema["components"]["schemas"]["ChatRequest"]["properties"]["model"]


def test_without_a_folder_nothing_is_loaded(engine, tokenizer):
    with serve(engine, tokenizer) as address:
        answer = post(address, "/v1/load_lora_adapter", {"lora_name": "red", "lora_path": "red"})
        assert answer.status_code == 404 and "--adapter-folder" in answer.json()["error"]["message"]
        answer = post(address, "/v1/unload_lora_adapter", {"lora_name": "red"})
        assert answer.status_code == 404
        schema = httpx.get(f"{address}/openapi.json", trust_env=False).json()
        assert "/v1/load_lora_adapter" not in schema["paths"]
