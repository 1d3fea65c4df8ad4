"""Counts against mistral-common's own tokenizers and len(); pieces against the whole text; the table and the plot."""

import json
import random
from pathlib import Path

import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.evaluation import tokenizer_stats as comparison
from nemoe_jax.evaluation.tokenizer_plot import check_plot, draw, print_table, write_plot
from nemoe_jax.evaluation.tokenizer_stats import Count, compare, grouped, language_of, read_pieces
from nemoe_jax.text.tokenizers.load import cut_tekken, load_tokenizer

mistral_common = pytest.importorskip("mistral_common")
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

DATA = Path(mistral_common.__file__).parent / "data"
OLDER = sorted(DATA.glob("*.model*"))

TEXTS = {
    "fr/prose.txt": "Tous les êtres humains naissent libres et égaux en dignité et en droits.\n" * 40,
    "ko/prose.txt": "모든 인간은 태어날 때부터 자유로우며\n그 존엄과 권리에 있어 동등하다.\n\n" * 40,
    "ar/prose.txt": "يولد جميع الناس أحراراً\nمتساوين في الكرامة والحقوق.\r\n" * 40,
    "zh/prose.txt": "人人生而自由，在尊严和权利上一律平等。\n他们赋有理性和良心。\n" * 40,
    "code/sample.txt": "def f(x):\n\treturn x / 2  # half\n\n\nclass A:\n    b = '''\n  /\n'''\n\n" * 40,
    "odd/sample.txt": "  \n \n\n a\n1\n)\n/x\n)\n\n//\n_\n\u3000b\r\n\r\nc😀\n" * 40,
    "line/sample.txt": "no line end at all, 12 (thirteen)  or  14 " * 80,
    "th/sample.txt": "มนุษย์ทั้งหลายเกิดมามีอิสระ" * 80,
    "one/sample.txt": "x",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cut") / "tekken.json"
    cut_tekken(DATA / "tekken_240718.json", path, 8000)
    return path


@pytest.fixture(scope="module")
def tokenizers(small):
    return [load_tokenizer(path) for path in (small, *OLDER)]


@pytest.fixture(scope="module")
def references(small):
    return [Tekkenizer.from_file(small), *map(SentencePieceTokenizer, OLDER)]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    for name, text in TEXTS.items():
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(text.encode())
    return {name: tmp_path / name for name in TEXTS}


@pytest.mark.parametrize("piece_characters", [1 << 18, 300, 90])
def test_counts_are_those_of_mistral_common_and_of_len(files, tokenizers, references, piece_characters):
    counts = compare(tokenizers, list(files.values()), piece_characters)
    for name, text in TEXTS.items():
        count = counts[files[name]]
        assert (count.characters, count.bytes) == (len(text), len(text.encode()))
        assert count.words == (None if name[:2] in ("zh", "th") else len(text.split()))
        if piece_characters > 1000 or name != "th/sample.txt":  # which has no good place to cut: see below
            assert count.tokens == tuple(len(one.encode(text, bos=False, eos=False)) for one in references), name


def test_a_cut_within_a_word_costs_a_token_or_two(files, tokenizers, references):
    text, file = TEXTS["th/sample.txt"], files["th/sample.txt"]
    (count,) = compare(tokenizers, [file], 300).values()
    cuts = len(list(read_pieces(file, 300))) - 1
    for tokens, reference in zip(count.tokens, references, strict=True):
        assert 0 <= tokens - len(reference.encode(text, bos=False, eos=False)) <= 2 * cuts


def test_pieces_join_to_the_text_wherever_characters_are_cut(tmp_path):
    rng = random.Random(3)
    text = "".join(rng.choices("aé한😀 \n\n.", k=3000))
    (tmp_path / "x.txt").write_text(text, "utf-8", newline="")
    for size in (1, 7, 50, 2999, 3000, 10**6):
        pieces = list(read_pieces(tmp_path / "x.txt", size))
        assert "".join(piece for piece, _ in pieces) == text
        assert all(piece for piece, _ in pieces)
        assert [follows for _, follows in pieces] == [False, *[True] * (len(pieces) - 1)]
        if size == 50:
            assert max(len(piece) for piece, _ in pieces) <= size


def test_the_texts_of_jsonl_lines_are_encoded_one_by_one(tmp_path, tokenizers, references):
    texts = ["Hello there", "a\nb", "", "안녕"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (count,) = compare(tokenizers, [tmp_path / "x.jsonl"]).values()
    assert count.tokens == tuple(
        sum(len(one.encode(text, bos=False, eos=False)) for text in texts) for one in references
    )
    assert count.characters == sum(map(len, texts))


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("texts/messages.fr.txt", "fr"),
        ("texts/messages.zh-Hans.txt", "zh-Hans"),
        ("de/messages.fr.txt", "fr"),
        ("x/fr.txt", "fr"),
        ("x/pt_BR.jsonl", "pt-BR"),
        ("fr/help/index.txt", "fr"),
        ("locale/sr@latin/LC_MESSAGES/django.po", "sr@latin"),
        ("ko/a.b.txt", "ko"),
        ("lib/os.py", "lib"),  # Ossetian is `os`
        ("code/python/a.b.py", "python"),
        ("src/thesis/chapter.txt", "thesis"),
        ("fre/a.txt", "fre"),
    ],
)
def test_a_language_is_read_off_the_path(path, language):
    assert language_of(Path(path)) == language


