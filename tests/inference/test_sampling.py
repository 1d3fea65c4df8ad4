import dataclasses
import math

import numpy as np
import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.inference.sampling import MAX_BIASES, PRESETS, SamplingParams


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [0, 2.5, np.float32(0.5), 1e-30]),
        ("top_k", [0, 1, 2**31 - 1, np.int64(7)]),
        ("top_p", [0, 0.5, 1]),
        ("min_p", [0.0, 1.0]),
        ("repetition_penalty", [0.01, 1, 1.2]),
        ("presence_penalty", [-2, 2.0]),
        ("frequency_penalty", [-2.0, 2]),
        ("logit_bias", [(), ((0, -100), (5, 100.0)), ((3, 1.0),) * MAX_BIASES]),
        ("seed", [-(2**63), 2**64 - 1]),
    ],
)
def test_takes_what_makes_sense(field, values):
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "expected", "values"),
    [
        ("temperature", "a number from 0 to 100", [-0.1, 101, math.nan, math.inf, True, "0.5", None, 1j, [1]]),
        ("top_k", "a whole number, 0 (all) or more", [-1, 2**31, 1.0, math.nan, False, "3"]),
        ("top_p", "a number from 0 to 1", [-0.1, 1.1, math.nan, True]),
        ("min_p", "a number from 0 to 1", [-0.1, 1.1, math.nan, True]),
        ("repetition_penalty", "a number from 0.01 to 100", [0, -1, math.inf, True, 1e-300]),
        ("presence_penalty", "a number from -2 to 2", [-2.1, 2.1, math.nan, True]),
        ("frequency_penalty", "a number from -2 to 2", [-2.1, 2.1, math.nan, True]),
        (
            "logit_bias",
            "up to 300 pairs of a token id and a number from -100 to 100",
            [
                ((3, 100.5),),
                ((3, math.nan),),
                ((3, True),),
                ((-1, 1.0),),
                ((3.0, 1.0),),
                ((True, 1.0),),
                ((3,),),
                (3, 1.0),
                [(3, 1.0)],
                {3: 1.0},
                None,
                ((3, 1.0),) * (MAX_BIASES + 1),
            ],
        ),
        ("seed", "a whole number of 64 bits", [-(2**63) - 1, 2**64, 0.5, True, None]),
    ],
)
def test_refuses_the_rest_by_name(field, expected, values):
    for value in values:
        with pytest.raises(UserError) as raised:
            SamplingParams(**{field: value})
        message = str(raised.value)
        assert message.startswith(f"{field}: expected {expected}, got {repr(value)[:60]}")
        assert len(message) < 200


def test_names_every_wrong_field():
    with pytest.raises(UserError, match=r"^temperature: .*; top_k: .*; min_p: .*, got nan$"):
        SamplingParams(temperature=-1, top_k=-1, min_p=math.nan)


def test_biases_are_checked_against_the_vocabulary():
    sampling = SamplingParams(logit_bias=((0, 1.0), (71, 1.0), (72, 1.0)))
    sampling.check(73)
    with pytest.raises(UserError, match=r"^logit_bias: expected tokens from 0 to 71, got 72$"):
        sampling.check(72)


def test_presets_lie_within_what_the_model_cards_give():
    ranges = {"factual": (0.3, 0.5, 1.15, 1.15), "roleplay": (0.5, 0.7, 1.15, 1.18), "creative": (0.7, 0.9, 1.18, 1.18)}
    assert PRESETS["nemo"] == SamplingParams(temperature=0.3)
    assert set(PRESETS) == {"nemo", *ranges}
    for name, (coldest, warmest, least, most) in ranges.items():
        preset = PRESETS[name]
        assert coldest <= preset.temperature <= warmest and least <= preset.repetition_penalty <= most
        assert preset.min_p == 0.1
        assert dataclasses.replace(preset, temperature=0.0, min_p=0.0, repetition_penalty=1.0) == SamplingParams()
