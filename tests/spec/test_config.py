import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import PRESETS, ModelConfig, preset
from tests.support.configs import CONFIGS, DENSE, MIXTRAL


@pytest.mark.parametrize("config", [*PRESETS.values(), *CONFIGS.values()])
def test_config_json_round_trip(config):
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_old_and_new_spelling_of_config_json():
    new = DENSE.to_hf()
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    newest = {key: value for key, value in new.items() if key not in ("rope_theta", "torch_dtype")}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(newest) == DENSE


def test_head_dim_is_taken_from_the_config_and_only_else_derived():
    assert ModelConfig.from_hf(PRESETS["mistral-nemo-12b"].to_hf()).head_dim == 128
    content = {**DENSE.to_hf(), "hidden_size": 60, "head_dim": None}
    assert ModelConfig.from_hf(content).head_dim == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "unknown architecture GPT2LMHeadModel"),
        ({"architectures": None}, "unknown architecture"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"sliding_window": 16}, "sliding_window = 16"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "type yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}, "type linear"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"dtype": "float8"}, "dtype: expected one of"),
        ({"num_key_value_heads": 4}, "kv_heads: expected a divisor of heads = 6, got 4"),
    ],
)
def test_what_would_change_the_logits_unseen_is_refused(change, message):
    with pytest.raises(UserError, match=message) as caught:
        ModelConfig.from_hf({**DENSE.to_hf(), **change}, "some/config.json")
    assert str(caught.value).startswith("some/config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 17}, "top_k: expected 1 to experts = 16, got 17"),
        ({"shared_ffn": 8}, "cannot express a shared expert"),
        ({"dense_layers": 3}, "dense_layers: expected 0 to 2"),
    ],
)
def test_impossible_mixtures_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        MIXTRAL.replace(**change)


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean minitron-8b"):
        preset("minitron-8B")
