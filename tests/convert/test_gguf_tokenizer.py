"""Tokenizers in GGUF files: llama.cpp gives our token ids and renders our chats."""

import json
from pathlib import Path

import pytest
import sentencepiece
from gguf import GGUFReader
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from convert.gguf.export import GgufOptions, to_gguf
from nemoe_jax.checkpoints.gguf.pre_tokenizers import LLAMA3, QWEN2, TEKKEN
from nemoe_jax.errors import UserError
from nemoe_jax.text.chat.render import render_chat
from nemoe_jax.text.tokenizers.load import load_tokenizer
from nemoe_jax.text.tokenizers.tekken import read_json
from tests.support.llama_server import DATA, MODELS, LlamaCpp, cut, save

TEXTS = [
    "def f(x):\n    return {k: v for k, v in x}  # comment\n\n\tprint(f'{x:>3}')\r\n",
    "Straße, Übergrößenträger; ÄÖÜ äöü ß – „Zitat“ und ÄnderungÜber",
    "人人生而自由,在尊严和权利上一律平等。",
    "emoji 😀👨‍👩‍👧 🇩🇪",
    "  leading   and    many     spaces \n\n\n \n and\ttabs\t\t ",
    "1234567890 3.14159 1,000,000 2²",
    "camelCase HTTPServer don't WE'RE snake_case/path//x",
    "spelled out: <s> </s> [INST] x [/INST]",
    " ",
    "\n",
]


def train(directory: Path, pre_tokenizer) -> None:
    """Makes a byte-level BPE with control tokens and one ordinary added token."""
    library = Library(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    library.train_from_iterator(TEXTS[:7] * 4, trainer)
    library.add_tokens(["<think>"])
    library.save(str(directory / "tokenizer.json"))


def split_by(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def copy(source: Path, directory: Path, name: str) -> None:
    (directory / name).write_bytes(source.read_bytes())


def cut_v7(directory: Path) -> None:
    cut(directory, 6000)
    spec = read_json(directory / "tekken.json")
    spec["config"]["version"] = "v7"
    (directory / "tekken.json").write_text(json.dumps(spec))


DIGITS_FIRST = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


def rewrite(directory: Path) -> None:
    """Mistral 7B's tokenizer as transformers rewrites it, as tokenizer.json alone."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    original = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model.v1"))
    vocab = {original.id_to_piece(i): i for i in range(original.vocab_size())}
    merges = convert.generate_merges(vocab, {piece: original.get_score(i) for piece, i in vocab.items()})
    library = Library(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    library.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)


TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
TOKENIZERS = {
    "tekken": lambda to: cut(to, 6000),
    "tekken-v7": cut_v7,
    "v1": lambda to: copy(DATA / "tokenizer.model.v1", to, "tokenizer.model.v1"),
    "v3": lambda to: copy(DATA / "mistral_instruct_tokenizer_240323.model.v3", to, "tokenizer.model.v3"),
    "v7": lambda to: copy(DATA / "mistral_instruct_tokenizer_241114.model.v7", to, "tokenizer.model.v7"),
    "gpt-2": lambda to: train(to, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-bpe": lambda to: train(to, split_by(LLAMA3)),
    "tekken-json": lambda to: train(to, split_by(TEKKEN)),
    "qwen2": lambda to: train(to, split_by(QWEN2)),
    "smollm": lambda to: train(to, DIGITS_FIRST),
    "llama-json": rewrite,
}


def small_model(directory: Path, make) -> Path:
    """A model as small as llama.cpp takes, with the tokenizer that `make` makes and some idle rows."""
    (directory / "tokenizer").mkdir(parents=True)
    make(directory / "tokenizer")
    vocab = load_tokenizer(directory / "tokenizer").vocab_size + 9
    config = MODELS["dense"].replace(hidden=32, heads=2, kv_heads=1, layers=1, ffn=32, vocab=vocab)
    save(directory / "model", config, directory / "tokenizer")
    return directory / "model"


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizers(request, tmp_path_factory):
    """(ours, llama.cpp's) of each kind of tokenizer."""
    directory = small_model(tmp_path_factory.mktemp("model"), TOKENIZERS[request.param])
    to_gguf(directory, directory / "model.gguf", GgufOptions())
    return load_tokenizer(directory), LlamaCpp(directory / "model.gguf")


def test_llama_cpp_gives_our_token_ids(tokenizers):
    ours, theirs = tokenizers
    texts = [*TEXTS, "a<think>b"]
    expected = {text: ours.encode(text) for text in texts}
    assert {text: theirs.tokenize(text, parse_special=False) for text in texts} == expected
    assert theirs.tokenize(texts[0], add_special=True) == ours.encode_prompt(texts[0])


CHATS = [
    ["user: What is 2+2?"],
    ["system: Be brief.", "user: Hello"],
    ["user: Hi", "assistant: Hello there.", "user: And\n\nthen?"],
    ["system: One.", "system: Two.", "user: A", "user: B", "assistant: C", "user: D"],
    ["system: One.", "user: A", "assistant: B", "assistant: C", "user: D", "user: E"],
]


@pytest.mark.parametrize("chat", CHATS)
def test_llama_cpp_renders_our_chats(tokenizers, chat):
    ours, theirs = tokenizers
    messages = [dict(zip(("role", "content"), line.split(": ", 1), strict=True)) for line in chat]
    assert theirs.chat(messages) == render_chat(ours, messages)


CHATML = "{% for message in messages %}<|im_start|>{{ message.content }}{% endfor %}"


def rewritten(directory: Path) -> None:
    """As ChatML models made from Mistral 7B: both files, and a token and a template that only the JSON knows of."""
    copy(DATA / "tokenizer.model.v1", directory, "tokenizer.model")
    original = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    library = Library(models.BPE({original.id_to_piece(i): i for i in range(32000)}, [], byte_fallback=True))
    library.add_special_tokens(["<s>", "</s>", "<|im_start|>"])
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHATML)


def test_a_rewritten_sentencepiece_tokenizer_goes_by_its_original(tmp_path):
    directory = small_model(tmp_path, rewritten)
    to_gguf(directory, tmp_path / "model.gguf", GgufOptions())
    theirs = LlamaCpp(tmp_path / "model.gguf")
    original, front = load_tokenizer(directory / "tokenizer.model"), load_tokenizer(directory)
    assert theirs.tokenize(TEXTS[1], parse_special=False) == original.encode(TEXTS[1])
    start = front.control_id("<|im_start|>")
    assert start >= original.vocab_size
    assert theirs.chat([{"role": "user", "content": "Hi there"}]) == [1, start, *original.encode("Hi there")]


def sentencepiece_model(**options):
    def make(directory: Path) -> None:
        prefix = str(directory / "tokenizer")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 9), model_prefix=prefix, minloglevel=2, **options
        )

    return make


