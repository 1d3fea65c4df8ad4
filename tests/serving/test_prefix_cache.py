"""Prompts that begin alike share pages: the same tokens as without, and never what is not finite or still written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemoe_jax.adapters import lora
from nemoe_jax.kernels.attention.paged import PAGE
from nemoe_jax.serving.engine import engine as engine_module
from nemoe_jax.serving.engine import runner, scheduler
from nemoe_jax.serving.engine.engine import Engine
from nemoe_jax.serving.engine.page_allocator import PageAllocator, page_keys
from nemoe_jax.serving.engine.request import Request
from nemoe_jax.spec import schema, sharding
from nemoe_jax.spec.mesh import make_mesh
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.compiled import normal
from tests.support.configs import DENSE, write_tokenizer

CONFIG = DENSE.replace(layers=1, context=1024)
BAD = 70  # a token that the prompts do not have


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Of a page, which makes few programs."""
    for module in (runner, scheduler, engine_module):
        monkeypatch.setattr(module, "CHUNK", PAGE)


@pytest.fixture(scope="module")
def params():
    return schema.initialize(CONFIG, jax.random.key(0))


@pytest.fixture(scope="module")
def start(params, tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    write_tokenizer(directory)
    tokenizer = load_tokenizer(directory)

    def start(params=params, **options):
        return Engine(CONFIG, params, tokenizer, **{"max_num_seqs": 2, "kv_tokens": 8 * PAGE, **options})

    return start


def prompt(seed, length):
    return tuple(np.random.default_rng(seed).integers(3, BAD, length).tolist())


def ask(engine, *requests):
    """Tokens and how many of the prompt were cached, of requests that come together."""
    with engine._changed:
        answers = [engine.submit(request) for request in requests]
    for answer in answers:
        answer.result(60)
    return [([one.token for one in answer.tokens], answer.cached_tokens) for answer in answers]


def request(ids, tokens=6, **options):
    return Request(tuple(ids), tokens, ignore_eos=True, **options)


def computed(monkeypatch):
    """The numbers of tokens that are prefilled from now on."""
    lengths, prefill = [], runner.ModelRunner.prefill

    def spy(self, slot, tokens, *given):
        lengths.append(len(tokens))
        return prefill(self, slot, tokens, *given)

    monkeypatch.setattr(runner.ModelRunner, "prefill", spy)
    return lengths


def test_pages_are_counted_shared_and_evicted():
    pool, keys = PageAllocator(5), page_keys(np.arange(3 * PAGE + 5), PAGE, b"")
    other = page_keys(np.arange(3 * PAGE), PAGE, b"adapter")
    assert len(keys) == 3 and not {*keys} & {*other} and page_keys(np.arange(2 * PAGE), PAGE, b"") == keys[:2]
    first = pool.allocate(3 * PAGE)
    for page, key in zip(first, keys, strict=True):
        pool.publish(page, key)
    assert pool.published([*keys[:2], b"?", keys[2]]) == first[:2]
    assert pool.has_room(3 * PAGE, first[:2]) and not pool.has_room(4 * PAGE, first[:2])
    second = pool.allocate(3 * PAGE, first[:2])
    assert second[:2] == first[:2] and second[2] not in first and not len(pool)
    assert not pool.is_private(first[0]) and not pool.is_private(first[2]) and pool.is_private(second[2])
    pool.free(first)
    assert len(pool) == 1 and pool.published(keys) == first  # used by the second, or kept
    assert not pool.has_room(3 * PAGE + 1, first)  # what is kept is not counted twice
    pool.free(second)
    assert len(pool) == 4
    assert pool.allocate(2 * PAGE) == [second[2], first[2]]  # a free one, then the last page of what is kept
    assert pool.published(keys) == first[:2]
    pool.withdraw(first[0])
    assert pool.published(keys) == [] and pool.published(keys[1:]) == [first[1]]


def test_the_longest_match_within_a_page():
    pool, tokens = PageAllocator(5), np.arange(2 * PAGE)
    whole, part = page_keys(tokens[: PAGE + 20], PAGE, b"", least=20)
    [other] = page_keys(np.concatenate([tokens[:30], tokens]), PAGE, b"")[:1]
    assert page_keys(tokens[: PAGE + 19], PAGE, b"", least=20) == [whole] == page_keys(tokens[: PAGE + 20], PAGE, b"")
    pages = pool.allocate(3 * PAGE)
    for page, key in zip(pages, (whole, part, other), strict=True):
        pool.publish(page, key)
    assert pool.longest_match(b"", tokens[:10]) == (other, 10)  # the latest one of equals
    assert pool.longest_match(b"", tokens[:PAGE]) == (whole, PAGE)
    assert pool.longest_match(b"", np.where(tokens < 40, tokens, 0)) == (whole, 40)
    assert pool.longest_match(whole.hash, tokens[PAGE:]) == (part, 20)
    assert pool.longest_match(whole.hash, tokens[:PAGE]) is None
    assert pool.longest_match(b"adapter", tokens) is None and pool.longest_match(b"", tokens[:0]) is None
    pool.withdraw(pages[0])
    assert pool.longest_match(b"", tokens) == (other, 30)
    pool.free(pages)
    pool.allocate(4 * PAGE)
    assert pool.longest_match(b"", tokens) is None and pool.longest_match(whole.hash, tokens[PAGE:]) is None


def test_a_copy_is_its_own(start):
    """What comes behind the copied tokens is written to the copy alone."""
    ids = prompt(12, 200)
    others = [request((*ids[:180], *prompt(seed, 30)), 40) for seed in range(20, 23)]
    with start(prefix_cache=False) as plain, start() as engine:
        requests = [request(ids, 40), *others, request(ids, 40), *others]
        expected = [ask(plain, one)[0][0] for one in requests]
        got = [ask(engine, one)[0] for one in requests]
        assert [tokens for tokens, _ in got] == expected
        assert [cached for _, cached in got] == [0, 180, 180, 180, 199, 209, 209, 209]
        assert [tokens for tokens, _ in ask(engine, *requests[:2])] == expected[:2]  # two copies at once


@pytest.mark.parametrize("dtype", [None, "int8", "float8_e4m3fn"])
def test_a_prompt_that_begins_alike_gives_the_same_tokens(start, dtype, monkeypatch):
    ids = prompt(0, 300)
    requests = [request(ids), request((*ids[:280], *prompt(1, 60))), request(ids[:257]), request(ids[:256])]
    with start(cache_dtype=dtype, prefix_cache=False) as plain, start(cache_dtype=dtype) as engine:
        expected = [ask(plain, one)[0] for one in requests] * 2
        assert {cached for _, cached in expected} == {0}
        lengths = computed(monkeypatch)
        got = [ask(engine, one)[0] for one in requests + requests]
        assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
        assert [cached for _, cached in got] == [0, 280, 256, 255, 299, 339, 256, 255]
        assert lengths == [128, 128, 43, 59]  # the last token of a prompt is read as a step
        assert engine.statistics().cached_tokens == sum(cached for _, cached in got)


def test_the_next_message_of_a_chat_reads_what_is_new(start):
    ids = prompt(2, 200)
    with start(prefix_cache=False) as plain, start() as engine:
        [(first, _)] = ask(engine, request(ids, 100))
        then = request((*ids, *first, *prompt(3, 50)))
        [(tokens, cached)] = ask(engine, then)
        assert cached == 299  # more than the prompt, and all that was read of the response
        assert ask(plain, then) == [(tokens, 0)]


def test_several_responses_to_one_prompt_read_it_once(start, monkeypatch):
    lengths = computed(monkeypatch)
    with start() as engine:
        got = ask(engine, *[request(prompt(4, 450))] * 2)
    assert sum(lengths) == 3 * PAGE + 2 * (449 - 3 * PAGE)  # each reads what is behind the last whole page
    assert len({tuple(tokens) for tokens, _ in got}) == 1


def test_adapters_do_not_share_pages(start):
    tree = lora.initialize(CONFIG, [lora.Target("blocks/*/attn/*", 3, 20)], jax.random.key(0))
    tree = jax.tree.map(lambda array: normal(jax.random.key(1), array.shape, 0.3), tree)
    ids = prompt(5, 150)
    with start(adapters={"a": tree}, prefix_cache=False) as plain, start(adapters={"a": tree}) as engine:
        given = [request(ids), request(ids, adapter="a")] * 2
        expected, got = ([ask(one, each)[0] for each in given] for one in (plain, engine))
        assert [tokens for tokens, _ in got] == [tokens for tokens, _ in expected]
        assert [cached for _, cached in got] == [0, 0, 149, 149]


def test_over_a_mesh(start, params):
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "sequence": 2})
    placed = jax.device_put(params, sharding.shardings(CONFIG, mesh))
    ids = prompt(6, 600)
    with start() as one_device, start(placed, kv_tokens=24 * PAGE, mesh=mesh) as engine:
        expected = ask(one_device, request(ids))[0][0]
        # a page's tokens are on two devices; the slot is one of the part that has the pages
        assert [ask(engine, request(ids))[0] for _ in range(3)] == [(expected, 0), (expected, 599), (expected, 599)]


