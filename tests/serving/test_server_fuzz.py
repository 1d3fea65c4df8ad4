"""Whatever is sent, the server answers as its OpenAPI description says, and never with status 500.

The same with more examples, against a server that runs: `schemathesis run http://127.0.0.1:8000/openapi.json`.
"""

from collections import Counter

import pytest

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from nemoe_jax.serving.api.app import create_app
from nemoe_jax.serving.api.served_model import ServedModel
from tests.support.served_models import CONFIG, ROWS, WAITING, started, words

OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]
EXAMPLES = 25
TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = words(directory)
    load_all_checks()
    with started(tokenizer) as engine:
        served = ServedModel(engine, CONFIG, tokenizer, "nano", max_tokens=4, max_answers=ROWS + WAITING)
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(served))


def test_every_operation_is_described(description):
    described = {(operation.ok().method.upper(), operation.ok().path) for operation in description.get_all_operations()}
    assert described == set(OPERATIONS)


@pytest.mark.parametrize(
    "method, path, mode",
    [
        (*operation, mode)
        for operation in OPERATIONS
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or operation[0] == "POST"  # nothing can be wrong about a path
    ],
)
def test_answers_conform_to_the_description(description, method, path, mode):
    operation = description[path][method]
    # the description cannot say which roles may follow one another, or which schemas grammars can be made of
    (excluded,) = CHECKS.get_by_names(["positive_data_acceptance"])
    statuses: Counter[int] = Counter()

    @given(case=operation.as_strategy(mode))
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        response = case.call_and_validate(excluded_checks=[excluded])
        statuses[response.status_code] += 1

    check()
    assert max(statuses) < 500
    if method == "POST" and mode is GenerationMode.POSITIVE:
        assert statuses[200] > EXAMPLES // 5, statuses
