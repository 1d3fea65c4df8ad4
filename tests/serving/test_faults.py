"""No exception in the engine's loop ends its thread, or leaves a request without an end."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.kernels.attention.paged import PAGE
from nemoe_jax.serving.engine.engine import LONGEST_RETRY, Engine
from nemoe_jax.serving.engine.request import Request
from nemoe_jax.spec import schema
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.compiled import forward
from tests.support.configs import DENSE, write_tokenizer
from tests.support.faults import functions_of, injected, name_of, recorded

CONFIG = DENSE.replace(layers=1, context=256)
AFTERWARDS = Request((5, 6, 7), 4)
# Without them nothing can be done at all: they fail once, and not for good.
ENDS = {"engine.Engine._iterate", "stream.ResponseStream.finish", "stream.ResponseStream.emit", "engine.Engine._end"}

# Not even an empty cache or the queue can be had: everything ends, and the engine says that it is dead.
QUEUE = {f"fair_queue.FairQueue.{name}" for name in ("__len__", "__iter__", "first", "pop", "remove")}
LAST_RESORT = {"slots.Slots._clear", "fair_queue._group", *QUEUE}


class Alternating:
    """A constraint: tokens 10 and 11 in turn."""

    def __init__(self):
        self.next = 10

    def allowed(self):
        bits_W = np.zeros(3, np.uint32)
        bits_W[0] = 1 << self.next
        return bits_W

    def accept(self, token):
        self.next = 21 - token

    def forced(self):
        return []


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    write_tokenizer(directory, CONFIG.vocab - 3)  # some rows of the embedding have no token
    tokenizer = load_tokenizer(directory)
    params = schema.initialize(CONFIG, jax.random.key(0))
    logging.getLogger("nemoe_jax").setLevel(logging.CRITICAL + 1)
    yield lambda: Engine(CONFIG, params, tokenizer, max_num_seqs=2, kv_tokens=2 * PAGE)
    logging.getLogger("nemoe_jax").setLevel(logging.NOTSET)


def work(engine):
    """Requests of all kinds, more than there are slots: their outputs, by request."""
    hot = SamplingParams(temperature=1, repetition_penalty=1.2, seed=1)
    requests = [
        Request((5, 6, 7), 5, stop=("word70 word69",)),
        Request((8, 9), 3, constraint=Alternating()),
        Request((5,), 3, hot, top_logprobs=2),
        Request((6,), 100),  # to be cancelled while it waits or runs
        Request((6,), 3, stop_tokens=(4,)),
        Request((7,), 3, constraint=object()),  # which fails
    ]
    outputs = [[] for _ in requests]
    responses = [engine.submit(one, own.append) for one, own in zip(requests, outputs, strict=True)]
    responses[3].cancel()
    return responses, outputs


def ended(responses, outputs):
    """Waits for the ends; each response has one, and one alone."""
    for response, own in zip(responses, outputs, strict=True):
        response.result(60)
        assert [bool(one.finish_reason) for one in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].finish_reason == response.finish_reason
        assert (response.error is None) == (response.finish_reason != "error")


def idle(engine):
    now = engine.statistics()
    return (now.running, now.waiting, now.free_tokens) == (0, 0, now.tokens)


@pytest.fixture(scope="module")
def calls(start):
    """The package's functions that the engine's thread calls for that work, with the number of calls."""
    with start() as engine:  # compiles, which is no part of the loop
        for response in work(engine)[0]:
            response.result(300)
    with recorded("engine") as counted, start() as engine:
        ended(*work(engine))
    once = ("_run", "_ambient", "use_mesh", "clear")  # before any request, or behind all
    counted = {code: count for code, count in counted.items() if code.co_name not in once}
    return {function: counted[code] for code, function in functions_of(counted).items()}


def test_the_loop_is_known(calls):
    """The injection sees the whole loop: scheduler, sampler, detokenizer, stop strings, constraint, slots, pages."""
    names = {name_of(function) for function in calls}
    expected = {
        "engine.Engine": "_iterate _admit _drop_cancelled",
        "scheduler.Scheduler": "step _prefill _decode _append _allowed _take_forced _release",
        "slots.Slots": "assign release",
        "page_allocator.PageAllocator": "allocate free",
        "runner.ModelRunner": "decode count_prompt wipe",
        "sampler": "controls",
        "stream.ResponseStream": "append emit finish",
        "streaming.StreamDecoder": "push flush",
        "stop_strings.StopStrings": "push",
        "base.Tokenizer": "decode",
        "hf_tokenizer.TokenizerJson": "_decode",
    }
    missing = {f"{owner}.{name}" for owner, own in expected.items() for name in own.split()} - names
    assert not missing


@pytest.mark.parametrize("after", [False, True], ids=["instead of its work", "after its work"])
@pytest.mark.parametrize("times", [1, 10**9], ids=["once", "for good"])
def test_a_fault_at_any_call_ends_requests_and_not_the_engine(start, calls, times, after):
    engine, wrong = start(), []
    expected = engine.submit(AFTERWARDS).result(30)
    for function, count in calls.items():
        name = name_of(function)
        if times > 1 and name in ENDS:
            continue
        for at in {1, 1 + count // 2} if times == 1 else {1}:
            with injected(function, "engine", at, times, after) as called:
                try:
                    ended(*work(engine))
                    assert called() >= at or at > 1
                except (AssertionError, TimeoutError) as error:
                    wrong.append((name, at, repr(error)[:80]))
            if engine.failure is None and engine._thread.is_alive():
                answer = engine.submit(AFTERWARDS)
                if answer._done.wait(60) and answer.text == expected and idle(engine):
                    continue
                wrong.append((name, at, f"afterwards: {answer.text}, {engine.statistics()}"))
            elif name not in LAST_RESORT:
                wrong.append((name, at, "the engine ended"))
            engine = start()
    engine.close()
    assert not wrong, "\n".join(map(str, wrong))


def test_rows_without_a_token_are_never_chosen(start):
    """Three rows of the embedding are beyond the tokenizer: with any bias, the likeliest token takes their place."""
    padding = range(CONFIG.vocab - 3, CONFIG.vocab)
    push = SamplingParams(logit_bias=tuple((row, 100.0) for row in padding))
    with start() as engine:
        greedy = engine.submit(Request((5, 6, 7), 6, push, top_logprobs=20, ignore_eos=True))
        hot = engine.submit(Request((5, 6, 7), 50, dataclasses.replace(push, temperature=5), ignore_eos=True))
        text = greedy.result(30)
        assert text == engine.tokenizer.decode([one.token for one in greedy.tokens])
        hot.result(30)
    ids = [5, 6, 7, *(one.token for one in greedy.tokens)]
    params = schema.initialize(CONFIG, jax.random.key(0))
    logits_TV = np.asarray(forward(CONFIG, params, jnp.asarray([ids])).logits[0])[2:-1]
    assert ids[3:] == logits_TV[:, : padding[0]].argmax(-1).tolist()
    # log-probabilities are the model's own, rows without a token included
    expected_V = logits_TV[0] - np.log(np.exp(logits_TV[0]).sum())
    assert [token for token, _ in greedy.tokens[0].top] == np.argsort(-expected_V)[:20].tolist()
    assert not {one.token for one in hot.tokens} & set(padding)


def test_a_response_whose_text_fails_ends_alone(start):
    class Broken:
        def __getattr__(self, name):
            raise ValueError("no text")

    with start() as engine:
        bad, good = engine.submit(Request((5, 6, 7), 4)), engine.submit(AFTERWARDS)
        bad._decoder = Broken()
        expected = good.result(30)
        bad.result(30)
        assert bad.finish_reason == "error" and "no text" in bad.error
        assert engine.submit(AFTERWARDS).result(30) == expected and good.finish_reason == "length"


def test_a_client_that_fails_for_a_while_is_cancelled_and_told_of_the_end(start):
    seen = []

    def take(output):
        seen.append(output)
        if len(seen) == 1:
            raise SystemExit("the client's own")

    with start() as engine:
        response = engine.submit(Request((5, 6, 7), 200, ignore_eos=True), take)
        response.result(30)
    assert seen[-1].finish_reason == response.finish_reason == "cancelled" and len(response.tokens) < 200


def test_when_to_come_again_is_a_matter_of_busy_time(start):
    with start() as engine:
        assert engine._seconds_to_a_slot() == 1
        engine._scheduler.durations.extend([3.0, 5.0])  # whatever idle time lay between them
        assert engine._seconds_to_a_slot() == 4
        engine._scheduler.durations.extend([600.0] * 9)
        assert engine._seconds_to_a_slot() == LONGEST_RETRY == 30
        engine._scheduler.durations.clear()
        engine.submit(AFTERWARDS).result(30)
        assert len(engine._scheduler.durations) == 1 and 0 < engine._scheduler.durations[0] < 30


def test_end_tokens_can_be_ignored(start):
    with start() as engine:
        ending = SamplingParams(logit_bias=((2, 100.0),))
        plain, ignoring = (engine.submit(Request((5,), 6, ending, ignore_eos=given)) for given in (False, True))
        plain.result(30), ignoring.result(30)
        assert ([one.token for one in plain.tokens], plain.finish_reason) == ([2], "stop")
        assert ([one.token for one in ignoring.tokens], ignoring.finish_reason) == ([2] * 6, "length")
        ended = engine.submit(Request((5,), 6, ending, constraint=Alternating(), ignore_eos=True))
        ended.result(30)
        assert [one.token for one in ended.tokens] == [10, 11] * 3
