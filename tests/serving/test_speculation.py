"""Guessed tokens change the time that a response takes, and no token of it."""

import jax
import numpy as np
import pytest

from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.kernels.attention.paged import PAGE
from nemoe_jax.serving.engine import runner
from nemoe_jax.serving.engine.engine import Engine
from nemoe_jax.serving.engine.request import Request
from nemoe_jax.serving.engine.speculation import PromptLookup, Speculation
from nemoe_jax.spec import schema
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.configs import DENSE, write_tokenizer

CONFIG = DENSE.replace(layers=1, context=1024)
PROMPT = tuple(np.random.default_rng(0).integers(3, CONFIG.vocab, 20).tolist())


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    write_tokenizer(directory)
    tokenizer = load_tokenizer(directory)
    params = schema.initialize(CONFIG, jax.random.key(0))

    def start(**options):
        return Engine(CONFIG, params, tokenizer, max_num_seqs=2, kv_tokens=8 * PAGE, **options)

    return start


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Whatever the machine is doing: guesses are checked wherever there are some."""
    monkeypatch.setattr(Speculation, "pays", lambda self, size, guesses, seconds: any(guess for _, guess in guesses))
    monkeypatch.setattr(Speculation, "measure", lambda self, size, seconds: None)


@pytest.fixture
def checked(monkeypatch):
    """Of every step with guesses: how many there were, and how many tokens came of it; for each place."""
    steps, decode = [], runner.ModelRunner.decode

    def spy(self, *given, **options):
        block = decode(self, *given, **options)
        if given[-1] is not None:
            steps.extend(zip(given[-1][1].tolist(), block.num_generated_B.tolist(), strict=True))
        return block

    monkeypatch.setattr(runner.ModelRunner, "decode", spy)
    return steps


def ask(engine, *requests):
    with engine._changed:
        answers = [engine.submit(request) for request in requests]
    for answer in answers:
        answer.result(60)
        assert answer.error is None
    return [([one.token for one in answer.tokens], answer.finish_reason, answer.text) for answer in answers]


def test_what_may_come_next():
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 2, 3, 4])
    assert lookup.guess(3) == [5, 9, 2]
    lookup.extend([7, 2, 3, 4])
    assert lookup.guess(5) == [7, 2, 3, 4, 7]  # what came last, and on in circles
    assert PromptLookup([1, 2]).guess(3) == PromptLookup([1, 2, 3, 4]).guess(3) == []
    assert PromptLookup([6] * 4).guess(2) == [6, 6]


@pytest.mark.parametrize("new", [[31], [31, 32], []], ids=["as long", "longer", "shorter"])
def test_a_copy_with_changes_is_followed(new):
    """Records that differ in two tokens each, copied with a third one changed: a wrong guess or two a record."""
    draw = np.random.default_rng(0).integers(100, 400, (40, 2)).tolist()
    records = [[3, 4, 5, name, 6, 7, 30, 8, number, 9, 10, 11] for name, number in draw]
    copy = [token for record in records for token in (*record[:6], *new, *record[7:])]
    lookup = PromptLookup([1, *(token for record in records for token in record), 2, 1])
    checks, at = 0, 0
    while at < len(copy):
        guess = lookup.guess(7)
        right = next(
            (n for n, pair in enumerate(zip(guess, copy[at:], strict=False)) if len(set(pair)) > 1), len(guess)
        )
        lookup.extend(copy[at : at + right + 1])
        checks, at = checks + 1, at + right + 1
    assert checks < 3.2 * len(records)


def test_the_same_tokens_at_any_temperature(start, checked):
    samplings = [SamplingParams(), SamplingParams(repetition_penalty=1.1), SamplingParams(frequency_penalty=0.5)]
    # so that tokens repeat, and are sampled all the same
    samplings += [
        SamplingParams(0.5, logit_bias=tuple((token, 9.0) for token in (10, 11)), seed=seed) for seed in range(6)
    ]
    requests = [Request(PROMPT, 50, sampling, ignore_eos=True) for sampling in samplings]
    with start() as plain, start(prompt_lookup=True) as engine:
        expected = [ask(plain, one)[0] for one in requests]
        assert not checked
        assert [ask(engine, one)[0] for one in requests] == expected
        alone = len(checked)
        assert any(came == guessed + 1 > 2 for guessed, came in checked)  # all right
        assert any(came <= guessed for guessed, came in checked)  # and some wrong
        got = [ask(engine, *pair) for pair in zip(requests[::2], requests[1::2], strict=False)]
        assert [one for pair in got for one in pair] == expected[:8]
        assert len(checked) > alone and max(guessed for guessed, _ in checked[alone:]) <= 15


def test_the_same_end(start, checked):
    """Among many tokens 10 and 11 some tokens 12, which come unforeseen, and end the response in several ways."""
    bias = ((10, 9.0), (11, 9.0), (12, 7.5))
    with start() as plain, start(prompt_lookup=True) as engine:
        for seed in range(3):
            sampling = SamplingParams(0.5, logit_bias=bias, seed=seed)
            for options in ({}, {"stop_tokens": (12,)}, {"stop": (plain.tokenizer.decode([12]).strip(),)}):
                request = Request(PROMPT, 47, sampling, ignore_eos=True, **options)
                assert ask(engine, request) == ask(plain, request)
        two = Request(PROMPT, 2, sampling, ignore_eos=True)
        assert ask(engine, two) == ask(plain, two)
    assert any(came > 1 for _, came in checked) and any(came <= guessed for guessed, came in checked)


@pytest.mark.parametrize("seed", range(2))
def test_wrong_guesses_do_no_harm(start, checked, monkeypatch, seed):
    draw = np.random.default_rng(seed)
    monkeypatch.setattr(PromptLookup, "guess", lambda self, most: draw.integers(0, CONFIG.vocab, most).tolist())
    request = Request(PROMPT, 200, SamplingParams(seed, seed=1), ignore_eos=True)
    then = Request((*PROMPT, *range(3, 60)), 20, ignore_eos=True)
    with start(prefix_cache=False) as plain, start(prompt_lookup=True) as engine:
        expected = ask(plain, request)
        assert ask(engine, request) == expected
        assert sum(came for _, came in checked) < 1.5 * len(checked)
        # and what they left in the cache is overwritten before anybody shares it
        then = Request((*PROMPT, *expected[0][0], 5), 20, ignore_eos=True)
        assert ask(engine, then) == ask(plain, then)
        assert engine.statistics().cached_tokens == len(then.prompt) - 2  # the last that was generated was not read


def test_guessing_ends_where_it_does_not_pay(monkeypatch):
    monkeypatch.undo()
    speculation, lookup = Speculation((1, 2, 4, 8), 8), PromptLookup(range(9))
    assert speculation.width == {1: 8, 2: 4, 4: 2}
    guesses = [(lookup, [1] * 7)]
    assert speculation.pays(1, guesses, 0.01)  # nothing is known yet
    assert not speculation.pays(1, [(lookup, [])], 0.01)
    for _ in range(9):
        speculation.measure(1, 0.03)
    assert speculation.pays(1, guesses, 0.01)  # 8 tokens in the time of three
    for _ in range(9):
        lookup.note(7, 1)
    assert not speculation.pays(1, guesses, 0.01)  # 2 tokens
    lookup.extend([5] * 70)
    assert lookup.accepted >= 2
    for _ in range(9):
        speculation.measure(1, 0.3)
    assert [speculation.pays(1, guesses, 0.01) for _ in range(500)].count(True)  # tried again, in the end


def test_no_guesses_where_steps_are_to_be_the_same(start, checked):
    with start(prompt_lookup=True, deterministic=True) as engine:
        ask(engine, Request(PROMPT, 40, ignore_eos=True))
    assert not checked