def test_what_is_not_finite_is_not_shared(start, params):
    poisoned = params | {"embed": params["embed"].at[BAD].set(jnp.nan)}
    ids = prompt(7, 300)
    with start(poisoned, prefix_cache=False) as plain, start(poisoned) as engine:
        expected = ask(plain, request(ids))[0][0]
        bad = engine.submit(request((*ids[:290], BAD, *ids[290:])))
        bad.result(60)
        assert bad.finish_reason == "error" and "NaN" in bad.error
        assert ask(engine, request(ids))[0] == (expected, 0)
        bad = engine.submit(request((*ids[:280], BAD)))  # which has its pages from the good one, the last as a copy
        bad.result(60)
        assert bad.finish_reason == "error" and bad.cached_tokens == 280
        assert ask(engine, request(ids))[0] == (expected, 0)  # those are under suspicion, and computed again
        assert ask(engine, request(ids))[0] == (expected, 299)
        assert not np.isnan(np.asarray(engine._runner.held.k.pool)).any()


def test_a_prompt_that_is_cancelled_midway_leaves_whole_pages(start, monkeypatch):
    for module in (runner, scheduler):
        monkeypatch.setattr(module, "CHUNK", PAGE // 2)
    ids, prefill = prompt(8, 900), runner.ModelRunner.prefill
    with start(prefix_cache=False) as plain, start() as engine:
        expected = ask(plain, request(ids))[0][0]

        def cancel_at_the_fifth(self, slot, tokens, position, *given):
            if position >= 2 * PAGE:
                answer.cancel()
            return prefill(self, slot, tokens, position, *given)

        monkeypatch.setattr(runner.ModelRunner, "prefill", cancel_at_the_fifth)
        with engine._changed:
            answer = engine.submit(request(ids))
        answer.result(60)
        assert answer.finish_reason == "cancelled"
        monkeypatch.setattr(runner.ModelRunner, "prefill", prefill)
        assert ask(engine, request(ids))[0] == (expected, 2 * PAGE)  # of 5 · 64 tokens


def test_a_cache_that_is_too_small_for_all_gives_the_same_tokens(start):
    requests = [request((*prompt(seed % 3, 260), *prompt(seed, 10 * seed)), 20) for seed in range(9)]
    with start(prefix_cache=False) as plain, start() as engine:
        expected = [ask(plain, one)[0][0] for one in requests]
        for _ in range(2):
            assert [tokens for tokens, _ in ask(engine, *requests)] == expected
        statistics = engine.statistics()
        assert statistics.free_tokens == statistics.tokens and 0 < statistics.cached_tokens < statistics.prompt_tokens


def test_deterministic_prefixes_are_the_same_to_the_last_bit(start, monkeypatch):
    for module in (runner, scheduler, engine_module):
        monkeypatch.setattr(module, "CHUNK", 2 * PAGE)
    scored = request(prompt(9, 700), top_logprobs=1)
    with start(deterministic=True) as engine:
        ask(engine, request(scored.prompt[:300]), request(scored.prompt[:140], 130))
        warm = engine.submit(scored)
        warm.result(60)
        assert warm.cached_tokens == 256  # not what was generated, nor what was read in a shorter chunk
        engine._scheduler.reset()  # its thread waits
        whole = engine.submit(scored)
        whole.result(60)
        assert whole.cached_tokens == 0 and whole.tokens == warm.tokens


def test_a_fault_while_pages_are_shared_empties_the_cache(start, monkeypatch):
    with start() as engine:
        expected = ask(engine, request(prompt(10, 300)))[0][0]
        publish = PageAllocator.publish

        def fail(self, page, key):
            monkeypatch.setattr(PageAllocator, "publish", publish)
            raise RuntimeError("no more memory")

        monkeypatch.setattr(PageAllocator, "publish", fail)
        answer = engine.submit(request(prompt(11, 300)))
        answer.result(60)
        assert answer.finish_reason == "error" and "no more memory" in answer.error
        assert [ask(engine, request(prompt(10, 300)))[0] for _ in range(2)] == [(expected, 0), (expected, 299)]
