"""Text files → documents → stream → windows."""

import json

import numpy as np
import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.text.corpus import find_files, read_documents, spaced_batches, tokenize_corpus
from nemoe_jax.text.data import render
from nemoe_jax.text.tokenizers.base import Tokenizer
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.configs import write_tokenizer


class Characters(Tokenizer):
    """A tokenizer whose ids are code points; EOS is 0."""

    eos_id = 0

    def __init__(self, vocab_size=300, before=()):
        self.vocab_size, self.before = vocab_size, before

    def _encode_text(self, text):
        return [ord(character) for character in text]

    def _decode(self, ids, skip_special):
        return "".join(map(chr, ids))

    def _piece(self, token):
        return chr(token)


def test_documents_of_text_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\nü".encode())
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": " "}\n{"text": "three", "id": 3}\n')
    (tmp_path / "empty.txt").write_text(" \n")
    found = find_files([str(tmp_path)])
    assert [path.name for path in found] == ["a.txt", "b.jsonl", "empty.txt"]
    assert [list(read_documents(path)) for path in found] == [["one\r\nü"], ["two", "three"], []]


def test_globs_directories_and_held_out_files(tmp_path):
    for name in ("a.py", "deep/b.py", "deep/c.txt", "d.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = lambda files: [file.name for file in files]  # noqa: E731
    assert names(find_files([f"{tmp_path}/**/*.py"])) == ["a.py", "b.py"]
    assert names(find_files([str(tmp_path), str(tmp_path / "d.bin")])) == ["d.bin", "c.txt"]
    held_out = find_files([f"{tmp_path}/deep/*.py"])
    assert names(find_files([f"{tmp_path}/**/*.py"], exclude=held_out)) == ["a.py"]
    with pytest.raises(UserError, match="every file there is held out"):
        find_files([f"{tmp_path}/deep/*.py"], exclude=held_out)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", b"ab\xff", r"a\.txt: expected UTF-8 text, got byte 0xff at 2"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "x"}\n', r"a\.jsonl:2: the keys body belong to no known format"),
        ("a.jsonl", b"{broken\n", r"a\.jsonl:1: expected a JSON object"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl:1: expected a JSON object"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl:1: expected an object, got \[1, 2\]"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: text: expected a text, got 3"),
        ("a.txt", b" \n", r": empty text"),
    ],
)
def test_bad_text(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        tokenize_corpus([str(tmp_path)], Characters())


@pytest.mark.parametrize("pattern", ["missing.txt", "*.nothing", "a**b"])
def test_patterns_that_match_nothing(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=pattern.replace("*", r"\*")):
        find_files([pattern])


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_stream_keeps_the_order_and_closes_documents(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(render, "ROWS_AT_ONCE", rows)
    documents = [f"document {number}" for number in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents[:5]))
    for number, document in enumerate(documents[5:]):
        (tmp_path / f"b{number}.txt").write_text(document)
    stream = tokenize_corpus([str(tmp_path)], Characters())
    assert stream.dtype == np.uint16
    assert "".join(map(chr, stream)) == "".join(f"{text}\0" for text in documents)
    assert tokenize_corpus([str(tmp_path)], Characters(1 << 17)).dtype == np.uint32


def test_every_document_begins_as_the_tokenizer_begins_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": ""}\n{"text": "c"}\n')
    stream = tokenize_corpus([str(tmp_path)], Characters(before=(1,)))
    assert stream.tolist() == [1, ord("a"), ord("b"), 0, 1, ord("c"), 0]


def test_chats_and_parquet_are_read_as_for_training(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    write_tokenizer(tmp_path)
    turn = "{{ m.content }} {{ eos_token if m.role == 'assistant' }}"
    template = "{{ bos_token }}{% for m in messages %}" + turn + "{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    (tmp_path / "text").mkdir()
    parquet.write_table(Table.from_pylist([{"text": "word1 word2"}, {"text": ""}]), tmp_path / "text" / "a.parquet")
    (tmp_path / "text" / "b.jsonl").write_text('{"question": "word3", "answer": "word4"}\n')
    stream = tokenize_corpus([str(tmp_path / "text")], load_tokenizer(tmp_path))
    assert stream.tolist() == [1, 4, 5, 2, 1, 6, 7, 2]


def test_held_out_windows_are_evenly_spaced_and_short_text_is_padded_by_weight():
    stream = np.arange(1001, dtype=np.uint16)
    batches = spaced_batches(stream, sequence_length=10, batch_size=4, batches=2)
    starts = np.concatenate([tokens[:, 0] for tokens, _ in batches])
    assert (starts[0], starts[-1]) == (0, 990) and np.ptp(np.diff(starts)) <= 1 and len(starts) == 8
    assert all(weights.tolist() == [1, 1, 1, 1] for _, weights in batches)

    batches = spaced_batches(stream[:61], sequence_length=10, batch_size=4, batches=9)
    assert [tokens.shape for tokens, _ in batches] == [(4, 11)] * 2
    rows = np.concatenate([tokens[weights > 0] for tokens, weights in batches])
    np.testing.assert_array_equal(rows[:, 1:].ravel(), np.arange(1, 61))


def test_too_little_text():
    with pytest.raises(UserError, match=r"data\.held_out: expected at least .* = 11 tokens, got 10"):
        spaced_batches(np.zeros(10, np.uint16), 10, 1, 1, "data.held_out")
