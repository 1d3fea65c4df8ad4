"""Our model in the lm-evaluation-harness against the harness's own Hugging Face model, on the same directory."""

import json
import os
import shutil

os.environ["HF_DATASETS_OFFLINE"] = "1"  # read at import
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import jax
import numpy as np
import pytest
import tokenizers

pytest.importorskip("lm_eval")
pytest.importorskip("torch")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.evaluation import lm_eval_model
from nemoe_jax.evaluation.lm_eval_model import NemoeLM
from nemoe_jax.spec import schema
from tests.support.compiled import normal
from tests.support.configs import DENSE, write_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% endif %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}word9 {% endif %}"
)


def write_model(directory, config=DENSE, around=("<s>", "")):
    """A directory of lively random weights; its tokenizer puts those tokens around a text."""
    params = schema.initialize(config, jax.random.key(5))
    params["blocks"] = jax.tree.map(lambda array: 1.5 * array, params["blocks"])
    params["blocks"]["dense"]["ffn_norm"] += normal(jax.random.key(6), (DENSE.layers, DENSE.hidden), 0.3)
    pretrained.save_pretrained(directory, config, params)
    tokenizer = write_tokenizer(directory)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join([around[0], "$A", around[1]]).strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config_file = directory / "tokenizer_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module", params=["<s> before", "nothing", "around"])
def pair(request, tmp_path_factory):
    """Our model and the harness's, of one directory."""
    around = {"<s> before": ("<s>", ""), "nothing": ("", ""), "around": ("<s>", "</s>")}[request.param]
    directory = write_model(tmp_path_factory.mktemp("model") / "dense", around=around)
    # with its cache, 0.4.13 scores a continuation at another's place where their inputs are equal, not their contexts
    theirs = HFLM(str(directory), device="cpu", dtype="float32", batch_size=3, logits_cache=False)
    return NemoeLM(str(directory), batch_size=3), theirs


