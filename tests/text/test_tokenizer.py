"""Tekken and SentencePiece against mistral-common, which carries the real files; loading, cutting, streaming."""

import base64
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.text.tokenizers.load import StreamDecoder, Tokenizer, cut_tekken, load_tokenizer, text_from_bytes

mistral_common = pytest.importorskip("mistral_common")
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

DATA = Path(mistral_common.__file__).parent / "data"
TEKKEN = DATA / "tekken_240718.json"
SENTENCEPIECE = sorted(DATA.glob("*.model*"))

TEXTS = {
    "latin": "The Quick brown fox — naïve façade, Zażółć gęślą jaźń; don't, WE'LL, iPhone15",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΑΒΓ",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "bengali": "আমি বাংলায় গান গাই",
    "tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல்",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "georgian": "გთხოვთ ახლავე გაიაროთ რეგისტრაცია",
    "armenian": "Կրնամ ապակի ուտել և ինծի անհանգիստ չըներ",
    "ethiopic": "ሰማይ አይታረስ ንጉሥ አይከሰስ",
    "han": "人人生而自由，在尊严和权利上一律平等。𠮷野家",
    "japanese": "いろはにほへと　ちりぬるを カタカナ ﾊﾝｶｸ",
    "korean": "다람쥐 헌 쳇바퀴에 타고파 ㄱㄴㄷ",
    "khmer": "ខ្ញុំអាចញុំកញ្ចក់បាន",
    "code": "def f(x: int) -> str:\n\treturn f'{x!r:>10}'  # ok\n\n\nclass A:\n    pass\r\n"
    "\tif (a&&b||!c) { x[i]+=0xFF; }\n",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 ☕️ 🤷🏿‍♀️",
    "numbers": "3.14159 1,000,000 1e-5 2024-07-18 ½ ² ٣",
    "spaces": "a  b   c    d\t\t e \n\n\n  \n\t f\u00a0g\u2003h\u3000i  ",
    "only spaces": "       ",
    "only lines": "\n\n\r\n\n",
    "controls": "<s>[INST] hi [/INST]</s><unk><pad>[SYSTEM_PROMPT]<SPECIAL_20>"
    "[AVAILABLE_TOOLS][TOOL_CALLS] [control_9] <0x0A>",
    "odd characters": "\x00\x01\x7f\ufeff\u200b\u202e\ufffd\ufffe\U0010ffff\ue000",
    "combining": "e\u0301 e\u0301\u0301 A\u030a ﬁ Å",
    "one piece": "a" * 3000 + " " * 3000 + "!" * 500,
    "invalid bytes": text_from_bytes(b"ok \xff\xfe \xc3( \xe2\x82 \xf0\x9f\x98 \xed\xa0\x80 end\xc3"),
    "blank": " ",
    "nothing": "",
}


@pytest.fixture(scope="module")
def tekken() -> Tokenizer:
    return load_tokenizer(TEKKEN)


@pytest.fixture(scope="module")
def reference() -> Tekkenizer:
    return Tekkenizer.from_file(TEKKEN)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cut") / "tekken.json"
    cut_tekken(TEKKEN, path, 1500)
    return path


def random_texts(count: int) -> list[str]:
    """Seeded mixtures of all the samples' characters, control names and arbitrary code points."""
    rng = random.Random(20240718)
    alphabet = [*"".join(TEXTS.values()), "[INST]", "</s>", "<s>", "\n", "  ", " the", "ing"]
    made = []
    for _ in range(count):
        parts = rng.choices(alphabet, k=rng.randrange(1, 80))
        parts += [chr(code) for code in rng.choices(range(0x110000), k=5) if not 0xD800 <= code < 0xE000]
        rng.shuffle(parts)
        made.append("".join(parts))
    return made


@pytest.mark.parametrize("name", TEXTS)
def test_tekken_gives_the_ids_and_texts_of_mistral_common(name, tekken, reference):
    text = TEXTS[name]
    ids = tekken.encode(text)
    assert ids == reference.encode(text, bos=False, eos=False)
    assert tekken.encode(text, bos=True, eos=True) == reference.encode(text, bos=True, eos=True)
    assert tekken.decode(ids) == text == reference.decode(ids)
    assert tekken.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(tekken.control.values())


