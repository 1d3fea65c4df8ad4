"""A tokenizer.model with Hugging Face's files beside it, against transformers and sentencepiece."""

import json
from pathlib import Path

import pytest
import sentencepiece
import transformers

from convert.gguf.tokenizer import read_vocabulary
from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.render import encode_with_assistant_mask, render_chat
from nemoe_jax.text.tokenizers.load import load_tokenizer
from nemoe_jax.text.tokenizers.sentencepiece_json import SentencePieceDirectory
from tests.text.test_chat_template import CHATML

SENTENCES = ["the cat sat on the mat and the dog ran to the façade", "Hello world, naïve user assistant system"] * 30
TEXTS = ["the cat", "Hello  world\n", " the façade 人 and", "", "cat<think>the", "a<think> b"]
CHAT = [{"role": "user", "content": " the cat "}, {"role": "assistant", "content": "Hello"}]
ADDED = {"<|im_end|>": 320, "<|im_start|>": 321, "<think>": 322}
NAMES = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
CLASS = {"tokenizer_class": "LlamaTokenizer", **NAMES, "chat_template": CHATML}


def decoder(**more: bool) -> dict:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    listed = {"0": "<unk>", "1": "<s>", "2": "</s>"} | {str(i): name for name, i in ADDED.items()}
    return {i: {"content": name, "special": name != "<think>", **plain, **more} for i, name in listed.items()}


DIRECTORIES = {
    "all three": {
        "tokenizer_config.json": CLASS | {"add_bos_token": True, "legacy": False},
        "special_tokens_map.json": NAMES,
        "added_tokens.json": ADDED,
    },
    "legacy": {
        "tokenizer_config.json": CLASS | {"add_bos_token": True, "add_eos_token": True, "legacy": True},
        "special_tokens_map.json": NAMES | {"additional_special_tokens": ["<|im_start|>"]},
        "added_tokens.json": ADDED,
    },
    "decoder": {"tokenizer_config.json": CLASS | {"add_bos_token": False, "added_tokens_decoder": decoder()}},
    "stripping": {"tokenizer_config.json": CLASS | {"added_tokens_decoder": decoder(rstrip=True)}},
    "the map goes before": {
        "tokenizer_config.json": CLASS | {"eos_token": "</s>"},
        "special_tokens_map.json": {"eos_token": {"content": "<|im_end|>", "lstrip": False, "rstrip": False}},
        "added_tokens.json": ADDED,
    },
    "unlisted": {"tokenizer_config.json": CLASS},  # the end token gets the next id
    "as objects": {
        "tokenizer_config.json": CLASS
        | {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "add_bos_token": True},
        "added_tokens.json": ADDED,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("spm") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(prefix),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def make(directory: Path, model: Path, files: dict[str, dict]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model.read_bytes())
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_is_read_as_transformers_reads_it(name, model, tmp_path):
    make(tmp_path, model, DIRECTORIES[name])
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    for text in TEXTS:
        assert ours.encode_prompt(text) == theirs(text).input_ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text, add_special_tokens=False).input_ids), text
    for prompt in (False, True):
        expected = theirs.apply_chat_template(CHAT[:1], add_generation_prompt=prompt, return_dict=False)
        assert render_chat(ours, CHAT[:1], generation_prompt=prompt) == expected
    ids, said = encode_with_assistant_mask(ours, CHAT)
    assert ids == theirs.apply_chat_template(CHAT, return_dict=False)
    assert [i for i, mark in zip(ids, said, strict=True) if mark][-1] == ours.eos_id


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("cleaned", [False, True])
def test_plain_text_has_the_ids_of_sentencepiece(kind, cleaned, tmp_path):
    rules = {"normalization_rule_name": "nmt_nfkc"} if cleaned else {"normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=310,
        model_type=kind,
        byte_fallback=True,
        remove_extra_whitespaces=cleaned,
        hard_vocab_limit=False,
        minloglevel=2,
        **rules,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": "<s>"}))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, SentencePieceDirectory) and ours.version == "v1"  # no template: Mistral's first format
    for text in ("the cat", "Hello  world", "the façade 人人 and ﬁ", "x" * 9):
        assert ours.encode_prompt(text) == [1, *library.encode(text)], text


def test_a_file_that_is_named_itself_and_mistral_s_names_are_read_alone(model, tmp_path):
    make(tmp_path, model, DIRECTORIES["all three"])
    assert load_tokenizer(tmp_path / "tokenizer.model").chat_template is None
    (tmp_path / "tokenizer.model").rename(tmp_path / "tokenizer.model.v3")
    assert load_tokenizer(tmp_path).version == "v3"


def test_gguf_names_the_added_tokens_and_the_end_token(model, tmp_path):
    make(tmp_path, model, DIRECTORIES["all three"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, len(theirs) + 9)
    assert [piece.text for piece in vocabulary.pieces] == theirs.convert_ids_to_tokens(range(len(theirs)))
    types = {piece.text: piece.type for piece in vocabulary.pieces[len(theirs) - 3 :]}
    assert types == {"<|im_end|>": 3, "<|im_start|>": 3, "<think>": 4}  # control, control, user-defined
    assert vocabulary.chat_templates == {"default": CHATML}
    assert vocabulary.tokenizer.eos_id == theirs.eos_token_id


def test_a_broken_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x01nothing")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
