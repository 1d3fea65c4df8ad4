"""`nemoe tokenize` and `nemoe tokenize compare` as users type them."""

import json
from pathlib import Path

import pytest

from nemoe_jax.cli import main
from nemoe_jax.text.tokenizers.load import cut_tekken, load_tokenizer
from tests.support.configs import write_tokenizer

mistral_common = pytest.importorskip("mistral_common")
DATA = Path(mistral_common.__file__).parent / "data"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with tokenizers of every kind and texts."""
    place = tmp_path_factory.mktemp("place")
    cut_tekken(DATA / "tekken_240718.json", place / "model" / "tekken.json", 1500)
    (place / "words").mkdir()
    write_tokenizer(place / "words")
    (place / "tokenizer.model.v1").write_bytes((DATA / "tokenizer.model.v1").read_bytes())
    (place / "texts" / "fr").mkdir(parents=True)
    (place / "texts" / "fr" / "a.txt").write_text("word1 Où est la bibliothèque ?\n")
    (place / "texts" / "b.de.txt").write_text("Wo ist der Bahnhof?\n")
    (place / "texts" / "c.py").write_text("print('hello')\n")
    (place / "latin.txt").write_bytes("Où".encode("latin-1"))
    (place / "empty.txt").touch()
    return place


@pytest.fixture
def nemoe(place, capsys, monkeypatch):
    monkeypatch.chdir(place)

    def run(*words: str) -> tuple[int, str, str]:
        status = main.main(words)
        return status, *capsys.readouterr()

    return run


def test_both_forms_of_tokenize(nemoe):
    ids = load_tokenizer("model").encode("Wo ist der Bahnhof?\n")
    assert json.loads(nemoe("tokenize", "model", "texts/b.de.txt")[1]) == ids
    for words in (["tokenize", "compare"], ["--debug", "tokenize", "compare"]):
        status, out, _ = nemoe(*words, "model", "tokenizer.model.v1", "texts/b.de.txt", "--json")
        rows = json.loads(out)["rows"]
        assert status == 0 and rows[0]["tokenizers"]["model"]["tokens"] == len(ids)


def test_json_has_every_tokenizer_and_language(nemoe):
    words = ["model", "tokenizer.model.v1", "words", "texts", "--suffix", ".txt", "--suffix", ".py"]
    status, out, _ = nemoe("tokenize", "compare", *words, "--by", "language", "--json")
    report = json.loads(out)
    assert status == 0 and report["by"] == "language"
    assert [(name, one["kind"]) for name, one in report["tokenizers"].items()] == [
        ("model", "tekken"),
        ("tokenizer.model.v1", "sentencepiece"),
        ("words", "tokenizer.json"),
    ]
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["de", "fr", "texts", "(all)"]
    assert rows["(all)"]["characters"] == sum(rows[name]["characters"] for name in ("de", "fr", "texts"))
    text = Path("texts/fr/a.txt").read_text()
    tokens = {name: len(load_tokenizer(name).encode(text)) for name in ("model", "tokenizer.model.v1", "words")}
    french = rows["fr"]["tokenizers"]
    assert {name: one["tokens"] for name, one in french.items()} == tokens
    assert french["words"]["ratio"] == tokens["words"] / tokens["model"]
    assert french["model"]["tokens_per_word"] == tokens["model"] / 6


def test_table_and_plot(nemoe, tmp_path):
    plot = tmp_path / "ratio.svg"
    words = ["model", "tokenizer.model.v1", "texts/*.txt", "texts/fr"]
    status, out, _ = nemoe("tokenize", "compare", *words, "--by", "file", "--plot", str(plot))
    assert status == 0
    for part in ("a.txt", "b.de.txt", "(all)", "tokens over those of model"):
        assert part in out
    assert ">(all)</text>" in plot.read_text()


def test_tokenizers_of_one_name_are_told_apart_by_their_paths(nemoe, place, tmp_path):
    twin = tmp_path / "model"
    cut_tekken(place / "model" / "tekken.json", twin / "tekken.json", 1000)
    _, out, _ = nemoe("tokenize", "compare", "model", str(twin), "texts", "--json")
    assert list(json.loads(out)["tokenizers"]) == ["model", str(twin)]


BAD = {
    "nothing but one": ("model", "expected two tokenizers and text, got only model"),
    "no text": ("model words", "expected text after the tokenizers model, words"),
    "no text behind three": ("model words tokenizer.model.v1", "expected text after the tokenizers"),
    "text for the second": ("model texts/b.de.txt texts", "texts/b.de.txt: unknown kind of tokenizer"),
    "no such tokenizer": ("model modle texts", "modle: no such file or directory"),
    "no tokenizer in it": ("model texts texts", "texts: no tokenizer"),
    "one twice": ("model model texts", "model: given twice"),
    "no such text": ("model words tests", "tests: no text there"),
    "no file of that kind": (
        "model words texts --suffix .md",
        "texts: no text there; expected a file, a glob, or a directory",
    ),
    "no UTF-8": ("model words latin.txt", "latin.txt: expected UTF-8 text, got byte 0xf9 at 1"),
    "empty": ("model words empty.txt", "empty.txt: empty text"),
    "plot of no kind": ("model words texts --plot x.gif", "--plot x.gif: expected a file name in .png or .svg"),
    "plot nowhere": ("model words texts --plot no/x.png", "--plot no/x.png: no such directory"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_status_2(name, nemoe, place):
    words, message = BAD[name]
    before = sorted(place.rglob("*"))
    status, out, err = nemoe("tokenize", "compare", *words.split())
    assert status == 2 and not out
    assert message in err and err.count("\n") == 1
    assert sorted(place.rglob("*")) == before