def test_tekken_equals_mistral_common_on_random_texts(tekken, reference):
    for text in random_texts(400):
        assert tekken.encode(text) == reference.encode(text, bos=False, eos=False)
        assert tekken.decode(tekken.encode(text)) == text


def test_tekken_equals_mistral_common_on_random_ids(tekken, reference):
    rng = np.random.default_rng(7)
    for _ in range(200):
        ids = [*rng.integers(0, 1300, 10), *rng.integers(0, tekken.vocab_size, 10)]  # many bytes and control tokens
        rng.shuffle(ids)
        ids = [int(i) for i in ids]
        assert tekken.decode(ids) == reference.decode(ids)
        kept = reference.decode(ids, special_token_policy=SpecialTokenPolicy.KEEP)
        assert tekken.decode(ids, skip_special=False) == kept


def test_tekken_knows_its_control_tokens(tekken, reference):
    assert (tekken.vocab_size, tekken.bos_id, tekken.eos_id) == (131072, 1, 2) == (reference.n_words, 1, 2)
    assert len(tekken.control) == reference.num_special_tokens == 1000
    for name in (
        "<unk>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "<pad>",
        "[TOOL_CONTENT]",
        "<SPECIAL_20>",
        "<SPECIAL_999>",
    ):
        assert tekken.control_id(name) == reference.get_special_token(name)
    with pytest.raises(UserError, match="no control token <nonsense>"):
        tekken.control_id("<nonsense>")


def test_tekken_pieces_are_readable_and_join_to_the_text(tekken):
    assert [tekken.piece(i) for i in (1, 3, 1000 + ord("a"), 1000 + 0xE2, 999)] == [
        "<s>",
        "[INST]",
        "a",
        "<0xE2>",
        "<SPECIAL_999>",
    ]
    text = TEXTS["code"] + TEXTS["latin"]
    assert "".join(map(tekken.piece, tekken.encode(text))) == text


def test_lone_surrogates_and_pairs_read_as_mistral_common_reads_them(tekken, reference):
    for text in ("a\ud800b", "\udc80", "pair \ud83d\ude00!"):
        assert tekken.encode(text) == reference.encode(text, bos=False, eos=False)
    assert tekken.decode(tekken.encode("pair \ud83d\ude00!")) == "pair 😀!"
    assert load_tokenizer(SENTENCEPIECE[0]).encode("a\ud800b") == load_tokenizer(SENTENCEPIECE[0]).encode("a\ufffdb")


@pytest.mark.parametrize("path", SENTENCEPIECE, ids=lambda path: path.name)
def test_sentencepiece_gives_the_ids_and_texts_of_mistral_common(path):
    ours, theirs = load_tokenizer(path), SentencePieceTokenizer(path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.n_words, theirs.bos_id, theirs.eos_id)
    assert ours.version == theirs.version
    for text in [*TEXTS.values(), *random_texts(60)]:
        ids = ours.encode(text, bos=True, eos=True)
        assert ids == theirs.encode(text, bos=True, eos=True)
        assert ours.decode(ids) == theirs.decode(ids)
        assert not set(ids[1:-1]) & theirs.special_ids
    rng = np.random.default_rng(3)
    for _ in range(50):
        ids = rng.integers(0, ours.vocab_size, 20).tolist()
        assert ours.decode(ids) == theirs.decode(ids)


def test_sentencepiece_pieces_and_names():
    tokenizer = load_tokenizer(DATA / "mistral_instruct_tokenizer_240323.model.v3")
    ids = tokenizer.encode("Hello 𓀀", bos=True)
    assert [tokenizer.piece(i) for i in ids[:2]] == ["<s>", " Hello"]
    assert [tokenizer.piece(i) for i in ids[-4:]] == ["<0xF0>", "<0x93>", "<0x80>", "<0x80>"]
    assert tokenizer.decode([1, *tokenizer.encode("Hi"), 2], skip_special=False) == "<s>Hi</s>"


