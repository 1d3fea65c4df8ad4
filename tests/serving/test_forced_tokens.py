"""What a grammar leaves no choice about is taken without a forward pass for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("mistral_common")

from nemoe_jax.model.transformer import forward
from nemoe_jax.serving.engine.request import Request
from nemoe_jax.serving.engine.runner import ModelRunner
from nemoe_jax.serving.engine.scheduler import Scheduler
from nemoe_jax.serving.request_builder import RequestBuilder
from nemoe_jax.serving.structured.grammar import TokenBytes, json_schema, tool_calls
from tests.support.served_models import CONFIG, started, tekken, weights

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["temperature of the water", "pressure of the water"]},
        "unit_of_it": {"const": "K"},
    },
    "required": ["kind", "unit_of_it"],
    "additionalProperties": False,
}
PROMPT = tuple(range(40, 60))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tekken(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def engine(tokenizer):
    with started(tokenizer) as engine:
        engine._runner.deterministic = False  # all slots in every step, but jumps
        yield engine


@pytest.fixture
def work(engine, monkeypatch):
    """Tokens of forced runs, and the number of steps."""
    counted = {"jumps": [], "steps": 0}
    decode, jump = ModelRunner.decode, Scheduler._jump

    def count_step(self, *given, **options):
        counted["steps"] += 1
        return decode(self, *given, **options)

    def count_jump(self, slot, tokens, width):
        counted["jumps"].append(tokens)
        return jump(self, slot, tokens, width)

    monkeypatch.setattr(ModelRunner, "decode", count_step)
    monkeypatch.setattr(Scheduler, "_jump", count_jump)
    monkeypatch.setattr(Scheduler, "_jump_pays", lambda self, tokens, slots: tokens > 1)
    return counted


def constraint(tokenizer):
    return RequestBuilder(CONFIG, tokenizer).constraint(schema=SCHEMA)


def by_forward_passes(tokenizer, count):
    """Greedy tokens: what the grammar forces, or else the likeliest that it allows behind the whole sequence."""
    params, grammar, made = weights(), constraint(tokenizer), []
    run = jax.jit(lambda tokens: forward(CONFIG, params, tokens).logits[0])
    while len(made) < count:
        tokens = grammar.forced()[: count - len(made) - 1]
        if len(tokens) < 2:
            padded = jnp.asarray([[*PROMPT, *made, *[0] * (count - len(made))]])
            logits = np.asarray(run(padded))[len(PROMPT) + len(made) - 1]
            bits = np.unpackbits(grammar.allowed().view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
            tokens = [int(np.where(bits, logits, -np.inf).argmax())]
        for token in tokens:
            made.append(token)
            if token in (2,):
                return made
            grammar.accept(token)
    return made


@pytest.mark.parametrize("count", [60, 9])
def test_tokens_are_those_of_forward_passes_over_the_whole_sequence(engine, tokenizer, work, count):
    plain = engine.submit(Request(tuple(range(70, 90)), 8, ignore_eos=True))
    plain.result(60)
    constrained = engine.submit(Request(PROMPT, count, constraint=constraint(tokenizer)))
    beside = engine.submit(plain.request)
    constrained.result(60)
    made = [one.token for one in constrained.tokens]
    assert made == by_forward_passes(tokenizer, count)
    assert beside.result(60) == plain.text
    forced = [token for tokens in work["jumps"] for token in tokens]
    assert len(forced) >= (2 if count < 20 else 8)
    assert constrained.text == tokenizer.decode([token for token in made if token != 2])


def test_a_jump_stops_where_the_response_does(engine, tokenizer, work):
    response = engine.submit(Request(PROMPT, 60, stop=("of the",), constraint=constraint(tokenizer)))
    whole = engine.submit(Request(PROMPT, 60, constraint=constraint(tokenizer)))
    assert whole.result(60).partition("of the")[0] == response.result(60) and response.finish_reason == "stop"
    assert work["jumps"] and engine.statistics().running == 0


def test_a_jump_that_fails_ends_its_own_response(engine, tokenizer, work):
    class Bad:
        def __init__(self, inner):
            self.inner = inner

        def allowed(self):
            return self.inner.allowed()

        def accept(self, token):
            self.inner.accept(token)

        def forced(self):
            return 1 / 0

    good = engine.submit(Request(PROMPT, 8, ignore_eos=True))
    bad = engine.submit(Request(PROMPT, 8, constraint=Bad(constraint(tokenizer))))
    bad.result(60)
    assert bad.finish_reason == "error" and "division" in bad.error
    good.result(60)
    assert good.finish_reason == "length"


def test_log_probabilities_and_penalties_are_made_by_steps(engine, tokenizer, work):
    scored = engine.submit(Request(PROMPT, 20, top_logprobs=1, constraint=constraint(tokenizer)))
    scored.result(60)
    assert all(one.logprob is not None for one in scored.tokens) and not work["jumps"]


@pytest.mark.parametrize("kind", ["schema", "tools"])
def test_to_ask_for_forced_tokens_changes_nothing(tokenizer, kind):
    vocabulary, rng, forced = TokenBytes(tokenizer, CONFIG.vocab, [2]), np.random.default_rng(0), 0
    tool = {"type": "function", "function": {"name": "measure_it", "parameters": SCHEMA}}
    for _ in range(6):
        if kind == "schema":
            asked, other = json_schema(vocabulary, SCHEMA), json_schema(vocabulary, SCHEMA)
        else:
            asked, other = (tool_calls(vocabulary, tokenizer, [tool], "required") for _ in range(2))
        for _ in range(80):
            tokens = asked.forced()
            np.testing.assert_array_equal(asked.allowed(), other.allowed())
            allowed = np.flatnonzero(np.unpackbits(other.allowed().view(np.uint8), bitorder="little"))
            if 2 in allowed:
                break
            forced += len(tokens)
            for token in [*tokens[:2]] or [int(rng.choice(allowed))]:
                asked.accept(token)
                other.accept(token)
    assert forced > 20


def test_forced_tokens_spell_what_the_grammar_forces(tokenizer):
    vocabulary = TokenBytes(tokenizer, CONFIG.vocab, [2])
    grammar = json_schema(vocabulary, SCHEMA)
    text = ""
    for word in ("{", '"kind"', ":", '"temp'):
        for token in tokenizer.encode(word):
            grammar.accept(token)
        text = tokenizer.decode(grammar.forced())
    assert text and 'erature of the water"'.startswith(text)
    few = json_schema(TokenBytes(tokenizer, 300, [2]), SCHEMA)
    assert all(token < 300 for token in few.forced())
