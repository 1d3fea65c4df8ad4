"""Rows of packed documents against a plain reading of the rules."""

import numpy as np
import pytest

from nemoe_jax.text.data.render import Rendered
from train.data.packing import Packed, best_fit
from train.data.token_cache import Tokens, Writer, open_entry


def entry(tmp_path, documents: list[Rendered]) -> Tokens:
    with Writer(tmp_path / "entry", np.uint32) as writer:
        for first in range(0, len(documents), 3):  # pieces that end inside a byte of the mask
            writer.add(documents[first : first + 3])
        writer.finish({"bad_rows": 2})
    tokens = open_entry(tmp_path / "entry")
    assert tokens is not None
    return tokens


def random_documents(rng, count: int, longest: int, chats: float) -> list[Rendered]:
    """Documents of tokens that occur once in all of them, 1 … N, so that a token tells where it is from."""
    documents, token = [], 1
    for _ in range(count):
        length = int(rng.integers(1, longest + 1))
        is_chat = bool(rng.random() < chats)
        mask = rng.random(length) < 0.6 if is_chat else np.ones(length, bool)
        documents.append(Rendered(np.arange(token, token + length, dtype=np.uint32), mask, is_chat))
        token += length
    return documents


@pytest.mark.parametrize("chats", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("length", [7, 16])
def test_every_token_is_in_one_row_and_targets_stay_in_their_document(tmp_path, chats, length):
    documents = random_documents(np.random.default_rng(3), 60, 22, chats)
    packed = Packed(entry(tmp_path, documents), length)
    rows = [packed[i] for i in range(len(packed))]
    home = {int(token): number for number, document in enumerate(documents) for token in document.ids_N}
    learned = {
        int(token): bool(mask)
        for document in documents
        for token, mask in zip(document.ids_N, document.mask_N, strict=True)
    }

    seen, targets = [], []
    for row in rows:
        assert [array.dtype for array in row] == [np.int32, np.int32, np.float32, np.int32, np.int32]
        assert all(array.shape == (length,) for array in row)
        used = row.segments > 0
        assert used[0] and (np.diff(used.astype(int)) <= 0).all()  # padding only at the end
        assert not any(array[~used].any() for array in row)
        assert (np.diff(row.segments[used]) >= 0).all() and set(row.segments[used]) == set(
            range(1, row.segments.max() + 1)
        )
        for number in range(1, row.segments.max() + 1):
            at = row.segments == number
            tokens = row.inputs[at]
            assert (np.diff(tokens) == 1).all() and len({home[token] for token in tokens.tolist()}) == 1
            np.testing.assert_array_equal(row.positions[at], np.arange(at.sum()))
        for token, target, mask in zip(
            row.inputs[used].tolist(), row.targets[used].tolist(), row.mask[used].tolist(), strict=True
        ):
            ends = home.get(token + 1) != home[token]
            assert target == (0 if ends else token + 1) and mask == (0 if ends else learned[target])
            targets += [target] if mask else []
        seen += row.inputs[used].tolist()

    cut = {int(token) for document in documents if document.is_chat for token in document.ids_N[length:]}
    assert sorted(seen) == sorted(home.keys() - cut)
    figures = packed.figures
    assert figures.documents == 60 and figures.tokens == len(home) and figures.bad_rows == 2
    assert figures.rows == len(rows) == len(packed)
    assert figures.loss_tokens == len(targets) == sum(int(row.mask.sum()) for row in rows)
    assert figures.padding == pytest.approx(np.mean([row.segments == 0 for row in rows]))
    assert figures.truncated == sum(document.is_chat and len(document.ids_N) > length + 1 for document in documents)
    # whole chats: each in one row, from its beginning
    for row in rows:
        chats_here = {home[token] for token in row.inputs[row.segments > 0].tolist() if documents[home[token]].is_chat}
        for number in chats_here:
            expected = documents[number].ids_N[:length]
            assert np.isin(expected, row.inputs).all()


def test_a_text_that_is_cut_goes_on_in_the_next_row_without_losing_a_target(tmp_path):
    text = Rendered(np.arange(1, 12, dtype=np.uint32), np.ones(11, bool), False)
    first, second, third = (Packed(entry(tmp_path, [text]), 4)[i] for i in range(3))
    assert first.targets.tolist() == [2, 3, 4, 5] and second.inputs.tolist() == [5, 6, 7, 8]
    assert second.positions.tolist() == [0, 1, 2, 3] and second.segments.tolist() == [1, 1, 1, 1]
    assert third.inputs.tolist() == [9, 10, 11, 0] and third.targets.tolist() == [10, 11, 0, 0]
    assert third.mask.tolist() == [1, 1, 0, 0] and third.segments.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("length, truncated", [(3, 0), (4, 0), (5, 0), (6, 1), (9, 1)])
def test_a_chat_of_one_token_more_than_a_row_loses_nothing(tmp_path, length, truncated):
    chat = Rendered(np.arange(1, length + 1, dtype=np.uint32), np.ones(length, bool), True)
    packed = Packed(entry(tmp_path, [chat]), 4)
    assert len(packed) == 1 and packed.figures.truncated == truncated
    assert packed[0].targets.tolist() == [min(2, length), 3, 4 if length > 3 else 0, 5 if length > 4 else 0]
    assert packed.figures.loss_tokens == packed[0].mask.sum() == min(length - 1, 4)


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each bin, by trying them all."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, at) for at, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return rooms


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_what_trying_all_bins_gives(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 31, 300)
    bins, count = best_fit(lengths, 30)
    used = np.bincount(bins, weights=lengths, minlength=count)
    assert used.max() <= 30 and sorted(30 - used) == sorted(plain_best_fit(lengths.tolist(), 30))
    again = best_fit(lengths, 30)
    assert again[1] == count and (again[0] == bins).all()
    assert best_fit(lengths[:0], 30)[1] == 0


def test_a_damaged_entry_is_no_entry(tmp_path):
    documents = random_documents(np.random.default_rng(1), 9, 9, 0.5)
    for name in ("tokens.bin", "mask.bin", "offsets.npy", "chats.npy", "entry.json"):
        for damage in (lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:], None):
            tokens = entry(tmp_path, documents)
            np.testing.assert_array_equal(tokens.tokens_N, np.concatenate([document.ids_N for document in documents]))
            total = len(tokens.tokens_N)
            np.testing.assert_array_equal(
                tokens.mask_of(0, total), np.concatenate([document.mask_N for document in documents])
            )
            path = tmp_path / "entry" / name
            if damage:
                path.write_bytes(damage(path.read_bytes()))
            else:
                path.unlink()
            assert open_entry(tmp_path / "entry") is None
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]  # nothing half-written


def test_an_entry_that_was_not_finished_is_gone(tmp_path):
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "entry", np.uint16) as writer:
        writer.add(random_documents(np.random.default_rng(1), 3, 9, 0.5))
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