def test_every_kind_takes_integers_of_numpy_and_ids_beyond_its_vocabulary(tekken):
    for tokenizer in (tekken, load_tokenizer(SENTENCEPIECE[0])):
        ids, beyond = tokenizer.encode("Hello there"), tokenizer.vocab_size
        assert tokenizer.decode(np.asarray(ids)) == "Hello there"
        assert tokenizer.decode([beyond, *ids, beyond + 5]) == "Hello there" and tokenizer.piece(beyond) == ""
        stream = StreamDecoder(tokenizer)
        assert "".join([*map(stream.push, [ids[0], beyond, *ids[1:], beyond]), stream.flush()]) == "Hello there"
        assert tokenizer.known(beyond) is None
        assert tokenizer.known(beyond + 2).tolist() == [True] * beyond + [False] * 2
        with pytest.raises(UserError, match="token id -1 is outside"):
            tokenizer.decode([5, -1])
        with pytest.raises(UserError, match="token id -1 is outside"):
            tokenizer.piece(-1)


@pytest.mark.parametrize("name", TEXTS)
def test_streamed_pieces_join_to_the_whole(name, tekken):
    for tokenizer in (tekken, load_tokenizer(SENTENCEPIECE[0])):
        ids = [*tokenizer.encode(TEXTS[name][:400], bos=True, eos=True), *tokenizer.encode("[INST] more", eos=True)]
        for skip, block in itertools.product((True, False), (1, 2, 11)):
            stream, blocks = StreamDecoder(tokenizer, skip), range(0, len(ids), block)
            shown = [stream.push(*ids[first : first + block]) for first in blocks]
            assert "".join([*shown, stream.flush()]) == tokenizer.decode(ids, skip)


def test_stream_holds_back_unfinished_characters_only(tekken):
    stream = StreamDecoder(tekken)
    bytes_of = [1000 + byte for byte in "é😀x".encode()]
    assert [stream.push(i) for i in bytes_of] == ["", "é", "", "", "", "😀", "x"]
    assert [stream.push(1000 + 0xE2), stream.push(1000 + 0x82), stream.flush(), stream.flush()] == [
        "",
        "",
        "\ufffd",
        "",
    ]
    assert stream.push(1000 + ord("y")) == "y"


def test_stream_of_random_bytes_joins_to_the_whole(tekken):
    rng = np.random.default_rng(11)
    for _ in range(60):
        ids = (1000 + rng.choice([0x41, 0x80, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98], 60)).tolist()
        ids[30] = 2
        for block in (1, 5):
            stream = StreamDecoder(tekken)
            shown = [stream.push(*ids[first : first + block]) for first in range(0, len(ids), block)]
            assert "".join([*shown, stream.flush()]) == tekken.decode(ids)


def test_cut_tekken_is_a_complete_tokenizer_for_us_and_for_mistral_common(small, tekken):
    ours, theirs = load_tokenizer(small), Tekkenizer.from_file(small)
    assert ours.vocab_size == theirs.n_words == 1500
    assert len(ours.control) == theirs.num_special_tokens == 20
    assert all(tekken.control_id(name) == i for name, i in ours.control.items())
    assert (ours.bos_id, ours.eos_id, theirs.bos_id, theirs.eos_id) == (1, 2, 1, 2)
    for text in [*TEXTS.values(), *random_texts(40)]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, bos=False, eos=False)
        assert ours.decode(ids) == text
    assert max(ours.encode(TEXTS["latin"])) < 1500
    assert tekken.decode_bytes([1000 + 700]) == ours.decode_bytes([20 + 700])


def test_cut_of_a_cut_and_of_listed_control_tokens(small, tmp_path):
    again = tmp_path / "tekken.json"
    cut_tekken(small, again, 600)
    whole = json.loads(small.read_text())
    assert load_tokenizer(again).vocab_size == 600
    names = [token["token_str"] for token in whole["special_tokens"]]
    whole["special_tokens"] += [{"rank": i, "token_str": f"<SPECIAL_{i}>", "is_control": True} for i in range(20, 30)]
    whole["config"] |= {"default_num_special_tokens": 40, "version": "v11", "default_vocab_size": 1500}
    listed = tmp_path / "tekken_listed.json"
    listed.write_text(json.dumps(whole))
    assert len(load_tokenizer(listed).control) == 40
    cut_tekken(listed, tmp_path / "tekken_2.json", 500)
    assert list(load_tokenizer(tmp_path / "tekken_2.json").control) == names
    assert Tekkenizer.from_file(tmp_path / "tekken_2.json").n_words == 500


