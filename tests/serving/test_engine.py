import dataclasses
import random
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.adapters import lora
from nemoe_jax.errors import UserError
from nemoe_jax.inference.generate import generate
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.kernels.attention.paged import PAGE
from nemoe_jax.serving.engine import device, runner, scheduler
from nemoe_jax.serving.engine.engine import Busy, Closed, Engine
from nemoe_jax.serving.engine.page_allocator import PageAllocator
from nemoe_jax.serving.engine.request import Request, ScoredToken
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.mesh import make_mesh
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.compiled import forward, normal
from tests.support.configs import MIXTRAL, write_tokenizer

CONFIG = MIXTRAL.replace(context=640, layers=2)
PAGES = 6
WORDS = ((0, -100.0), (1, -100.0), (2, -100.0))  # a bias against the control tokens


@pytest.fixture(scope="module")
def params():
    return schema.initialize(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    write_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def engine(params, tokenizer):
    """Four rows, and pages for fewer; every test leaves it as it was."""
    with Engine(CONFIG, params, tokenizer, max_num_seqs=4, kv_tokens=PAGES * PAGE, max_queued=100) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    now = engine.statistics()
    assert (now.running, now.waiting, now.free_tokens) == (0, 0, now.tokens)
    pool = engine._slots.pools[0]
    assert sorted([*pool._free, *pool._unused]) == list(range(1, PAGES + 1)) and not pool._users


def prompt(seed, length):
    return tuple(np.random.default_rng(seed).integers(3, CONFIG.vocab, length).tolist())


def tokens_of(answer):
    answer.result(60)
    return [token.token for token in answer.tokens]


def test_answers_equal_those_of_generate(engine, params):
    for length in (1, 33, 300):
        expected = [int(token) for (token,) in generate(CONFIG, params, [prompt(0, length)], 9, stop=[2])]
        assert tokens_of(engine.submit(Request(prompt(0, length), 9))) == expected


def test_whatever_joins_and_leaves_an_answer_is_that_of_the_request_alone(engine):
    """More than there are rows and pages for, from several threads, greedy and sampled ones, some of them cancelled."""
    lengths = (1, 2, 30, 33, 130, 400)
    requests = [
        Request(
            prompt(seed, lengths[seed % 6]),
            3 + 5 * seed % 40,
            SamplingParams(temperature=seed % 2, top_p=0.9, repetition_penalty=1.1 + seed % 2, seed=seed),
            top_logprobs=2 if seed % 5 == 0 else None,
        )
        for seed in range(18)
    ]
    alone = [tokens_of(engine.submit(request)) for request in requests]
    assert len({tuple(tokens) for tokens in alone}) == len(requests)
    answers, cancelled = {}, {3, 8, 13}

    def ask(numbers):
        for number in numbers:
            answers[number] = engine.submit(requests[number])
            if number in cancelled:
                answers[number].cancel()

    order = random.Random(1).sample(range(18), 18)
    threads = [threading.Thread(target=ask, args=(order[first::3],)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, request in enumerate(requests):
        got = tokens_of(answers[number])
        assert got == alone[number][: len(got)]
        if number not in cancelled:
            assert got == alone[number] and answers[number].finish_reason == ("stop" if got[-1] == 2 else "length")
            assert len(got) == request.max_new_tokens or got[-1] == 2
        else:
            assert answers[number].finish_reason == "cancelled"


def test_a_step_takes_as_many_slots_as_are_at_work(engine, monkeypatch):
    """As others leave, a slot changes its place in the batch; its penalties go along."""
    samplings = [SamplingParams(seed % 2, repetition_penalty=1.3) for seed in range(3)]
    requests = [
        Request(prompt(seed, 9), 10 + 30 * seed, sampling, ignore_eos=True) for seed, sampling in enumerate(samplings)
    ]
    sizes, decode = [], runner.ModelRunner.decode

    def spy(self, batch, places, *given, **options):
        sizes.append(len(places))
        return decode(self, batch, places, *given, **options)

    monkeypatch.setattr(runner.ModelRunner, "decode", spy)
    monkeypatch.setattr(engine._scheduler, "speculation", None)  # guesses would let a long response end early,
    monkeypatch.setattr(scheduler, "BLOCK", 8)  # and so would many tokens at a time where a step was measured as fast
    alone = [tokens_of(engine.submit(request)) for request in requests]
    assert set(sizes) == {1}
    sizes.clear()
    with engine._changed:  # they come together
        answers = [engine.submit(request) for request in requests]
    assert [tokens_of(answer) for answer in answers] == alone
    assert list(dict.fromkeys(sizes)) == [4, 2, 1]


def test_text_is_made_while_the_next_step_runs(engine, monkeypatch):
    running, seen, decode = [False], [], runner.ModelRunner.decode

    def spy(self, *given, **options):
        running[0] = True
        block = decode(self, *given, **options)
        running[0] = False
        return block

    monkeypatch.setattr(runner.ModelRunner, "decode", spy)
    request = Request(prompt(1, 5), 100, ignore_eos=True)
    engine.submit(request, lambda output: seen.append((running[0], output.finish_reason))).result(60)
    assert len(seen) > 3 and seen == [(True, None)] * (len(seen) - 1) + [(False, "length")]


def test_deterministic_to_the_last_bit_whoever_else_is_there(params, tokenizer):
    requests = [Request(prompt(seed, 5 + 40 * seed), 20 + seed, top_logprobs=1) for seed in range(5)]
    with Engine(CONFIG, params, tokenizer, max_num_seqs=4, kv_tokens=PAGES * PAGE, deterministic=True) as own:
        alone = []
        for request in requests:
            alone.append(own.submit(request))
            alone[-1].result(60)
        joined = [own.submit(request) for request in requests]
        for answer, before in zip(joined, alone, strict=True):
            answer.result(60)
            assert answer.tokens == before.tokens  # with their log-probabilities


def test_pieces_join_to_the_answer(engine, tokenizer):
    request = Request(prompt(4, 7), 80, SamplingParams(temperature=1, logit_bias=WORDS))
    answer = engine.submit(request)
    pieces = list(answer)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [token for piece in pieces for token in piece.tokens] == answer.tokens
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert answer.text == tokenizer.decode([token.token for token in answer.tokens])
    assert list(answer)[-1].finish_reason == "length"  # again: the end
    shown, done = [], threading.Event()
    engine.submit(request, lambda piece: (shown.append(piece), piece.finish_reason and done.set()))
    assert done.wait(60)
    assert [token for piece in shown for token in piece.tokens] == answer.tokens


def test_nobody_overtakes_a_request_that_waits_for_pages(engine):
    small, large, begun, ended = Request(prompt(0, 5), 90), Request(prompt(1, 5), CONFIG.context - 5), [], []

    def note(name):
        return lambda piece: (name in begun or begun.append(name), piece.finish_reason and ended.append(name))

    requests = {"a": small, "b": small, "large": large, "c": small}
    answers = [engine.submit(request, note(name)) for name, request in requests.items()]
    for answer in answers:
        answer.result(60)
    assert begun.index("large") < begun.index("c")
    assert ended[0] in "ab"


def test_rows_go_on_between_the_chunks_of_a_long_prompt(engine, monkeypatch):
    for module in (runner, scheduler):
        monkeypatch.setattr(module, "CHUNK", 32)
    came = []
    answer = engine.submit(Request(prompt(0, 5), 600), lambda piece: came.append("short"))
    while not came:
        time.sleep(0.001)
    long = engine.submit(Request(prompt(1, 400), 5), lambda piece: came.append("long"))
    long.result(60)
    answer.cancel()
    answer.result(60)
    assert came[: came.index("long")].count("short") >= 12  # of 13 chunks


def test_too_many_requests(params, tokenizer):
    hold, begun = threading.Event(), threading.Event()
    with Engine(CONFIG, params, tokenizer, max_num_seqs=1, kv_tokens=PAGE, max_queued=1) as engine:
        first = engine.submit(Request((5,), 99), lambda piece: (begun.set(), hold.wait(60)))
        assert begun.wait(60)
        second = engine.submit(Request((5,), 9))
        with pytest.raises(Busy, match="too many requests are waiting") as busy:
            engine.submit(Request((5,), 9))
        assert busy.value.retry_after >= 1
        hold.set()
        assert second.result(60) and first.result(60)
        engine.submit(Request((5,), 9)).result(60)


def test_cancel_frees_a_row_at_the_next_turn(engine):
    running = engine.submit(Request(prompt(0, 5), 600))
    next(iter(running))
    waits = [engine.submit(Request(prompt(1, 5), 600)) for _ in range(2)]  # no room beside the first
    waits[1].cancel()
    waits[1].cancel()
    assert waits[1].result(60) == ""
    running.cancel()
    running.result(60)
    assert 0 < len(running.tokens) < 600
    assert [answer.finish_reason for answer in (running, waits[1])] == ["cancelled"] * 2
    waits[0].cancel()
    waits[0].result(60)


@pytest.mark.parametrize("drain", [True, False])
def test_close(params, tokenizer, drain):
    engine = Engine(CONFIG, params, tokenizer, max_num_seqs=1, kv_tokens=PAGE)
    answers = [engine.submit(Request((5, 6), 50)) for _ in range(3)]
    if not drain:
        next(iter(answers[0]))
    engine.close(drain)
    engine.close()
    assert not engine._thread.is_alive()
    if drain:
        assert [answer.finish_reason for answer in answers] == ["length"] * 3
    else:
        assert answers[2].finish_reason == "cancelled"
    assert all(answer.finish_reason for answer in answers)
    assert engine.statistics().free_tokens == PAGE
    with pytest.raises(Closed):
        engine.submit(Request((5,), 3))


def test_logits_that_are_no_numbers_end_their_own_answer_alone(params, tokenizer, engine):
    """And the pages that they leave do no harm to those who have them next."""
    request = Request(prompt(2, 200), 40)
    expected = tokens_of(engine.submit(request))
    bad = next(token for token in range(3, CONFIG.vocab) if token not in (*request.prompt, *expected))
    poisoned = params | {"embed": params["embed"].at[bad].set(jnp.nan)}
    with Engine(CONFIG, poisoned, tokenizer, max_num_seqs=4, kv_tokens=PAGES * PAGE) as own:
        for _ in range(2):
            given = request, Request((*prompt(3, 140), bad, *prompt(4, 100)), 40), Request((5, bad), 40), request
            answers = [own.submit(one) for one in given]
            assert tokens_of(answers[0]) == expected == tokens_of(answers[3])
            for answer in answers[1:3]:
                assert (answer.result(60), answer.tokens, answer.finish_reason) == ("", [], "error")
                assert "no numbers (NaN)" in answer.error
        assert own.statistics().finished == {"length": 4, "error": 4}


def test_a_step_that_fails_ends_what_runs_and_the_engine_goes_on(engine, monkeypatch):
    request = Request(prompt(5, 40), 9)
    expected, whole = tokens_of(engine.submit(request)), device.decode

    def fail(*given, **options):
        monkeypatch.setattr(device, "decode", whole)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(device, "decode", fail)
    answer = engine.submit(request)
    answer.result(60)
    assert (answer.finish_reason, answer.error) == ("error", "the engine failed: out of memory")
    assert tokens_of(engine.submit(request)) == expected


def test_a_lost_device_closes_the_engine(params, tokenizer, monkeypatch):
    engine = Engine(CONFIG, params, tokenizer, max_num_seqs=1, kv_tokens=PAGE)

    def fail(*given, **options):
        raise RuntimeError("device lost")

    monkeypatch.setattr(device, "decode", fail)
    monkeypatch.setattr(device, "start", fail)
    answers = [engine.submit(Request((5,), 9)) for _ in range(1)]
    for answer in answers:
        answer.result(60)
        assert (answer.finish_reason, answer.error) == ("error", "the engine failed: device lost")
    engine._thread.join(60)
    with pytest.raises(Closed, match="device lost"):
        engine.submit(Request((5,), 9))


def test_a_reader_that_fails_is_cancelled(engine):
    def fail(piece):
        raise RuntimeError("gone")

    answer = engine.submit(Request(prompt(0, 5), 600), fail)
    answer.result(60)
    assert answer.finish_reason == "cancelled" and len(answer.tokens) < 600


def test_log_probabilities_are_the_models_own(engine, params):
    request = Request(prompt(6, 20), 6, SamplingParams(temperature=2, repetition_penalty=1.5, seed=3), top_logprobs=3)
    plain = engine.submit(Request(prompt(7, 9), 6))
    answer = engine.submit(request)
    ids = [*request.prompt, *tokens_of(answer)]
    logprobs_TV = np.asarray(jax.nn.log_softmax(forward(CONFIG, params, jnp.asarray([ids])).logits[0]))[19:-1]
    for token, logprobs_V in zip(answer.tokens, logprobs_TV, strict=True):
        assert token.logprob == pytest.approx(logprobs_V[token.token], abs=2e-5)
        likeliest = np.argsort(-logprobs_V)[:3]
        assert [one for one, _ in token.top] == likeliest.tolist()
        np.testing.assert_allclose([logprob for _, logprob in token.top], logprobs_V[likeliest], atol=2e-5)
    assert tokens_of(plain) and plain.tokens[0] == ScoredToken(plain.tokens[0].token)


def test_stops(engine, tokenizer):
    request = Request(prompt(8, 9), 30, SamplingParams(logit_bias=WORDS))
    whole = tokens_of(engine.submit(request))
    words = tokenizer.decode(whole).split()
    at = next(at for at in range(3, 30) if not any(word.startswith(words[at]) for word in words[:at]))
    answer = engine.submit(dataclasses.replace(request, stop=("never", words[at])))
    assert answer.result(60) == "".join(word + " " for word in words[:at])
    assert answer.finish_reason == "stop" and len(answer.tokens) == at + 1
    answer = engine.submit(dataclasses.replace(request, stop_tokens=(whole[at],)))
    assert answer.result(60).split() == words[:at]
    assert answer.finish_reason == "stop" and tokens_of(answer) == whole[: at + 1]


class Only:
    """Allows some tokens, and the end once it has so many."""

    def __init__(self, tokens, count):
        self.tokens, self.left, self.seen = set(tokens), count, []

    def allowed(self):
        bits = np.zeros(3, np.uint32)
        for token in self.tokens if self.left else {2}:
            bits[token // 32] |= np.uint32(1 << token % 32)
        return bits

    def accept(self, token):
        self.left -= 1
        self.seen.append(token)

    def forced(self):
        return []


def test_constraints(engine):
    free = Request(prompt(9, 9), 25)
    expected = tokens_of(engine.submit(free))
    constraint = Only({31, 32, 65}, 7)
    answers = [engine.submit(Request(prompt(9, 9), 25, constraint=constraint)), engine.submit(free)]
    got = tokens_of(answers[0])
    assert set(got[:-1]) <= {31, 32, 65} and got[-1] == 2 and constraint.seen == got[:7]
    assert answers[0].finish_reason == "stop" and tokens_of(answers[1]) == expected
    nothing = engine.submit(Request((5,), 9, constraint=Only((), 3)))
    nothing.result(60)
    assert nothing.finish_reason == "error" and "allows no token" in nothing.error
    broken = engine.submit(Request((5,), 9, constraint=object()))
    broken.result(60)
    assert broken.finish_reason == "error" and "constraint failed" in broken.error


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(()), "empty prompt"),
        (Request((5, 72)), "prompt: expected token ids from 0 to 71, got 72"),
        (Request((5,), stop_tokens=(-1,)), "stop_tokens: expected token ids from 0 to 71, got -1"),
        (Request((5,), 0), "max_new_tokens: expected a positive number, got 0"),
        (Request((5,) * 600, 41), "600 tokens \\+ 41 new tokens exceed the context of 640"),
        (Request((5,), top_logprobs=21), "top_logprobs: expected 0 to 20, got 21"),
        (Request((5,), adapter="sql"), "no adapter 'sql'; there are: none"),
        (Request((5,), sampling=SamplingParams(logit_bias=((72, 1.0),))), "logit_bias: expected tokens from 0 to 71"),
        (Request((5,), stop=("",)), "stop: expected strings that are not empty"),
    ],
)
def test_bad_requests(engine, request_, message):
    with pytest.raises(UserError, match=message):
        engine.submit(request_)


def test_bad_engines(params, tokenizer):
    wrong = [{"max_num_seqs": 0}, {"kv_tokens": 0}, {"max_queued": -1}, {"cache_dtype": "int4"}, {"max_model_len": 641}]
    for options in wrong:
        with pytest.raises(UserError, match="expected"):
            Engine(CONFIG, params, tokenizer, **options)
    with Engine(CONFIG, params, tokenizer, max_num_seqs=4, kv_tokens=PAGES * PAGE, max_model_len=10) as engine:
        with pytest.raises(UserError, match="exceed the context of 10 tokens"):
            engine.submit(Request((5,) * 6, 5))
        assert len(tokens_of(engine.submit(Request((5,) * 6, 4)))) == 4


def test_free_pages():
    pages = PageAllocator(6, cuts=2)
    taken = pages.allocate(2 * PAGE + 1)
    assert len(taken) == 2 and 0 not in taken and pages.tokens == 6 * PAGE
    more = pages.allocate(6 * PAGE)
    assert sorted(taken + more) == [1, 2, 3, 4, 5] and not len(pages)
    pages.free(taken)
    assert sorted(pages.allocate(4 * PAGE)) == sorted(taken)


def test_rows_with_adapters_of_their_own(params, tokenizer):
    targets = [lora.Target("blocks/*/attn/*", 3, 20), lora.Target("blocks/*/ffn/*", 2, 20)]
    adapters = {
        name: jax.tree.map(
            lambda array, seed=seed: normal(jax.random.key(seed), array.shape, 0.3),
            lora.initialize(CONFIG, targets, jax.random.key(0)),
        )
        for seed, name in enumerate(("sql", "poems"))
    }
    ids, seen = prompt(1, 40), set()
    with Engine(CONFIG, params, tokenizer, max_num_seqs=4, kv_tokens=PAGES * PAGE, adapters=adapters) as engine:
        answers = {name: engine.submit(Request(ids, 5, adapter=name)) for name in (None, "sql", "poems")}
        for name, answer in answers.items():
            tree, got = adapters.get(name), tokens_of(answer)
            logits_TV = forward(CONFIG, params, jnp.asarray([[*ids, *got]]), adapters=tree).logits[0]
            assert got == logits_TV[39:-1].argmax(-1).tolist()
            seen.add(tuple(got))
        with pytest.raises(UserError, match="no adapter 'prose'; there are: sql, poems"):
            engine.submit(Request(ids, 5, adapter="prose"))
    assert len(seen) == 3


def test_over_a_mesh(engine, params, tokenizer):
    """Rows in two parts with a pool each, every row's pages on two devices, heads on two."""
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
    placed = jax.device_put(params, sharding.shardings(CONFIG, mesh))
    requests = [Request(prompt(seed, length), 8) for seed, length in enumerate((1, 20, 300, 150, 31))]
    requests.append(Request(prompt(5, 9), 8, SamplingParams(temperature=1, repetition_penalty=1.2, seed=4)))
    expected = [tokens_of(engine.submit(request)) for request in requests]
    before = device.decode._cache_size()
    with Engine(CONFIG, placed, tokenizer, max_num_seqs=4, kv_tokens=8 * PAGE, mesh=mesh) as own:
        assert own.context == 4 * PAGE  # a part's own
        answers = [own.submit(request) for request in requests]
        assert [tokens_of(answer) for answer in answers] == expected
        bad = own.submit(Request((5, 6, 7), 300, constraint=object()))
        assert bad.result(60) == "" and bad.finish_reason == "error"
        assert own.statistics().free_tokens == own.statistics().tokens == 8 * PAGE
        assert own._scheduler.runner.batch_sizes == (2, 4)
    assert device.decode._cache_size() <= before + 2  # one program of each size serves them all


def test_programs_for_what_is_asked_alone_give_the_same_tokens(engine, params, tokenizer):
    """Also where requests that need more join and leave, and what is counted for a penalty is its request's own."""
    samplings = [SamplingParams(), SamplingParams(0.9, top_p=0.9, seed=4), SamplingParams(1.0, 0, presence_penalty=2.0)]
    requests = [Request(prompt(seed, 20), 12, sampling) for seed, sampling in enumerate(samplings * 2)]
    expected = [tokens_of(engine.submit(request)) for request in requests]
    with Engine(CONFIG, params, tokenizer, max_num_seqs=4, kv_tokens=PAGES * PAGE, specialize=True) as specialized:
        answers = [specialized.submit(request) for request in requests]
        assert [tokens_of(answer) for answer in answers] == expected