UNIGRAM = sentencepiece_model(vocab_size=110)
NORMALIZING = sentencepiece_model(vocab_size=400, model_type="bpe", byte_fallback=True)


def fewer_merges(directory: Path) -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "c", "ab", "bc", "abc", "▁"]
    merges = [("b", "c"), ("a", "bc")]
    library = Library(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.save(str(directory / "tokenizer.json"))


ERRORS = {
    "unigram": (UNIGRAM, "wants a SentencePiece model of type BPE"),
    "normalizing": (NORMALIZING, "normalizes text .nmt_nfkc."),
    "unknown pattern": (lambda to: train(to, split_by(r"\w+")), r"no name for its way to cut words .*: \\w\+"),
    "merges left out": (fewer_merges, "not SentencePiece's BPE: 'a' and 'b' are tokens and make one, but no merge"),
    "not byte-level": (lambda to: train(to, pre_tokenizers.Whitespace()), "expects a byte-level BPE"),
    "space prefix": (lambda to: train(to, pre_tokenizers.ByteLevel(add_prefix_space=True)), "expects a byte-level BPE"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(case, tmp_path):
    make, message = ERRORS[case]
    directory = small_model(tmp_path, make)
    with pytest.raises(UserError, match=message):
        to_gguf(directory, tmp_path / "new" / "model.gguf", GgufOptions())
    assert not (tmp_path / "new").exists()


def test_the_config_s_other_end_token_ends_a_turn(tmp_path):
    directory = small_model(tmp_path, TOKENIZERS["llama-bpe"])
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | {"eos_token_id": [2, 5]}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4000, 4]}))
    to_gguf(directory, tmp_path / "model.gguf", GgufOptions())
    fields = GGUFReader(tmp_path / "model.gguf").fields
    ids = {
        name: fields[f"tokenizer.ggml.{name}_token_id"].contents()
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    assert ids == {"bos": 1, "eos": 2, "eot": 5, "eom": 4, "unknown": 0, "padding": 3}
