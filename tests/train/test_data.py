"""Sources → tokens in the cache → batches: what is kept, what is refused, and that the seed alone decides the order."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from nemoe_jax.errors import UserError
from nemoe_jax.text.data import render
from nemoe_jax.text.data.render import Rendered
from nemoe_jax.text.tokenizers.load import load_tokenizer
from tests.support.configs import write_tokenizer
from train.data.loader import Batch, Corpus, open_corpus, source_files
from train.data.token_cache import Writer, default_cache, open_entry
from train.data.tokenize_documents import tokenize_source
from train.recipe import Data, Source

VOCAB = 400
FULL = Path("/dev/full")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}word0 {% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}word1 {{ m.content }} {% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "model").mkdir()
    write_tokenizer(tmp_path / "model", VOCAB)
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    return load_tokenizer(tmp_path / "model")


def source(*files, form="auto", **keys) -> Source:
    return Source(files=[str(file) for file in files], format=form, **keys)


def options(tmp_path, **keys) -> Data:
    return Data(train=["any"], sequence_length=12, batch_size=1, cache=tmp_path / "cache", **keys)


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def words(rng, count):
    return " ".join(f"word{number}" for number in rng.integers(2, VOCAB - 3, count))


def write_chats(path, count, seed=0):
    rng = np.random.default_rng(seed)
    return write(
        path, [{"query": words(rng, 2), "response": words(rng, int(rng.integers(1, 8)))} for _ in range(count)]
    )


def write_texts(path, count, seed=1):
    rng = np.random.default_rng(seed)
    return write(path, [{"text": words(rng, int(rng.integers(1, 30)))} for _ in range(count)])


def same(left: Batch, right: Batch) -> bool:
    return all((one == other).all() for one, other in zip(left, right, strict=True))


# tokens and their cache


@pytest.mark.parametrize("threads", [1, 7])
def test_documents_keep_their_order_whatever_the_threads(tmp_path, tokenizer, monkeypatch, threads):
    monkeypatch.setattr(render, "ROWS_AT_ONCE", 3)
    file = write(tmp_path / "a.jsonl", [{"text": f"word{number}"} for number in range(50)])
    tokens = tokenize_source(source(file), options(tmp_path), tokenizer, VOCAB, "data.train.0", threads=threads)
    assert tokens.tokens_N.dtype == np.uint16
    assert tokens.tokens_N[1::3].tolist() == list(range(3, 53))
    assert set(tokens.tokens_N[0::3]) == {1} and set(tokens.tokens_N[2::3]) == {2}
    assert tokens.figures == {"documents": 50, "rows": 50, "bad_rows": 0, "bad": [], "largest": 52}


def test_tokens_come_from_the_cache_until_something_changes(tmp_path, tokenizer, monkeypatch):
    calls = []
    encode = render.encode_document
    monkeypatch.setattr(render, "encode_document", lambda *each: calls.append(1) or encode(*each))
    file = write_texts(tmp_path / "a.jsonl", 5)

    def encoded(**keys) -> int:
        calls.clear()
        opened = tokenize_source(source(file, **keys), options(tmp_path), tokenizer, VOCAB, "data.train.0")
        assert opened.figures["documents"] == len(opened.offsets) - 1
        return len(calls)

    assert encoded() == 5 and encoded() == 0
    assert encoded(limit=2) > 0 and encoded(limit=2) == 0
    assert encoded(form="text") == 5 and encoded() == 0
    os.utime(file, (1, 1))
    assert encoded() == 5 and encoded() == 0
    for entry in (tmp_path / "cache" / "tokens").iterdir():
        data = (entry / "tokens.bin").read_bytes()
        (entry / "tokens.bin").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert encoded() == 5 and encoded() == 0
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "added_tokens.json"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
        tokenizer = load_tokenizer(tmp_path / "model")
        assert encoded() == 5 and encoded() == 0
    write_tokenizer(tmp_path / "model", VOCAB - 1)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert encoded() == 5


def test_an_entry_that_another_process_finished_first_is_left_alone(tmp_path):
    document = Rendered(np.arange(3, dtype=np.uint32), np.ones(3, bool), is_chat=False)
    with Writer(tmp_path / "entry", np.uint16) as late, Writer(tmp_path / "entry", np.uint16) as early:
        for writer in (late, early):
            writer.add([document])
        early.finish({})
        file = (tmp_path / "entry" / "tokens.bin").stat().st_ino
        late.finish({})
    assert (tmp_path / "entry" / "tokens.bin").stat().st_ino == file
    assert open_entry(tmp_path / "entry") and [path.name for path in tmp_path.iterdir()] == ["entry"]


@pytest.mark.skipif(not FULL.exists(), reason="wants a device that is always full")
def test_a_full_disk_is_one_error_and_leaves_nothing_behind(tmp_path):
    documents = [Rendered(np.zeros(size, np.uint32), np.ones(size, bool), is_chat=False) for size in (1, 10**5)]
    with pytest.raises(UserError, match=r"data\.cache: .*: No space"), Writer(tmp_path / "entry", np.uint16) as writer:
        writer._tokens.close()
        writer._tokens = FULL.open("wb")
        writer.add(documents)
    assert not list(tmp_path.iterdir())


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "nemoe-jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "nemoe-jax"


def test_a_limit_counts_documents(tmp_path, tokenizer):
    rows = [{"text": "word1"}, {"text": 3}, {"text": "word2"}, {"text": "word3"}]
    file = write(tmp_path / "a.jsonl", rows)
    tokens = tokenize_source(
        source(file, limit=2), options(tmp_path, max_bad_share=1), tokenizer, VOCAB, "data.train.0"
    )
    assert tokens.tokens_N.tolist() == [1, 4, 2, 1, 5, 2]
    assert (tokens.figures["rows"], tokens.figures["bad_rows"]) == (3, 1)


def test_bad_rows_are_left_out_or_stop_the_run(tmp_path, tokenizer):
    rows = [{"text": "word1"}] * 200
    rows[3], rows[150] = "{broken", {"query": "x"}
    file = write(tmp_path / "a.jsonl", rows)
    tokens = tokenize_source(source(file), options(tmp_path), tokenizer, VOCAB, "data.train.0")
    assert (tokens.figures["documents"], tokens.figures["bad_rows"]) == (198, 2)
    assert tokens.figures["bad"][0].startswith(f"{file}:4: expected a JSON object, got b'{{broken'")
    for attempt in range(2):  # whether the tokens are in the cache or not
        if attempt:
            rows[4] = {"text": "word1 "}
            write(file, rows)
        with pytest.raises(UserError, match=r"data\.train\.0: .*a\.jsonl:4: expected a JSON object"):
            tokenize_source(source(file), options(tmp_path, bad_rows="stop"), tokenizer, VOCAB, "data.train.0")
        with pytest.raises(
            UserError, match=r"2 of 200 rows are bad, and data.max_bad_share is 0.009 \(.*:4: .*; .*:151: .*query"
        ) as caught:
            tokenize_source(source(file), options(tmp_path, max_bad_share=0.009), tokenizer, VOCAB, "data.train.0")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rows, vocab, message",
    [
        ([], VOCAB, r"data\.train\.0: .*a\.jsonl: no document in it$"),
        (
            [{"text": 3}],
            VOCAB,
            r"data\.train\.0: .*a\.jsonl: no document in it \(.*a\.jsonl:1: text: expected a text, got 3\)",
        ),
        ([{"text": "word1 word90"}], 93, r"tokenizer\.json: gives token 93; the model's embedding has 93 rows"),
    ],
)
def test_sources_of_no_use(tmp_path, tokenizer, rows, vocab, message):
    file = write(tmp_path / "a.jsonl", rows)
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            tokenize_source(source(file), options(tmp_path, max_bad_share=1), tokenizer, vocab, "data.train.0")


def test_a_vocabulary_that_is_too_small_is_noticed_in_the_cache_as_well(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [{"text": "word90"}])
    tokenize_source(source(file), options(tmp_path), tokenizer, 94, "data.train.0")
    with pytest.raises(UserError, match="gives token 93"):
        tokenize_source(source(file), options(tmp_path), tokenizer, 93, "data.train.0")


# batches


@pytest.fixture
def corpus(tmp_path, tokenizer) -> Corpus:
    sources = [
        source(write_chats(tmp_path / "chats.jsonl", 40), weight=3),
        source(write_texts(tmp_path / "texts.jsonl", 30), weight=1),
    ]
    return open_corpus(sources, options(tmp_path), tokenizer, VOCAB)


def test_rows_of_batches(corpus, tokenizer):
    chats, texts = corpus.figures
    assert (chats.documents, texts.documents) == (40, 30) and corpus.shares == [0.75, 0.25]
    batch = next(corpus.iterator(5, seed=0))
    assert isinstance(batch, Batch) and all(array.shape == (5, 12) for array in batch)
    known = [*(packed[row] for packed in corpus.packed for row in range(len(packed)))]
    for row in range(5):
        assert any(same(Batch(*(array[row] for array in batch)), one) for one in known)
    for row in range(len(corpus.packed[0])):  # what is learned of a chat ends with EOS and begins after word0
        one = corpus.packed[0][row]
        starts = np.flatnonzero(np.diff(one.mask, prepend=0) > 0)
        assert (one.inputs[starts] == 3).all() and (one.mask[one.targets == 2] == 1).all()


def test_the_stream_depends_on_the_seed_alone(corpus):
    def stream(seed, threads=4, steps=30):
        batches = corpus.iterator(4, seed, threads=threads)
        return [next(batches) for _ in range(steps)]

    expected = stream(7)
    for threads in (0, 1, 16):
        assert all(map(same, stream(7, threads), expected))
    assert not all(map(same, stream(8), expected))


def test_processes_together_read_what_one_reads_alone(corpus):
    whole = corpus.iterator(6, 3)
    parts = [corpus.iterator(6, 3, rows) for rows in ([0, 1, 2], range(3, 5), [5])]
    for _ in range(10):
        pieces = [next(part) for part in parts]
        joined = Batch(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))
        assert same(joined, next(whole))


def test_a_restored_state_goes_on_bit_for_bit(corpus):
    batches = corpus.iterator(4, 3)
    for _ in range(17):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(20)]
    fresh, used = corpus.iterator(4, 3), corpus.iterator(4, 3, threads=1)
    next(used)
    for other in (fresh, used):
        other.set_state(state)
        assert all(same(next(other), batch) for batch in expected)


def test_epochs_hold_every_row_once_in_new_orders_and_sources_their_share(tmp_path, tokenizer):
    texts = source(write_texts(tmp_path / "texts.jsonl", 30))
    corpus = open_corpus([texts], options(tmp_path), tokenizer, VOCAB)
    rows = len(corpus.packed[0])
    batches = corpus.iterator(1, 0)
    epochs = [[next(batches).inputs.tobytes() for _ in range(rows)] for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3 and len({tuple(sorted(epoch)) for epoch in epochs}) == 1

    chats = source(write_chats(tmp_path / "chats.jsonl", 40))
    by_size = open_corpus([chats, texts], options(tmp_path), tokenizer, VOCAB)
    sizes = [len(packed) for packed in by_size.packed]
    assert by_size.shares == [size / sum(sizes) for size in sizes]
    three, one = chats.model_copy(update={"weight": 3.0}), texts.model_copy(update={"weight": 1.0})
    weighted = open_corpus([three, one], options(tmp_path), tokenizer, VOCAB)
    of_texts = {weighted.packed[1][row].inputs.tobytes() for row in range(len(weighted.packed[1]))}
    drawn = weighted.iterator(1, 0)
    assert sum(next(drawn).inputs.tobytes() in of_texts for _ in range(100)) == 25
    with pytest.raises(UserError, match=r"data\.train: weight: expected one for every source or for none, got 1 of 2"):
        open_corpus([chats, one], options(tmp_path), tokenizer, VOCAB)


def test_held_out_rows_are_evenly_spaced_and_a_short_batch_is_filled_up(corpus):
    rows = [packed[row] for packed in corpus.packed for row in range(len(packed))]
    batches = corpus.held_out_batches(4, 3)
    assert [batch.inputs.shape for batch in batches] == [(4, 12)] * 3
    chosen = [Batch(*(array[row] for array in batch)) for batch in batches for row in range(4)]
    places = [next(at for at, row in enumerate(rows) if same(row, one)) for one in chosen]
    assert places[0] == 0 and places[-1] == len(rows) - 1 and np.ptp(np.diff(places)) <= 1

    count = len(rows)
    batches = corpus.held_out_batches(count - 1, 9)
    assert [batch.inputs.shape for batch in batches] == [(count - 1, 12)] * 2
    assert batches[1].mask[0].any() and not any(array[1:].any() for array in batches[1])
    assert same(Batch(*(array[0] for array in batches[1])), rows[-1])


def test_held_out_files_are_left_out_of_training(tmp_path, tokenizer):
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts" / "a.jsonl", 9)
    held_out = [source(write_texts(tmp_path / "texts" / "b.jsonl", 5, seed=3))]
    corpus = open_corpus(
        [source(tmp_path / "texts")], options(tmp_path), tokenizer, VOCAB, exclude=source_files(held_out)
    )
    assert corpus.figures[0].documents == 9
    with pytest.raises(UserError, match="every file there is held out"):
        open_corpus(held_out, options(tmp_path), tokenizer, VOCAB, exclude=source_files(held_out))


def test_only_the_wanted_rows_are_made(corpus, monkeypatch):
    made = []
    read = type(corpus.packed[0]).__getitem__
    monkeypatch.setattr(type(corpus.packed[0]), "__getitem__", lambda self, row: made.append(row) or read(self, row))
    batches = corpus.iterator(50, 0, rows=[7], threads=0)
    for _ in range(3):
        next(batches)
    assert len(made) == 3
