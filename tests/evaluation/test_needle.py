"""Needles in haystacks: where they lie, and their scores against whole logits without a cache."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.cli.main import main
from nemoe_jax.errors import UserError
from nemoe_jax.evaluation import needle
from nemoe_jax.evaluation.needle import LINE, find_needles, haystack
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec import schema
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.configs import DENSE, MIXTRAL

CONFIG = DENSE.replace(context=256, vocab=128)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


def write_characters(directory):
    """A tokenizer of single characters."""
    characters = {chr(code): code for code in range(32, 127)} | {"\n": 10, "<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "dense"
    pretrained.save_pretrained(directory, CONFIG, schema.initialize(CONFIG, jax.random.key(1)))
    write_characters(directory)
    (directory.parent / "filler.txt").write_text(FILLER)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


def test_a_tokenizer_that_puts_no_bos_before_a_text_puts_none_before_a_haystack(directory, tmp_path):
    spec = json.loads((directory / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": None}))
    tokenizer = load_tokenizer(tmp_path)
    hay = haystack(tokenizer, np.array(tokenizer.encode(FILLER)), 150, 50, 4711234, 9876543)
    assert tokenizer.bos_id == 1 and 1 not in hay.prompt and len(hay.prompt + hay.answer) == 150


@pytest.mark.parametrize("length", [101, 150, 256])
@pytest.mark.parametrize("depth", [0, 25, 62.5, 100])
def test_the_line_lies_at_its_depth(tokenizer, length, depth):
    filler = np.array(tokenizer.encode(FILLER))
    hay = haystack(tokenizer, filler, length, depth, 4711234, 9876543)
    text = tokenizer.decode(hay.prompt + hay.answer)
    planted = f"{LINE} 4711234.\n"
    assert len(hay.prompt + hay.answer) == length
    assert hay.prompt[0] == tokenizer.bos_id
    assert text.count("4711234") == 2 and text.endswith(f"{LINE} 4711234")
    assert text[hay.at - 1 :].startswith(planted)  # the text is without <s>
    hay_alone = text[: hay.at - 1] + text[hay.at - 1 + len(planted) : -len(f"{LINE} 4711234")]
    assert hay_alone == (FILLER * 3)[: len(hay_alone)]
    assert hay.at - 1 == round(len(hay_alone) * depth / 100)
    assert tokenizer.decode(hay.wrong) == " 9876543"


@pytest.mark.parametrize(
    "config, chunk", [(CONFIG, 48), (MIXTRAL.replace(context=256, vocab=128), 2048)], ids=["dense", "mixtral"]
)
def test_scores_are_those_of_one_pass_without_a_cache(config, chunk, tokenizer, monkeypatch):
    monkeypatch.setattr(needle, "CHUNK", chunk)
    params = schema.initialize(config, jax.random.key(2))
    filler = np.array(tokenizer.encode(FILLER))
    findings = find_needles(config, params, tokenizer, filler, [120, 256], [0, 50], seed=3)
    whole = jax.jit(lambda params, tokens: jax.nn.log_softmax(forward(config, params, tokens).logits))
    assert [(one.tokens, one.depth) for one in findings] == [(120, 0), (120, 50), (256, 0), (256, 50)]
    for one in findings:
        hay = haystack(tokenizer, filler, one.tokens, one.depth, one.number, one.wrong_number)
        for answer, found in ((hay.answer, one.logprob), (hay.wrong, one.wrong_logprob)):
            tokens = np.zeros((1, 256), np.int32)
            tokens[0, : one.tokens] = hay.prompt + answer
            at = len(hay.prompt) - 1 + np.arange(len(answer))
            log_p = np.asarray(whole(params, tokens))[0, at]
            assert found == pytest.approx(log_p[np.arange(len(answer)), answer].sum(), abs=1e-3)
            if answer is hay.answer:
                assert one.found == (log_p.argmax(axis=1) == answer).all()


def test_a_number_that_greedy_decoding_gives_is_found(tokenizer):
    """With every layer's output at zero and a head that foresees the answer's tokens one after another."""
    answer = tokenizer.encode(" 4719235")  # each token has one that follows
    config = CONFIG.replace(hidden=128)
    params = jax.tree.map(lambda array: 0 * array, schema.initialize(config, jax.random.key(2)))
    params["embed"] = np.eye(128, dtype=np.float32)
    params["norm"] = np.ones(128, np.float32)
    head = np.zeros((128, 128), np.float32)
    last = tokenizer.encode("s")[0]
    head[[last, *answer[:-1]], answer] = 1
    params["head"] = head
    cache = needle._empty(config, 256, "float32")
    found = needle.answer_score(config, params, cache, last, answer)
    assert found[1] is True
    wrong = needle.answer_score(config, params, cache, last, [*answer[:-1], answer[0]])
    assert wrong[1] is False and wrong[0] < found[0]


def test_the_command_reports_every_length_and_depth(directory, capsys):
    command = ["perplexity", str(directory), str(directory.parent / "filler.txt"), "--needle"]
    assert main([*command, "--lengths", "120", "200", "--depths", "0", "100", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["of"] == 4 and figures["found"] == sum(one["found"] for one in figures["findings"])
    assert len({one["number"] for one in figures["findings"]}) == 4
    assert main([*command, "--lengths", "120", "--depths", "0", "50", "--kv-cache", "int8"]) == 0
    out = capsys.readouterr().out
    assert "50 %" in out and "of 2 found" in out


ERRORS = {
    "too short": ({"lengths": [20]}, "expected lengths of at least the 75 tokens"),
    "too long": ({"lengths": [257]}, "expected lengths up to the context of 256 tokens, got 257"),
    "depth": ({"depths": [120]}, "expected depths from 0 to 100 per cent, got 120"),
    "no row": ({"vocab": 100}, "gives token 122; the model's embedding has 100 rows"),
    "no filler": ({"filler": np.zeros(0, np.int32)}, "the filler text is empty"),
}


@pytest.mark.parametrize("change, message", ERRORS.values(), ids=ERRORS.keys())
def test_bad_haystacks_are_refused(tokenizer, change, message):
    given = {"filler": np.array([40, 41]), "lengths": [128], "depths": [0]} | change
    config = CONFIG.replace(vocab=given.get("vocab", CONFIG.vocab))
    with pytest.raises(UserError, match=message):
        find_needles(config, {}, tokenizer, given["filler"], given["lengths"], given["depths"])
