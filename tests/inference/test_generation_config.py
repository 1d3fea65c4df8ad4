"""generation_config.json, beside what transformers reads from it."""

import json

import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.inference.generation_config import GenerationConfig, read_generation_config
from tests.support.configs import DENSE

LLAMA_3 = {
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
}


def write(directory, values):
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    "values",
    [
        LLAMA_3,
        {"eos_token_id": 2, "repetition_penalty": 1.05, "top_k": 20, "min_p": 0.1, "pad_token_id": 0},
        {"do_sample": True},  # of temperature 1, as nothing else is said
        {"eos_token_id": None, "temperature": None},
    ],
)
def test_values_are_those_of_transformers(tmp_path, values):
    transformers = pytest.importorskip("transformers")
    expected = transformers.GenerationConfig.from_pretrained(write(tmp_path, values))
    ours = read_generation_config(tmp_path)
    ends = expected.eos_token_id
    assert list(ours.end_tokens) == (ends if isinstance(ends, list) else [] if ends is None else [ends])
    for name, value in ours.sampling.items():
        theirs = getattr(expected, name)
        assert value == (1.0 if theirs is None else theirs)
    named = {name for name, value in values.items() if value is not None}
    assert set(ours.sampling) - {"temperature"} == named & {"top_p", "top_k", "min_p", "repetition_penalty"}
    assert ("temperature" in ours.sampling) == ("temperature" in named or "do_sample" in named)


def test_no_file_says_nothing(tmp_path):
    assert read_generation_config(tmp_path) == GenerationConfig()
    assert GenerationConfig().with_end_tokens(DENSE) is DENSE and GenerationConfig().described() == ""


def test_end_tokens_join_those_of_the_model():
    config = GenerationConfig((7, 2)).with_end_tokens(DENSE.replace(eos_token_id=2))
    assert config.eos_token_id == (2, 7)
    assert GenerationConfig((7,)).with_end_tokens(DENSE.replace(eos_token_id=None)).eos_token_id == (7,)


def test_what_is_taken_is_said(tmp_path):
    taken = read_generation_config(write(tmp_path, LLAMA_3))
    assert taken.described() == "generation_config.json: temperature 0.6, top_p 0.9, end tokens 128001, 128009"
    assert taken.described(("temperature", "seed")).startswith("generation_config.json: top_p 0.9, end tokens")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id or a list of them"),
        ({"eos_token_id": [1, -2]}, "eos_token_id: expected a token id or a list of them"),
        ({"temperature": "hot"}, "temperature: expected a number from 0 to 100, got 'hot'"),
        ({"top_p": 2}, "top_p: expected a number from 0 to 1, got 2"),
    ],
)
def test_bad_values_name_the_file(tmp_path, values, message):
    with pytest.raises(UserError, match=message) as caught:
        read_generation_config(write(tmp_path, values))
    assert str(tmp_path / "generation_config.json") in str(caught.value)
