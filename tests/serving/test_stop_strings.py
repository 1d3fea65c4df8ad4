import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemoe_jax.errors import UserError
from nemoe_jax.serving.engine.stop_strings import StopStrings
from nemoe_jax.text.tokenizers.streaming import StreamDecoder

LETTERS = st.sampled_from("aab\n")  # few, so that stop texts overlap each other and themselves
TEXTS = st.text(LETTERS, min_size=1, max_size=5)


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8."""

    def decode(self, ids, skip_special):
        return bytes(ids).decode("utf-8", "replace")


def shown(stops, pieces):
    """All that `StopStrings` lets through, what it found, and its pieces."""
    stop_texts = StopStrings(stops)
    got = [stop_texts.push(piece) for piece in pieces]
    got.append(stop_texts.flush())
    return "".join(got), stop_texts.found, got


def cut_at_first(text, stops):
    """By `str.find` on the whole: what comes before the first stop text, and the shortest one there."""
    places = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    return (text[: min(places)[0]], min(places)[2]) if places else (text, None)


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=4), st.lists(st.text(LETTERS, max_size=6), max_size=8))
@example(["abba", "bb"], ["a", "bb", "b"])  # what begins first could still come, and does not
@example(["abba", "bb"], ["a", "bb", "a"])
@example(["aab"], ["aa", "aab"])
def test_every_cut_gives_what_find_gives_on_the_whole(stops, pieces):
    assert shown(stops, pieces)[:2] == cut_at_first("".join(pieces), stops)


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(st.text(LETTERS, max_size=6), max_size=8))
def test_nothing_is_held_back_without_need(stops, pieces):
    """What was let through is all in front of the first place at which a stop text stands or may begin."""
    stop_texts, came, gone = StopStrings(stops), "", ""
    for piece in pieces:
        came, gone = came + piece, gone + stop_texts.push(piece)
        tails = ((at, came[at:]) for at in range(len(came)))
        may = (at for at, tail in tails if any(tail.startswith(stop) or stop.startswith(tail) for stop in stops))
        assert gone == came[: next(may, len(came))]


def test_pieces_of_a_stream_decoder():
    """Stop texts that begin and end inside of characters' bytes."""
    decoder, text = StreamDecoder(Bytes()), "Grüße, Welt — ende der Antwort"
    pieces = [*(decoder.push(byte) for byte in text.encode()), decoder.flush()]
    assert shown(["— ende", "ß!"], pieces)[:2] == ("Grüße, Welt ", "— ende")
    assert shown(["—x"], pieces)[:2] == (text, None)


def test_text_flows_until_it_may_be_a_stop_text():
    assert shown(["\n\n", "User:"], ["Hi", "\n", "U", "s", "e me", "\n", "\nUser: x"])[2] == (
        ["Hi", "", "\n", "", "Use me", "", "", ""]
    )


def test_no_stop_texts_hold_nothing():
    assert shown([], ["a", "", "b"]) == ("ab", None, ["a", "", "b", ""])


@pytest.mark.parametrize("stops", [[""], ["a", ""], "", [3], [None], [b"a"]])
def test_refuses_what_is_no_text(stops):
    with pytest.raises(UserError, match=r"^stop: expected strings that are not empty, got "):
        StopStrings(stops)