def test_only_languages_that_write_no_spaces_lack_words(tmp_path, tokenizers):
    for directory, words in (("zh_TW", None), ("ja", None), ("thesis", 2), ("myths", 2), ("ko", 2)):
        path = tmp_path / directory / "x.txt"
        path.parent.mkdir()
        path.write_text("one two")
        assert compare(tokenizers[:1], [path])[path].words == words


def test_groups_add_up():
    counts = {
        Path("fr/a.txt"): Count(10, 12, 3, (4, 6)),
        Path("b/x.fr.txt"): Count(1, 1, 1, (1, 1)),
        Path("zh/c.txt"): Count(5, 15, None, (2, 8)),
    }
    assert grouped(counts, "language") == {"fr": Count(11, 13, 4, (5, 7)), "zh": Count(5, 15, None, (2, 8))}
    assert grouped(counts, None) == {"all": Count(16, 28, None, (7, 15))}
    assert list(grouped(counts, "file")) == ["b/x.fr.txt", "fr/a.txt", "zh/c.txt"]


def test_figures_are_the_quotients():
    figures = Count(10, 20, 4, (5, 8)).figures(["a", "b"])
    assert figures["tokenizers"]["b"] == {
        "tokens": 8,
        "tokens_per_character": 0.8,
        "tokens_per_word": 2.0,
        "tokens_per_byte": 0.4,
        "ratio": 1.6,
    }
    empty = Count(1, 1, 0, (0, 1)).figures(["a", "b"])["tokenizers"]["b"]
    assert empty["tokens_per_word"] is None and empty["ratio"] is None


BAD = {
    "no UTF-8": ({"x.txt": b"ok\n" * 50 + b"caf\xe9 \n"}, "x.txt: expected UTF-8 text, got byte 0xe9 at 153"),
    "cut short": ({"x.txt": "é".encode() * 40 + b"\xe2\x82"}, "x.txt: expected UTF-8 text, got byte 0xe2 at 80"),
    "bad line": ({"x.jsonl": b'{"text": "a"}\n[1]\n'}, r"x.jsonl:2: expected an object, got \[1\]"),
    "no text": ({"x.txt": b"", "y.txt": b""}, "x.txt, .*y.txt: empty text"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("piece_characters", [5, 1 << 18])
def test_a_bad_file_is_one_clear_line(name, piece_characters, tmp_path, tokenizers):
    contents, message = BAD[name]
    for file, data in contents.items():
        (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        compare(tokenizers[:1], sorted(tmp_path.iterdir()), piece_characters)
    assert "\n" not in str(caught.value)


def test_few_pieces_are_in_memory_at_once(tmp_path, tokenizers, monkeypatch):
    (tmp_path / "x.txt").write_text("word\n" * 4000)
    made, counted, most = 0, 0, 0
    read = comparison.read_pieces

    def watched(*arguments):
        nonlocal made, most
        for piece in read(*arguments):
            made += 1
            most = max(most, made - counted)
            yield piece

    monkeypatch.setattr(comparison, "read_pieces", watched)
    add = Count.__add__

    def adding(self, other):
        nonlocal counted
        counted += 1
        return add(self, other)

    monkeypatch.setattr(Count, "__add__", adding)
    compare(tokenizers[:1], [tmp_path / "x.txt"], 100)
    assert made > 10 * comparison.PIECES_IN_FLIGHT
    assert most <= comparison.PIECES_IN_FLIGHT + 2


GROUPS = {"fr": Count(100, 110, 20, (40, 52, 60)), "$x_[red]": Count(50, 150, None, (25, 75, 20))}


def test_the_table_has_a_row_for_each_group_and_tokenizer(capsys):
    print_table(GROUPS, ["a", "b", "[c]"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["fr", "100", "a", "40", "0.400", "2.000", "0.364", "1.00"] in rows
    assert ["b", "52", "0.520", "2.600", "0.473", "1.30"] in rows
    assert ["$x_[red]", "50", "a", "25", "0.500", "–", "0.167", "1.00"] in rows
    assert ["[c]", "20", "0.400", "–", "0.133", "0.80"] in rows


def test_the_plot_has_a_bar_for_each_ratio():
    axes = draw(GROUPS, ["a", "b", "c"]).axes[0]
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    assert heights == [pytest.approx([1.3, 3.0]), pytest.approx([1.5, 0.8])]
    assert [text.get_text() for text in axes.get_xticklabels()] == list(GROUPS)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["b", "c"]
    edges = [(bar.get_x(), bar.get_x() + bar.get_width()) for container in axes.containers for bar in container]
    for place in range(2):
        inside = [(left, right) for left, right in edges if place - 0.5 < left and right < place + 0.5]
        assert len(inside) == 2 and max(inside)[0] == pytest.approx(min(inside)[1])  # side by side about their name
    assert axes.lines[0].get_ydata()[0] == 1


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_a_plot_is_written_whole_and_the_same_each_time(suffix, start, tmp_path):
    for name in ("one", "two"):
        write_plot(draw(GROUPS, ["a", "b", "c"]), tmp_path / (name + suffix))
    one, two = ((tmp_path / (name + suffix)).read_bytes() for name in ("one", "two"))
    assert one.startswith(start) and one == two
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_plot_that_cannot_be_written_leaves_nothing(tmp_path):
    for path, message in (
        (tmp_path / "x.pdf", "expected a file name in .png or .svg"),
        (tmp_path / "no/x.png", "no such"),
    ):
        with pytest.raises(UserError, match=message):
            check_plot(path)
    (tmp_path / "x.png").mkdir()
    with pytest.raises(UserError, match=r"x\.png: Is a directory"):
        write_plot(draw(GROUPS, ["a", "b", "c"]), tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
