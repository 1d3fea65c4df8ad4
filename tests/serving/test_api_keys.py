"""API keys with limits, and the queue that is fair between them."""

import contextlib
import json
import types

import httpx
import pytest

openai = pytest.importorskip("openai")

from nemoe_jax.errors import UserError
from nemoe_jax.serving.api.api_keys import Account, ApiKey, read_api_keys
from nemoe_jax.serving.api.errors import ApiError
from nemoe_jax.serving.engine.fair_queue import FairQueue
from nemoe_jax.serving.engine.request import Request, RequestOutput, ScoredToken
from tests.support.served_models import CONFIG, serve, words


def waiting(name, client="", adapter=None, priority=0):
    return types.SimpleNamespace(name=name, request=Request((1,), client=client, adapter=adapter, priority=priority))


def order(queue):
    names = []
    while len(queue):
        assert queue.first() in [*queue]
        names.append(queue.pop().name)
    return " ".join(names)


def test_clients_and_adapters_have_their_turns():
    queue, many = FairQueue(), [waiting(f"a{number}", "a") for number in range(4)]
    for one in [*many, waiting("b0", "b"), waiting("b1", "b"), waiting("c0", "a", "sql")]:
        queue.append(one)
    assert order(queue) == "a0 b0 c0 a1 b1 a2 a3"
    for one in [*many[:3], waiting("b0", "b"), waiting("late", "b", priority=5), waiting("now", "c", priority=-1)]:
        queue.append(one)
    queue.remove(many[1])
    assert len(queue) == 5 and order(queue) == "now a0 b0 a2 late"
    queue.append(many[0])
    queue.clear()
    assert len(queue) == 0 == len([*queue])


def test_a_group_whose_requests_are_all_taken_is_behind_the_others_when_it_comes_again():
    queue = FairQueue()
    for name in ("a0", "b0", "b1"):
        queue.append(waiting(name, name[0]))
    assert queue.pop().name == "a0"
    queue.append(waiting("a1", "a"))
    assert order(queue) == "b0 a1 b1"


def test_a_keys_file(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text("- {name: search, key: sk-1, max_requests: 2, tokens_per_minute: 60}\n- {name: ops, key: sk-2}\n")
    keys = read_api_keys(path)
    assert keys == [
        ApiKey(name="search", key="sk-1", max_requests=2, tokens_per_minute=60),
        ApiKey(name="ops", key="sk-2"),
    ]
    path.write_text(json.dumps([key.model_dump() for key in keys]))
    assert read_api_keys(path) == keys


@pytest.mark.parametrize(
    "content, message",
    [
        ("- {name: a, key: secret-1, speed: 3}", "entry 1, speed: Extra inputs"),
        ("- {name: a, key: secret-1, max_requests: 0}", "entry 1, max_requests: Input should be greater"),
        ("- {name: a, key: secret-1, tokens_per_minute: many}", "entry 1, tokens_per_minute: Input should be a valid"),
        ("- {name: a, key: 'secret 1'}", "entry 1, key: String should match"),
        ("- {name: a, key: secretö}", "entry 1, key: String should match"),
        ("- {name: a, key: 12345}", "entry 1, key: Input should be a valid string"),
        ("- {key: secret-1}", "entry 1, name: Field required"),
        ("- {name: a, key: secret-1, priority: 1}", "entry 1, priority: Input should be a valid boolean"),
        ("- {name: a, key: secret-1}\n- {name: a, key: secret-2}", r"entry 2 \(a\): another one has the same name"),
        ("- {name: a, key: secret-1}\n- {name: b, key: secret-1}", r"entry 2 \(b\): another one has the same key"),
        ("keys: [secret-1]", "expected YAML or JSON|valid list"),
        ("- {name: a\n  key: secret-1", "line 2: expected YAML or JSON"),
        ("[]", "expected a list of keys, got none"),
        ("", "valid list"),
        ("a: !!python/object/apply:os.system [secret-1]", "expected YAML or JSON"),
        (b"\xff\xfe", "keys.yaml: "),
        (None, "No such file"),
    ],
)
def test_bad_keys_files_are_named_and_show_no_key(tmp_path, content, message):
    path = tmp_path / "keys.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_api_keys(path)
    assert "keys.yaml" in str(caught.value) and "secret" not in str(caught.value)


def account(now, **limits):
    return Account(ApiKey(name="a", key="k", **limits), lambda: now[0])


def test_tokens_of_a_minute_are_earned_as_it_goes():
    now = [0.0]
    own = account(now, tokens_per_minute=600)  # ten a second
    own.enter(1, 500)
    own.spend(400)  # a response may go beyond it
    for seconds, retry in ((0, "30"), (10, "20"), (29.5, "1")):
        now[0] = seconds
        with pytest.raises(ApiError, match="may use 600 tokens per minute") as caught:
            own.enter(1, 1)
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, retry)
    now[0] = 30.2
    own.enter(1, 1)
    now[0] = 10_000
    own.enter(1, 600)  # never more than one minute's
    with pytest.raises(ApiError):
        own.enter(1, 1)


