import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from jax.sharding import NamedSharding, PartitionSpec
from transformers.generation import logits_process

from nemoe_jax.errors import UserError
from nemoe_jax.inference import sampler
from nemoe_jax.inference.sampler import TokenCounts, controls, sample, scores, specialized
from nemoe_jax.inference.sampling import PRESETS, SamplingParams
from nemoe_jax.spec.mesh import make_mesh

VOCAB, PROMPT, ANSWER = 1201, 40, 25  # three blocks of the draw, the last of them not full
WISHES = [
    SamplingParams(1.0),
    SamplingParams(1.7, repetition_penalty=1.3),
    SamplingParams(0.7, top_k=5),
    SamplingParams(1.2, top_p=0.7, repetition_penalty=0.8),
    PRESETS["creative"],
    SamplingParams(1.5, top_k=200, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
    SamplingParams(0.3, top_k=VOCAB + 3, top_p=0.999),
    SamplingParams(),
]
ROWS = len(WISHES)


@pytest.fixture(scope="module")
def given():
    """Logits (B, V), prompts (B, T) and answers (B, T): numbers drawn again and again, as in texts."""
    random = np.random.default_rng(0)
    tokens_BT = random.integers(VOCAB, size=(ROWS, PROMPT + ANSWER)) % random.integers(1, VOCAB, (ROWS, 1))
    logits_BV = (3 * random.standard_normal((ROWS, VOCAB))).astype(np.float32)
    return logits_BV, tokens_BT[:, :PROMPT], tokens_BT[:, PROMPT:]


@pytest.fixture(scope="module")
def counts(given):
    _, prompt_BT, answer_BT = given
    counts = TokenCounts.empty(ROWS, VOCAB).add_prompt(prompt_BT, jnp.full(ROWS, PROMPT))
    add = jax.jit(TokenCounts.add)
    for token_B in answer_BT.T:
        counts = add(counts, jnp.asarray(token_B), jnp.ones(ROWS, bool))
    return counts


STEPS = jnp.zeros(ROWS, jnp.int32)
jit_choose = jax.jit(sample)
jit_adjusted = jax.jit(sampler.adjusted)
jit_weights = jax.jit(sampler.weights)


def by_transformers(sampling, logits_V, tokens_T):
    """One row's logits behind the processors that transformers' `generate` makes, in its order."""
    processors = [logits_process.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))]
    if sampling.temperature:
        processors.append(logits_process.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(logits_process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(logits_process.MinPLogitsWarper(sampling.min_p))
    scores_1V = torch.tensor(logits_V)[None]
    for processor in processors:
        scores_1V = processor(torch.tensor(tokens_T)[None], scores_1V)
    return scores_1V[0]


def test_what_remains_is_what_transformers_leaves_and_as_likely(given, counts):
    logits_BV, prompt_BT, answer_BT = given
    inputs = controls(WISHES, VOCAB)
    weight_BV = np.asarray(jit_weights(jit_adjusted(logits_BV, inputs, counts), inputs), np.float64)
    for sampling, logits_V, tokens_T, weight_V in zip(
        WISHES, logits_BV, np.concatenate([prompt_BT, answer_BT], axis=1), weight_BV, strict=True
    ):
        wanted_V = by_transformers(sampling, logits_V, tokens_T)
        np.testing.assert_array_equal(weight_V > 0, torch.isfinite(wanted_V).numpy(), err_msg=str(sampling))
        np.testing.assert_allclose(weight_V / weight_V.sum(), wanted_V.double().softmax(-1), rtol=2e-5, atol=1e-12)


def test_penalties_and_bias_are_openais(given, counts):
    logits_BV, _, answer_BT = given
    bias = ((3, 5.0), (VOCAB - 1, -100.0), (3, 0.5))
    penalties = [(0.5, 0.0), (0.0, 0.25), (-2.0, 1.5), (0.0, 0.0)] * 2
    samplings = [
        SamplingParams(presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias if row % 2 else ())
        for row, (presence, frequency) in enumerate(penalties)
    ]
    wanted_BV = logits_BV.astype(np.float64)
    for row, (presence, frequency) in enumerate(penalties):
        often_V = np.bincount(answer_BT[row], minlength=VOCAB)  # the prompt does not count
        wanted_BV[row] -= presence * (often_V > 0) + frequency * often_V
        if row % 2:
            wanted_BV[row, 3] += 5.5
            wanted_BV[row, VOCAB - 1] -= 100
    got_BV = np.asarray(jit_adjusted(logits_BV, controls(samplings, VOCAB), counts))
    np.testing.assert_allclose(got_BV, wanted_BV, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(jit_choose(logits_BV, controls(samplings, VOCAB), counts, STEPS), wanted_BV.argmax(1))


def test_bias_is_refused_outside_of_the_vocabulary():
    with pytest.raises(UserError, match=r"^logit_bias: expected tokens from 0 to 1200, got 1201"):
        controls([SamplingParams(), SamplingParams(logit_bias=((VOCAB, 1.0),))], VOCAB)


def test_only_what_a_constraint_allows(given, counts):
    logits_BV, _, _ = given
    allowed_BV = np.random.default_rng(1).random((ROWS, VOCAB)) < 0.01
    allowed_BV[1] = False
    padded_BV = np.pad(allowed_BV, ((0, 0), (0, -VOCAB % 32)))
    allowed_BW = np.packbits(padded_BV, axis=1, bitorder="little").view("<u4")
    got_B = np.asarray(jit_choose(logits_BV, controls(WISHES, VOCAB), counts, STEPS, allowed_BW))
    assert got_B[1] == -1  # nothing is allowed
    others = np.delete(np.arange(ROWS), 1)
    assert allowed_BV[others, got_B[others]].all()
    assert got_B[-1] == np.where(allowed_BV[-1], logits_BV[-1], -np.inf).argmax()


def test_rows_without_a_token_are_never_chosen(given, counts):
    """As transformers' processors would have it after `suppress_tokens`."""
    logits_BV, prompt_BT, answer_BT = given
    known_V = np.arange(VOCAB) < VOCAB - 5
    known_V[logits_BV[0].argmax()] = False
    inputs = controls(WISHES, VOCAB, known_V)
    weight_BV = np.asarray(jit_weights(jit_adjusted(logits_BV, inputs, counts), inputs))
    got_B = np.asarray(jit_choose(logits_BV, inputs, counts, STEPS))
    for sampling, logits_V, tokens_T, weight_V, got in zip(
        WISHES, logits_BV, np.concatenate([prompt_BT, answer_BT], axis=1), weight_BV, got_B, strict=True
    ):
        expected_V = by_transformers(sampling, np.where(known_V, logits_V, -np.inf), tokens_T)
        np.testing.assert_array_equal(weight_V > 0, torch.isfinite(expected_V).numpy(), err_msg=str(sampling))
        assert known_V[got] and weight_V[got] > 0


def test_logits_that_are_no_numbers_show(given, counts):
    logits_BV = given[0].copy()
    logits_BV[[0, 4, 7], [5, 1200, 600]] = np.nan
    logits_BV[2] = -np.inf
    logits_BV[3, 9] = np.inf
    logits_BV[5, 1:] = -np.inf  # one token alone is as good as any number of them
    got_B = np.asarray(jit_choose(logits_BV, controls(WISHES, VOCAB), counts, STEPS))
    np.testing.assert_array_equal(got_B == -1, [True, False, True, True, True, False, False, True])
    assert got_B[5] == 0


def test_draws_come_as_often_as_they_are_likely():
    """Of 24000 draws; each token of a row has its share by the chi-squared test, and rows with other seeds differ."""
    random = np.random.default_rng(3)
    logits_V = (3 * random.standard_normal(VOCAB)).astype(np.float32)
    sampling = SamplingParams(1.3, top_p=0.95)
    seeds = [0, 1, 2**32, 2**32 + 1, -1, 2**64 - 2, 12345678901, 7]  # their upper halves count, too
    inputs = controls([SamplingParams(1.3, top_p=0.95, seed=seed) for seed in seeds], VOCAB)
    logits_BV = jnp.tile(logits_V, (ROWS, 1))

    @jax.jit
    def draws(steps_S):
        weight_BV = sampler.weights(logits_BV, inputs)
        return jax.lax.map(lambda step: sampler.draw(weight_BV, inputs, jnp.full(ROWS, step)), steps_S)

    token_SB = np.asarray(draws(jnp.arange(3000)))
    probabilities_V = by_transformers(sampling, logits_V, [0]).double().softmax(-1).numpy()
    often_V = np.bincount(token_SB.ravel(), minlength=VOCAB)
    assert not often_V[probabilities_V == 0].any()
    expected_V = token_SB.size * probabilities_V
    common_V = expected_V >= 8
    observed = [*often_V[common_V], often_V[~common_V].sum()]
    expected = [*expected_V[common_V], expected_V[~common_V].sum()]
    assert common_V.sum() > 50
    assert scipy.stats.chisquare(observed, expected).pvalue > 0.01
    # two rows agree as often as chance has it, and so do a row's neighboring steps
    chance = (probabilities_V**2).sum()
    agreements = [(token_SB[:, one] == token_SB[:, other]).mean() for one in range(ROWS) for other in range(one)]
    agreements.append((token_SB[1:] == token_SB[:-1]).mean())
    np.testing.assert_allclose(agreements, chance, atol=5 * np.sqrt(chance / 3000))


def test_a_row_is_the_same_wherever_it_stands(given, counts):
    logits_BV, _, _ = given
    samplings = [PRESETS["creative"], *WISHES[1:]]
    step_B = jnp.arange(ROWS) * 3
    got_B = np.asarray(jit_choose(logits_BV, controls(samplings, VOCAB), counts, step_B))
    order = np.random.default_rng(2).permutation(ROWS)
    moved = TokenCounts(counts.prompt_BV[order], counts.answer_BV[order])
    moved_B = jit_choose(logits_BV[order], controls([samplings[row] for row in order], VOCAB), moved, step_B[order])
    np.testing.assert_array_equal(moved_B, got_B[order])
    for row in range(ROWS):
        alone = TokenCounts(counts.prompt_BV[row : row + 1], counts.answer_BV[row : row + 1])
        inputs = controls([samplings[row]], VOCAB)
        assert jit_choose(logits_BV[row : row + 1], inputs, alone, step_B[row : row + 1]).tolist() == [got_B[row]]


def test_another_step_or_seed_draws_anew(given):
    logits_BV = jnp.tile(given[0][0], (ROWS, 1))
    inputs = controls([SamplingParams(5.0, seed=9)] * ROWS, VOCAB)
    step_B = jnp.array([0, 0, 1, 2, 3, 4, 5, 6])
    drawn = np.asarray(jit_choose(logits_BV, inputs, None, step_B))
    assert drawn[0] == drawn[1] and len(set(drawn.tolist())) == ROWS - 1


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(2.0, top_k=1),
        SamplingParams(2.0, top_p=0.0),
        SamplingParams(2.0, min_p=1.0),
        SamplingParams(1e-30),
    ],
)
def test_ways_to_say_greedy(given, sampling):
    got_B = jit_choose(given[0], controls([sampling] * ROWS, VOCAB), None, STEPS)
    np.testing.assert_array_equal(got_B, given[0].argmax(1))


def test_tokens_of_equal_logits_stay_or_go_together():
    logits_BV = np.zeros((ROWS, VOCAB), np.float32)
    logits_BV[:, [2, 700, 1200]] = 5.0
    logits_BV[:, 1] = 6.0
    samplings = [
        SamplingParams(1.0, top_k=2),
        SamplingParams(1.0, top_p=0.4),
        SamplingParams(1.0, min_p=0.3),
        SamplingParams(1.0, top_k=1),
    ] * 2
    weight_BV = np.asarray(jit_weights(logits_BV, controls(samplings, VOCAB)))
    four, one = [1, 2, 700, 1200], [1]
    assert [np.flatnonzero(row).tolist() for row in weight_BV] == [four, four, four, one] * 2


def test_nothing_is_sorted(given, counts):
    text = jit_choose.lower(given[0], controls(WISHES, VOCAB), counts, STEPS).as_text()
    assert "stablehlo.while" in text and "stablehlo.sort" not in text and "top_k" not in text


def test_over_a_mesh_as_on_one_device(given, counts):
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    logits_BV = given[0][:, : VOCAB // 4 * 4]
    fewer = TokenCounts(*(array_BV[:, : VOCAB // 4 * 4] for array_BV in counts))
    inputs = controls(WISHES, VOCAB // 4 * 4)
    alone_B = jit_choose(logits_BV, inputs, fewer, STEPS)
    cut = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        spread_B = jit_choose(jax.device_put(logits_BV, cut), inputs, jax.device_put(fewer, cut), STEPS)
    np.testing.assert_array_equal(spread_B, alone_B)


def test_counts_hold_prompts_in_chunks_and_answers():
    counts = TokenCounts.empty(2, 10)
    counts = counts.add_prompt(jnp.array([[1, 2, 2], [3, 4, 5]]), jnp.array([3, 1]))
    counts = counts.add_prompt(jnp.array([[6, 0, 0], [0, 0, 0]]), jnp.array([1, 0]))
    for token_B in ([7, 7], [7, 7], [8, -1]):
        counts = counts.add(jnp.array(token_B), jnp.array([True, token_B[0] == 8]))
    assert [np.flatnonzero(row).tolist() for row in counts.prompt_BV] == [[1, 2, 6], [3]]
    assert counts.answer_BV.tolist() == [[0] * 7 + [2, 1, 0], [0] * 10]
    fresh = counts.forget(jnp.array([True, False]))
    assert (
        not fresh.prompt_BV[0].any()
        and not fresh.answer_BV[0].any()
        and fresh.prompt_BV[1].tolist() == [token == 3 for token in range(10)]
    )


def test_counts_end_at_their_largest_number():
    most = jnp.iinfo(jnp.uint16).max
    full = TokenCounts.empty(1, 4)._replace(answer_BV=jnp.full((1, 4), most, jnp.uint16))
    assert full.add(jnp.array([2]), jnp.array([True])).answer_BV.tolist() == [[most] * 4]


@pytest.mark.parametrize("top", [0, 5])
def test_log_probabilities_are_the_models_own(given, top):
    logits_BV, _, answer_BT = given
    wanted_BV = scipy.special.log_softmax(logits_BV.astype(np.float64), axis=1)
    token_B = answer_BT[:, 0]
    logprob_B, token_BN, logprob_BN = jax.jit(scores, static_argnums=2)(logits_BV, token_B, top)
    rows_B1 = np.arange(ROWS)[:, None]
    np.testing.assert_allclose(logprob_B, wanted_BV[rows_B1[:, 0], token_B], rtol=1e-5)
    np.testing.assert_array_equal(token_BN, (-wanted_BV).argsort(axis=1)[:, :top])
    np.testing.assert_allclose(logprob_BN, wanted_BV[rows_B1, token_BN], rtol=1e-5)


@pytest.mark.parametrize(
    ("samplings", "kept"),
    [
        ([SamplingParams()] * ROWS, set()),
        ([SamplingParams(seed=3), SamplingParams(0.7, top_k=9, top_p=0.8, min_p=0.01, seed=5)] * ROWS, {"seed_B2"}),
        ([SamplingParams(1.0, presence_penalty=0.5)] * ROWS, {"seed_B2", "presence_B", "bias_BN"}),
        ([SamplingParams(logit_bias=((3, 5.0),))] * ROWS, {"seed_B2", "presence_B", "bias_BN"}),
    ],
)
def test_a_program_of_what_is_used_alone_samples_the_same(given, counts, samplings, kept):
    samplings = samplings[:ROWS]
    full = controls(samplings, VOCAB)
    small = specialized(full)
    assert {name for name in ("seed_B2", "presence_B", "bias_BN") if getattr(small, name) is not None} == kept
    needed = counts if "presence_B" in kept else None
    expected_B = jit_choose(given[0], full, counts, STEPS)
    np.testing.assert_array_equal(jit_choose(given[0], small, needed, STEPS), expected_B)
