"""The families' records against the config classes of transformers."""

import json
import typing

import pytest
import transformers

from nemoe_jax.errors import UserError
from nemoe_jax.spec.families import FAMILIES, FamilyName
from nemoe_jax.spec.hf_config import from_hf, to_hf
from tests.support.families import SIZES, config_class

KNOWN = [family for family in FAMILIES.values() if family.in_transformers]
# what a file always says
MINIMAL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 32, "vocab_size": 72, "head_dim": 4}
MINIMAL |= {"intermediate_size": 48}


def test_every_record_has_its_name():
    assert set(typing.get_args(FamilyName)) == FAMILIES.keys()
    architectures = [name for family in FAMILIES.values() for name in (family.architecture, *family.wrappers)]
    assert len(set(architectures)) == len(architectures)


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_defaults_are_those_of_transformers(family):
    fresh = config_class(family.name)()
    assert fresh.model_type == family.name
    assert hasattr(transformers, family.architecture)
    expected = fresh.to_dict() | {"rope_theta": fresh.rope_parameters["rope_theta"]}
    if family.window_switch:  # the class forgets the window that its switch turns off
        expected["sliding_window"] = type(fresh)(use_sliding_window=True).sliding_window
    # what the classes themselves fill in where a file leaves it out
    derived = {"num_key_value_heads": fresh.num_attention_heads, "head_dim": expected.get("head_dim")}
    for key, value in family.defaults.items():
        assert expected.get(key, getattr(fresh, key, None)) == (derived.get(key) if value is None else value), key


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_keys_that_are_left_out_mean_what_they_mean_to_transformers(family):
    filled = json.loads(config_class(family.name)(**MINIMAL).to_json_string())
    expected = from_hf(filled | {"architectures": [family.architecture], "dtype": "float32"})
    assert from_hf({**MINIMAL, "architectures": [family.architecture]}) == expected
    assert from_hf({**MINIMAL, "model_type": family.name}) == expected  # without `architectures`


@pytest.mark.parametrize("family", KNOWN, ids=lambda family: family.name)
def test_what_is_written_means_the_same_to_transformers(family):
    config = from_hf(json.loads(config_class(family.name)(**SIZES[family.name]).to_json_string()))
    content = to_hf(config)
    assert from_hf(content) == config
    again = config_class(family.name)(**content)
    assert from_hf(json.loads(again.to_json_string()) | {"architectures": [family.architecture]}) == config


def test_null_key_value_heads_are_as_many_as_heads():
    content = {**MINIMAL, "model_type": "mistral"}
    assert from_hf(content).kv_heads == 8
    assert from_hf({**content, "num_key_value_heads": None}).kv_heads == 32
    assert from_hf(content).sliding_window == 4096
    assert from_hf({**content, "sliding_window": None}).sliding_window is None


def test_experts_are_counted_under_either_name():
    content = to_hf(
        from_hf(
            {
                **MINIMAL,
                "num_key_value_heads": None,
                "model_type": "qwen3_moe",
                "num_experts": 6,
                "num_experts_per_tok": 2,
            }
        )
    )
    assert content["num_experts"] == content["num_local_experts"] == 6
    for name in ("num_experts", "num_local_experts"):
        alone = {key: value for key, value in content.items() if key != name}
        assert from_hf(alone).experts == 6
    with pytest.raises(UserError, match="expected one number of experts"):
        from_hf(content | {"num_experts": 5})


def test_a_text_model_within_others_is_read():
    text = {**MINIMAL, "model_type": "mistral", "sliding_window": None, "rope_theta": 1e9}
    content = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    config = from_hf(content | {"dtype": "bfloat16"})
    assert (config.family, config.rope_theta, config.dtype) == ("mistral", 1e9, "bfloat16")
    with pytest.raises(UserError, match="unknown architecture of model_type ministral3"):
        from_hf({**content, "text_config": text | {"model_type": "ministral3"}})


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_a_window_in_some_layers_alone_is_refused(name):
    content = {**MINIMAL, "model_type": name, "use_sliding_window": True, "sliding_window": 16}
    assert from_hf({**content, "max_window_layers": 0}).sliding_window == 16
    assert from_hf(content).sliding_window is None  # 28 layers see everything
    with pytest.raises(UserError, match="sliding_window = 16 in 1 of 2 layers"):
        from_hf({**content, "max_window_layers": 1})
