"""What is compiled when: the first request's programs before it, the others while requests run."""

import collections
import logging
import re
import threading

import jax
import numpy as np
import pytest

from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.serving.engine import engine as engine_module
from nemoe_jax.serving.engine.engine import Engine
from nemoe_jax.serving.engine.programs import Program
from nemoe_jax.serving.engine.request import Request
from nemoe_jax.spec import schema
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.configs import DENSE, write_tokenizer

CONFIG = DENSE.replace(layers=1, context=300)
HOT = SamplingParams(1, repetition_penalty=1.2, seed=4)
PLAIN, SCORED = Request((5, 6, 7), 6, ignore_eos=True), Request((5, 6, 7), 6, top_logprobs=2, ignore_eos=True)
LONG = Request(tuple(np.random.default_rng(0).integers(3, 72, 200).tolist()), 6, ignore_eos=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    write_tokenizer(directory)
    tokenizer, params = load_tokenizer(directory), schema.initialize(CONFIG, jax.random.key(0))
    return lambda **given: Engine(CONFIG, params, tokenizer, max_num_seqs=2, kv_tokens=1024, **given)


class Only:
    """A constraint: one token."""

    def allowed(self):
        return np.array([1 << 9, 0, 0], np.uint32)

    def accept(self, token):
        pass

    def forced(self):
        return []


def tokens_of(response):
    response.result(60)
    return [one.token for one in response.tokens]


def compiled(records):
    """The engine's programs among what was compiled."""
    found = [re.match(r"Compiling jit\((prefill|decode|count|wipe|copy|score)\)", one.getMessage()) for one in records]
    return [match[1] for match in found if match]


def test_what_is_compiled_at_the_start_is_enough(start, caplog):
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"), start() as engine:
        engine.compile()
        names, programs = list(engine.programs.seconds), compiled(caplog.records)
        assert names == [
            *("prefill 32", "decode 1", "penalties", "wipe", "copy"),
            *("prefill 64", "prefill 128", "prefill 256", "prefill 512", "decode 2"),
            *("decode 1 under constraints", "decode 2 under constraints"),
            *("decode 1 with log-probabilities", "decode 2 with log-probabilities"),
            "decode 1 under constraints with log-probabilities",
            "decode 2 under constraints with log-probabilities",
        ]
        assert len(programs) == len(names) and engine.statistics().to_compile == 0
        answers = [engine.submit(Request((5,) * length, 5, HOT)) for length in (1, 20, 70, 200, 280)]
        answers += [engine.submit(SCORED), engine.submit(Request((5,), 4, constraint=Only()))]
        answers.append(engine.submit(Request((5,), constraint=object())))
        for answer in answers:
            answer.result(60)
        copying = engine.submit(Request((*(5,) * 250, 6), 5))
        copying.result(60)
        assert copying.cached_tokens == 250
        assert compiled(caplog.records) == programs


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_request_waits_for_its_own_programs_alone(start, monkeypatch, deterministic):
    with start(deterministic=deterministic) as engine:
        alone = [tokens_of(engine.submit(one)) for one in (PLAIN, LONG, SCORED)]
    with start(deterministic=deterministic) as engine:
        gates = collections.defaultdict(threading.Event)
        original, asked = engine._runner.compile, collections.defaultdict(threading.Event)

        def compile(program, known_V):
            asked[program].set()
            assert program in engine._runner.first_programs() or gates[program].wait(60)
            original(program, known_V)

        monkeypatch.setattr(engine._runner, "compile", compile)
        finished = threading.Event()
        engine.compile(at_once=False, done=finished.set)
        everything = engine.programs.left
        assert tokens_of(engine.submit(PLAIN)) == alone[0] and everything == engine.programs.left > 5
        scored = engine.submit(SCORED)  # which hangs
        program = Program("decode", 2 if deterministic else 1, scored=True)
        assert asked[program].wait(60)
        long = engine.submit(LONG)
        if deterministic:  # the same chunks every time
            assert asked[Program("prefill", 256)].wait(60)
        else:  # chunks that the first program reads
            assert tokens_of(long) == alone[1]
        assert not (scored.tokens or long.finished) or not deterministic
        other = engine.submit(PLAIN)
        gates[program].set()
        assert (tokens_of(other), tokens_of(scored)) == (alone[0], alone[2])
        assert not finished.is_set()
        for one in [*asked, *engine._runner.programs(True, {})]:
            gates[one].set()
        assert finished.wait(60) and tokens_of(long) == alone[1]
        assert engine.programs.left == engine.statistics().to_compile == 0


def test_a_program_that_cannot_be_compiled_ends_the_requests_that_need_it(start, monkeypatch):
    with start() as engine:
        expected = tokens_of(engine.submit(PLAIN))
        monkeypatch.setattr(engine._runner, "score", lambda *given: 1 / 0)
        monkeypatch.setattr(engine._runner, "compile", lambda *given: 1 / 0)
        engine.compile(at_once=False)
        failed = engine.submit(Request((5, 6, 7), 6, top_logprobs=2, prompt_logprobs=True))
        failed.result(60)
        assert failed.finish_reason == "error" and "division" in failed.error
        assert tokens_of(engine.submit(PLAIN)) == expected


def test_a_cancelled_request_waits_for_nothing(start, monkeypatch):
    with start() as engine:
        hanging, original = threading.Event(), engine._runner.compile

        def compile(program, known_V):
            assert program in engine._runner.first_programs() or hanging.wait(60)
            original(program, known_V)

        monkeypatch.setattr(engine._runner, "compile", compile)
        engine.compile(at_once=False)
        response = engine.submit(SCORED)
        engine.submit(PLAIN).result(60)
        response.cancel()
        response.result(60)
        assert response.finish_reason == "cancelled" and engine.statistics().running == 0
        hanging.set()


def test_the_cache_takes_half_of_the_free_memory_or_what_all_slots_can_use(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    tokenizer, params = load_tokenizer(tmp_path), schema.initialize(CONFIG, jax.random.key(0))
    of_token = 2 * CONFIG.layers * CONFIG.kv_heads * CONFIG.head_dim * 4  # keys and values in float32
    for free, tokens in ((2 * 500 * of_token, 512), (2**40, 640), (0, 128)):  # in whole pages of 128 tokens
        monkeypatch.setattr(engine_module, "free_memory", lambda free=free: free)
        with Engine(CONFIG, params, tokenizer, max_num_seqs=2) as engine:
            assert engine.statistics().tokens == tokens