def test_cut_refuses_what_it_cannot_do_and_leaves_nothing(small, tmp_path):
    for size in (0, 275, 1501):
        with pytest.raises(UserError, match=rf"expected a cut of 276 … 1500 ids, got {size}"):
            cut_tekken(small, tmp_path / "tekken.json", size)
    with pytest.raises(UserError, match="exists already"):
        cut_tekken(small, small, 600)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_prefers_tekken_then_tokenizer_json_then_sentencepiece(small, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE[0].read_bytes())
    assert load_tokenizer(tmp_path).kind == "sentencepiece"
    assert load_tokenizer(tmp_path).version == "v3"  # by its control pieces: the name does not say
    (tmp_path / "tokenizer.json").write_text(
        '{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}, "added_tokens": []}'
    )
    assert load_tokenizer(str(tmp_path)).kind == "tokenizer.json"
    (tmp_path / "tekken.json").write_bytes(small.read_bytes())
    assert load_tokenizer(tmp_path).kind == "tekken"


def spoil(path: Path, change) -> str:
    spec = json.loads(path.read_text())
    change(spec)
    return json.dumps(spec)


BAD_TEKKEN = {
    "not JSON": (lambda path: path.read_text()[:-500], "not a JSON file"),
    "a list": (lambda path: "[1]", "expected a JSON object, got a list"),
    "no vocab": (lambda path: spoil(path, lambda s: s.pop("vocab")), "expected the keys config"),
    "no pattern": (
        lambda path: spoil(path, lambda s: s["config"].pop("pattern")),
        r"config.pattern: expected a str, got None",
    ),
    "bad pattern": (lambda path: spoil(path, lambda s: s["config"].update(pattern="(")), "no regular expression"),
    "bad size": (
        lambda path: spoil(path, lambda s: s["config"].update(default_vocab_size="x")),
        "expected a int, got 'x'",
    ),
    "bad version": (lambda path: spoil(path, lambda s: s["config"].update(version="new")), "got 'new'"),
    "too few ranks": (lambda path: spoil(path, lambda s: s["vocab"].pop()), "expected 256 … 1479 ranks"),
    "swapped": (lambda path: spoil(path, lambda s: s["vocab"].reverse()), r"vocab\[0\] is no Tekken entry"),
    "bad base64": (lambda path: spoil(path, lambda s: s["vocab"][300].update(token_bytes="*")), r"vocab\[300\]"),
    "twice": (lambda path: spoil(path, lambda s: s["vocab"][301].update(s["vocab"][300], rank=301)), r"vocab\[301\]"),
    "unlisted": (
        lambda path: spoil(path, lambda s: (s.pop("special_tokens"), s["config"].update(version="v11"))),
        "special_tokens",
    ),
    "gap": (lambda path: spoil(path, lambda s: s["special_tokens"].pop(3)), "expected ranks 0 … 18"),
    "too many": (
        lambda path: spoil(path, lambda s: s["config"].update(default_num_special_tokens=3)),
        "20 special_tokens",
    ),
}


@pytest.mark.parametrize("name", BAD_TEKKEN)
def test_a_broken_tekken_file_is_one_clear_line(name, small, tmp_path):
    make, message = BAD_TEKKEN[name]
    path = tmp_path / "tekken.json"
    path.write_text(make(small))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_other_bad_files_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    cases = {
        "tokenizer.model": (SENTENCEPIECE[0].read_bytes()[:20000], "not a SentencePiece model"),
        "empty.model.v3": (b"", "not a SentencePiece model"),
        "pointer.model": (b"version https://git-lfs.github.com/spec/v1\n", "not a SentencePiece model"),
        "notes.txt": (b"hello", "unknown kind of tokenizer"),
        "tekken.json": (base64.b64decode("AAECAw=="), "not a JSON file"),
        "tokenizer.json": (b'{"model": {}}', "not a tokenizer.json"),
        "other.json": (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}', "tokenizers library"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