def test_what_is_owed_is_waited_for_in_bounded_steps():
    now = [0.0]
    own = account(now, tokens_per_minute=60)
    own.enter(1, 10_000)
    with pytest.raises(ApiError) as caught:
        own.enter(1, 1)
    assert caught.value.headers["Retry-After"] == "30"


def test_responses_in_flight_are_counted():
    own = account([0.0], max_requests=3)
    own.enter(2, 1)
    with pytest.raises(ApiError, match="3 responses in flight") as caught:
        own.enter(2, 1)
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
    own.leave(2)
    own.enter(3, 1)
    with pytest.raises(ApiError, match="at most 3 responses") as caught:  # which no waiting makes possible
        own.enter(4, 1)
    assert caught.value.status == 400


class Endless:
    """An engine whose responses never end, and which tells who asked."""

    failure, finished, cached_tokens, context, adapters = None, False, 0, CONFIG.context, ()

    def __init__(self):
        self.requests, self.full = [], False

    def submit(self, request, on_output):
        self.requests.append(request)
        on_output(RequestOutput("Hi", (ScoredToken(5),)))
        return self

    def cancel(self):
        pass

    def close(self, drain):
        pass

    def statistics(self):
        raise AssertionError("nobody asked")


KEYS = [
    ApiKey(name="search", key="sk-1", max_requests=2, priority=True),
    ApiKey(name="small", key="sk-2", tokens_per_minute=3),
    "plain",
]


def test_limits_hold_and_are_told(tmp_path):
    engine = Endless()
    with serve(engine, words(tmp_path), api_key=KEYS, drain_seconds=0) as address, contextlib.ExitStack() as stack:

        def client(key, **headers):
            http = openai.DefaultHttpxClient(trust_env=False)
            given = {"base_url": f"{address}/v1", "api_key": key, "max_retries": 0, "default_headers": headers}
            return stack.enter_context(openai.OpenAI(**given, http_client=http))

        def begin(key, n=1, **headers):
            body = {"model": "nano", "prompt": [5, 6], "stream": True, "n": n}
            stream = client(key, **headers).completions.create(**body)
            next(iter(stream))
            return stream

        first = begin("sk-1", **{"X-Priority": "-7"})
        begin("sk-1")
        with pytest.raises(openai.RateLimitError) as caught:
            begin("sk-1")
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.body["code"] == "rate_limit_exceeded"
        with pytest.raises(openai.BadRequestError, match="at most 2 responses"):
            begin("sk-1", n=3)
        assert [(one.client, one.priority) for one in engine.requests] == [("search", -7), ("search", 0)]
        first.close()
        for _ in range(100):  # the server notes that the client is gone
            with contextlib.suppress(openai.RateLimitError):
                begin("sk-1")
                break
        assert len(engine.requests) == 3
        begin("sk-2")  # 2 tokens of prompt, 1 of response: nothing is left
        with pytest.raises(openai.RateLimitError, match="3 tokens per minute") as caught:
            begin("sk-2")
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
        begin("plain")
        begin("plain")
        assert [one.client for one in engine.requests][-2:] == ["key 3", "key 3"]
        for key in ("sk-2", "plain"):
            with pytest.raises(openai.PermissionDeniedError, match="may not set a priority"):
                begin(key, **{"X-Priority": "1"})
        for value in ("high", "1.5", "101", "-999", "--1", ""):
            with pytest.raises(openai.BadRequestError, match="X-Priority: expected an integer from -100"):
                begin("sk-1", **{"X-Priority": value})
        models = httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer sk-0"}, trust_env=False)
        assert models.status_code == 401
