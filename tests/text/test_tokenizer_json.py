"""Hugging Face's tokenizer.json against the tokenizers library itself, on tokenizers trained here."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.load import StreamDecoder, load_tokenizer

CORPUS = [
    "Hello world, the quick brown fox jumps over the lazy dog. <s> and </s> [INST] foo [/INST]",
    "naïve façade 人人生而自由 😀",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
TEXTS = [
    "Hello world",
    " two  spaces\n\nand\ttabs ",
    "naïve 人人生 😀",
    "",
    "unseen: Ω𓀀",
    "fox<think>dog</think>",
    "a<s>b</s> [INST]",
]


def byte_level() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    library.add_tokens(["<think>", "  "])
    library.enable_truncation(3)
    return library


def metaspace() -> Library:
    """As Llama's: spaces as ▁, bytes for what is unknown, and merges that form `</s>` from its characters."""
    pieces = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted({*"".join(CORPUS)} - {" ", "😀"}),
        "▁",
        "<s",
        "</",
        "</s",
    ]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">")]
    library = Library(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return library


def unigram() -> Library:
    """As T5's: the control tokens are pieces of the model, which finds them in plain text."""
    characters = sorted({*"".join(CORPUS)} - {" "})
    library = Library(
        models.Unigram([(name, 0.0) for name in SPECIAL] + [("▁", -3.0)] + [(c, -4.0) for c in characters], 0)
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(SPECIAL)
    return library


def word_level() -> Library:
    """White space splits words, and the control tokens are words of the vocabulary."""
    words = [*SPECIAL, *dict.fromkeys(" ".join(CORPUS).split())]
    library = Library(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(SPECIAL)
    return library


KINDS = {"byte level": byte_level, "metaspace": metaspace, "unigram": unigram, "word level": word_level}


def save(library: Library, directory: Path, **files: dict) -> Path:
    library.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_the_library(kind, tmp_path):
    library = KINDS[kind]()
    ours = load_tokenizer(save(library, tmp_path))
    library.no_truncation()
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (library.get_vocab_size(), 1, 2)
    rng = random.Random(5)
    characters = [*set("".join(CORPUS) + " \n"), "Ω", "  ", "ing"]
    texts = TEXTS[:-1] + ["".join(rng.choices(characters, k=40)) for _ in range(100)]
    for text in (text for text in texts if not any(name in text for name in SPECIAL)):
        ids = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.encode(text, bos=True, eos=True) == [1, *ids, 2]
        assert ours.decode([1, *ids, 2]) == library.decode([1, *ids, 2], skip_special_tokens=True)
        assert ours.decode([1, *ids, 2], skip_special=False) == library.decode([1, *ids, 2], skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_text_stay_text(kind, tmp_path):
    ours = load_tokenizer(save(KINDS[kind](), tmp_path))
    assert set(SPECIAL) == ours.control.keys()
    for text in ("a<s>b</s> [INST] c", "<s>", "</s></s>", " [INST] ", "<s><s", "</s"):
        ids = ours.encode(text)
        assert not {1, 2, 3, 4} & set(ids)
        if kind != "word level":  # to which these are unknown words
            assert ours.decode(ids).strip() == text.strip()


def test_text_that_spells_control_tokens_has_the_librarys_ids_for_plain_text(tmp_path):
    library = byte_level()
    ours = load_tokenizer(save(library, tmp_path))
    library.no_truncation()
    library.encode_special_tokens = True
    assert ours.encode(TEXTS[-1]) == library.encode(TEXTS[-1], add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_encoded_as_the_library_encodes_the_written_out_text(kind, tmp_path):
    library = KINDS[kind]()
    ours = load_tokenizer(save(library, tmp_path))
    library.no_truncation()
    written = "<s>[INST]Hello the fox[/INST] lazy </s>[INST]dog[/INST]"
    parts = [1, 3, "Hello the fox", 4, " lazy ", 2, 3, "dog", 4]
    assert ours.encode_parts(parts) == library.encode(written, add_special_tokens=False).ids


def test_stripping_rules_of_control_tokens_hold_for_control_ids_only(tmp_path):
    library = metaspace()
    library.add_special_tokens([AddedToken("<mask>", lstrip=True, rstrip=True)])
    ours = load_tokenizer(save(library, tmp_path))
    written = library.encode("fox <mask> dog", add_special_tokens=False).ids
    assert ours.encode_parts(["fox ", library.token_to_id("<mask>"), " dog"]) == written
    assert ours.decode(ours.encode("fox <mask> dog")) == "fox <mask> dog"


def test_added_tokens_that_are_not_special_are_text_unless_the_template_writes_them(tmp_path):
    library = byte_level()
    think = library.token_to_id("<think>")
    plain = load_tokenizer(save(library, tmp_path))
    assert think in plain.encode("a<think>b") and "<think>" not in plain.control
    (tmp_path / "chat_template.jinja").write_text("{{ '<think>' }}  {# <unk> #}")
    written = load_tokenizer(tmp_path)
    assert think not in written.encode("a<think>b") and written.control["<think>"] == think
    assert library.token_to_id("  ") in written.encode("a  b")  # white space is text
    assert written.decode([think]) == plain.decode([think]) == "<think>"


def test_the_side_files_name_control_tokens(tmp_path):
    config = {
        "bos_token": None,
        "eos_token": {"content": "[/INST]", "special": True},
        "unk_token": "<unk>",
        "added_tokens_decoder": {"331": {"content": "  ", "special": True}},
        "extra_special_tokens": ["<think>"],
    }
    library = byte_level()
    directory = save(
        library, tmp_path, tokenizer_config=config, special_tokens_map={"eos_token": "</s>", "pad_token": "<s>"}
    )
    ours = load_tokenizer(directory / "tokenizer.json")
    assert (ours.bos_id, ours.eos_id) == (None, 4)
    assert ours.encode("x", bos=True, eos=True) == [*ours.encode("x"), 4]
    assert ours.template_variables == {"eos_token": "[/INST]", "unk_token": "<unk>", "pad_token": "<s>"}
    assert {"<think>", "  "} < ours.control.keys()
    assert ours.decode([library.token_to_id("<think>")]) == ""


def test_an_end_token_that_is_a_bare_piece_of_the_model_is_a_control_token(tmp_path):
    library = word_level()
    spec = json.loads(library.to_str())
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
    ours = load_tokenizer(tmp_path)
    assert ours.eos_id == 2 and ours.encode("fox </s> dog") == [*ours.encode("fox"), 0, *ours.encode("dog")]


def test_pieces_are_readable(tmp_path):
    ours = load_tokenizer(save(byte_level(), tmp_path))
    pieces = [ours.piece(i) for i in ours.encode("Hello é", bos=True)]
    assert pieces[0] == "<s>" and "".join(pieces[1:]).startswith("Hello ") and all(pieces)
    other = tmp_path / "other"
    other.mkdir()
    ours = load_tokenizer(save(metaspace(), other))
    assert [ours.piece(i) for i in ours.encode("f😀", eos=True)] == [
        " ",
        "f",
        "<0xF0>",
        "<0x9F>",
        "<0x98>",
        "<0x80>",
        "</s>",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_pieces_join_to_the_whole(kind, tmp_path):
    ours = load_tokenizer(save(KINDS[kind](), tmp_path))
    for text in [*TEXTS, " ".join(TEXTS) * 5]:
        ids = ours.encode(text, bos=True, eos=True)
        for skip in (True, False):
            for block in (1, 7):
                stream = StreamDecoder(ours, skip)
                shown = [stream.push(*ids[first : first + block]) for first in range(0, len(ids), block)]
                assert "".join([*shown, stream.flush()]) == ours.decode(ids, skip)


def test_ids_without_a_token_are_nothing(tmp_path):
    """As in transformers: ids beyond the vocabulary, and gaps in it."""
    tokenizer = byte_level()
    spec = json.loads(tokenizer.to_str())
    first = tokenizer.get_vocab_size() + 3
    spec["model"]["vocab"]["late"] = first
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    transformers = pytest.importorskip("transformers")
    ours, theirs = (
        load_tokenizer(tmp_path),
        transformers.PreTrainedTokenizerFast(tokenizer_file=f"{tmp_path}/tokenizer.json"),
    )
    assert ours.vocab_size == first + 1
    ids = [*ours.encode("sky"), first - 1, first + 9, *ours.encode("blue")]
    assert ours.decode(ids) == theirs.decode(ids) == "skyblue"
    assert [ours.piece(first - 1), ours.piece(first + 9)] == ["", ""]
    assert np.flatnonzero(~ours.known(first + 3)).tolist() == [first - 3, first - 2, first - 1, first + 1, first + 2]


def test_foreign_control_ids_are_refused(tmp_path):
    ours = load_tokenizer(save(byte_level(), tmp_path))
    with pytest.raises(UserError, match="no control token with id 40"):
        ours.encode_parts(["a", 40])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": None}, "expected model.vocab"),
        ({"added_tokens": [{"id": 1}]}, "expected model.vocab and added_tokens"),
        ({"added_tokens": [{"id": 7, "content": "<s>", "special": True}]}, "tokenizers library|id of <s> disagrees"),
        ({"pre_tokenizer": {"type": "Nonsense"}}, "tokenizers library"),
    ],
)
def test_a_broken_file_is_one_clear_line(change, message, tmp_path):
    spec = json.loads(byte_level().to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(caught.value) and "\n" not in str(caught.value)