def instances(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def words(*numbers):
    return " ".join(f"word{number}" for number in numbers)


RNG = np.random.default_rng(7)
LONG = words(*RNG.integers(0, 69, 130))  # longer than the context of 96
PAIRS = [
    ("", words(3)),
    ("", "<s> " + words(3)),
    ("", words(3, 4, 5)),
    (words(1, 2), " " + words(3)),
    (words(1, 2), " " + words(4)),  # shares its pass with the one above
    (words(1, 2, 3), " " + words(4)),
    (words(1, 2), " " + words(3, 4)),  # as does this one with the one above, scoring more
    (words(1, 2) + "  ", words(3, 8)),  # white space moves to the continuation
    ("<s> " + words(1, 2), " " + words(9)),
    (words(1) + " </s> " + words(2), " " + words(9, 60)),
    (words(*range(40)), " " + words(40, 41, 5)),
    (LONG, " " + words(1, 2)),
    (words(1), " " + LONG[:500]),
]


def test_log_likelihoods_are_those_of_the_harness_s_own_model(pair):
    ours, theirs = pair
    expected = theirs.loglikelihood(instances("loglikelihood", *PAIRS))
    found = ours.loglikelihood(instances("loglikelihood", *PAIRS))
    np.testing.assert_allclose([logprob for logprob, _ in found], [logprob for logprob, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_greedy_continuation_is_called_one(pair):
    ours, theirs = pair
    context = words(5, 6, 7)
    ids = theirs.tok_encode(context)
    following = theirs.model.generate(theirs.tokenizer(context, return_tensors="pt").input_ids, max_new_tokens=3)
    text = theirs.tokenizer.decode(following[0, len(ids) :], skip_special_tokens=False)
    requests = instances("loglikelihood", (context, " " + text), (context, " " + words(1, 2, 3)))
    found = ours.loglikelihood(requests)
    assert found[1][1] is False
    assert [greedy for _, greedy in found] == [greedy for _, greedy in theirs.loglikelihood(requests)]


def test_rolling_log_likelihoods_are_those_of_the_harness_s_own_model(pair):
    ours, theirs = pair
    texts = instances("loglikelihood_rolling", (words(4, 5),), (LONG,), (LONG + " " + LONG,), (words(*range(60)),))
    np.testing.assert_allclose(
        ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), atol=1e-3, rtol=1e-6
    )


CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: 2
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ANSWERS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["word7", " word1"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TEXTS = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
KINDS = {"choices": CHOICES, "answers": ANSWERS, "texts": TEXTS}


def write_tasks(directory):
    """A task of each kind, with its data."""
    rng = np.random.default_rng(3)
    with (directory / "data.jsonl").open("w") as file:
        for _ in range(12):
            question, options = words(*rng.integers(0, 69, rng.integers(1, 40))), rng.integers(0, 69, (4, 2))
            line = {"question": question, "options": [words(*o[: rng.integers(1, 3)]) for o in options]}
            print(json.dumps(line | {"answer": int(rng.integers(4)), "target": words(3)}), file=file)
    for kind, text in KINDS.items():
        (directory / f"{kind}.yaml").write_text(text.format(name=f"our_{kind}", data=directory / "data.jsonl"))


@pytest.mark.parametrize("pair", ["<s> before"], indirect=True)
@pytest.mark.parametrize("chat", [False, True])
def test_tasks_get_equal_scores(pair, tmp_path, chat, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_tasks(tmp_path)
    names = ["our_choices", "our_answers"] if chat else [f"our_{kind}" for kind in KINDS]
    results, samples = [], []
    for model in pair:
        loaded = TaskManager(include_path=str(tmp_path), include_defaults=False).load(names)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(1234)
        found = lm_eval.evaluate(
            model, loaded, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat, log_samples=True
        )
        results.append(found["results"])
        samples.append({name: [one["filtered_resps"] for one in of] for name, of in found["samples"].items()})
    ours, theirs = results
    for name in names:
        expected = {key: value for key, value in theirs[name].items() if "," in key and not isinstance(value, str)}
        assert {key: ours[name][key] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert expected
    assert samples[0]["our_answers"] == samples[1]["our_answers"]
    assert len({text for (text,) in samples[0]["our_answers"]}) > 3
    assert 0 < ours["our_choices"]["acc,none"] < 1


def test_the_harness_s_cache_of_requests_is_keyed_by_the_tokenizer_s_files(tmp_path, monkeypatch):
    """Tasks build their requests with the model's tokenizer; the harness keeps them by this name."""
    monkeypatch.setattr(lm_eval_model, "load_pretrained", lambda directory, **_: (DENSE, None))
    monkeypatch.setattr(lm_eval_model, "cache_dtype_of", lambda *_: None)
    directory = write_model(tmp_path / "dense")
    (tmp_path / "data.jsonl").write_text(json.dumps({"question": "word1", "options": ["word2", "word3"], "answer": 0}))
    spec = CHOICES.replace("num_fewshot: 2", "num_fewshot: 0").format(name="keyed", data=tmp_path / "data.jsonl")
    (tmp_path / "keyed.yaml").write_text(spec)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (task,) = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["keyed"])["tasks"].values()
    keys = []
    monkeypatch.setattr("lm_eval.api.task.load_from_cache", lambda file_name, cache: keys.append(file_name))

    def key():
        task.build_all_requests(rank=0, world_size=1, tokenizer_name=NemoeLM(str(directory)).tokenizer_name)
        return keys[-1]

    first = key()
    assert key() == first
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((directory / name).read_text())
        content |= {"post_processor": None} if name == "tokenizer.json" else {"add_bos_token": False}
        (directory / name).write_text(json.dumps(content))
        assert key() != first
        first = key()
    shutil.copytree(directory, tmp_path / "elsewhere")
    directory = tmp_path / "elsewhere"
    assert key() != first
