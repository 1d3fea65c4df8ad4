import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import PRESETS, preset
from nemoe_jax.spec.hf_config import from_hf, to_hf
from tests.support.configs import CONFIGS, DENSE, MIXTRAL

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}


@pytest.mark.parametrize("config", [*PRESETS.values(), *CONFIGS.values()])
def test_config_json_round_trip(config):
    assert from_hf(to_hf(config)) == config


def test_old_and_new_spelling_of_config_json():
    new = to_hf(DENSE)
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    newest = {key: value for key, value in new.items() if key not in ("rope_theta", "torch_dtype")}
    assert from_hf(old) == from_hf(newest) == DENSE


def test_head_dim_is_taken_from_the_config_and_only_else_derived():
    assert from_hf(to_hf(PRESETS["mistral-nemo-12b"])).head_dim == 128
    content = {**to_hf(DENSE), "hidden_size": 60, "head_dim": None}
    assert from_hf(content).head_dim == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "unknown architecture GPT2LMHeadModel"),
        ({"architectures": None, "model_type": None}, "unknown architecture"),
        ({"architectures": None, "model_type": "gpt2"}, "unknown architecture of model_type gpt2"),
        ({"architectures": ["MistralForSequenceClassification"]}, "unknown architecture MistralForSeq"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"sliding_window": 0}, "sliding_window: expected a positive number, got 0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "type yarn: factor is missing"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "type linear: factor is missing"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": None}}, "type dynamic: factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "RoPE: factor: expected a finite number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor: expected a positive number, got 0"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "type llama3: low_freq_factor is missing"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": None}}, "high_freq_factor is missing"),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": None}}, "original_max_position_embeddings"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor < high_freq_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2}}, "type longrope: expected one of"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"dtype": "float8"}, "dtype: expected one of"),
        ({"num_key_value_heads": 4}, "kv_heads: expected a divisor of heads = 6, got 4"),
    ],
)
def test_what_would_change_the_logits_unseen_is_refused(change, message):
    with pytest.raises(UserError, match=message) as caught:
        from_hf({**to_hf(DENSE), **change}, "some/config.json")
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
