"""How many tokens several tokenizers make of the same text.

Text is read in pieces that are cut behind a line end or before a space, where a letter or digit follows, and every
piece but the first is counted as if it stood behind a line end: tokens(line end + piece) − tokens(line end). A
tokenizer that joins neither a line end to what follows nor a word to the space behind it, as none of Mistral's does, so
gives the very number of the whole text, and a file of any length needs the memory of a few pieces. Where a piece of
`PIECE_CHARACTERS` has no such place, it is cut anywhere, which may cost a token or two.

Words are what stands between white space. Chinese, Japanese and a few others write none there: for files of those
languages, known by `language_of`, there is no number of words.
"""

import codecs
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoe_jax.errors import UserError
from nemoe_jax.text.corpus import TEXT_SUFFIXES, read_documents
from nemoe_jax.text.tokenizers.load import Tokenizer
from nemoe_jax.utils.progress import progress_bar

PIECE_CHARACTERS = 1 << 18
PIECES_IN_FLIGHT = 16
ALL = "all"

ISO_639_1 = """
aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo
es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg
ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn
no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta
te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
LANGUAGES = frozenset(ISO_639_1.split())
WITHOUT_SPACES = frozenset({"bo", "dz", "ja", "km", "lo", "my", "th", "zh"})
CODE = re.compile(r"([a-z]{2})(?:[-_@][A-Za-z]{2,8})*")  # fr, fr_FR, zh-Hans, sr@latin
CUTS = (re.compile(r"(?<=\n)(?=[^\W_])"), re.compile(r"(?<=\S)(?= [^\W_])"))  # the better ones first


@dataclass(frozen=True)
class Count:
    """What a text holds: characters, UTF-8 bytes, words (None where its language has none), and tokens by tokenizer."""

    characters: int
    bytes: int
    words: int | None
    tokens: tuple[int, ...]

    def __add__(self, other: "Count") -> "Count":
        return Count(
            self.characters + other.characters,
            self.bytes + other.bytes,
            None if self.words is None or other.words is None else self.words + other.words,
            tuple(a + b for a, b in zip(self.tokens, other.tokens, strict=True)),
        )

    def ratio(self, tokenizer: int) -> float | None:
        """Tokens of a tokenizer over those of the first (None where that has none): 2 means twice as many."""
        return self.tokens[tokenizer] / self.tokens[0] if self.tokens[0] else None

    def figures(self, names: Sequence[str]) -> dict[str, Any]:
        """Everything as JSON holds it."""
        units = {"character": self.characters, "word": self.words, "byte": self.bytes}
        by_tokenizer = {
            name: {
                "tokens": tokens,
                **{f"tokens_per_{unit}": tokens / size if size else None for unit, size in units.items()},
                "ratio": self.ratio(i),
            }
            for i, (name, tokens) in enumerate(zip(names, self.tokens, strict=True))
        }
        return {"characters": self.characters, "bytes": self.bytes, "words": self.words, "tokenizers": by_tokenizer}


def language_of(path: Path) -> str:
    """The language that a file's path names, or else the name of its directory; its content is not looked at.

    In this order: a code of ISO 639-1 between dots in the file's name (`messages.fr.txt`, `messages.zh-Hans.txt`), a
    whole name that is a code (`fr.txt`, of text files only: `os.py` is no Ossetian), the nearest directory of such a
    name (`fr/help/index.txt`).
    """
    middle = path.name.split(".")[1:-1]
    stem = [path.stem] if path.suffix in TEXT_SUFFIXES else []
    names = (*reversed(middle), *stem, *reversed(path.parent.parts))
    code = next((name for name in names if _base(name)), None)
    return code.replace("_", "-") if code else path.parent.name or str(path.parent)


def _base(name: str) -> str:
    """`zh` of `zh-Hans` or `zh_CN`; nothing where a name is no language's code."""
    match = CODE.fullmatch(name)
    return match[1] if match and match[1] in LANGUAGES else ""


def compare(
    tokenizers: Sequence[Tokenizer],
    files: Sequence[Path],
    piece_characters: int = PIECE_CHARACTERS,
    progress: bool = True,
) -> dict[Path, Count]:
    """The count of every file that holds text, in order; of a .jsonl file, each line's "text" is encoded by itself.

    Raises:
        UserError: no file holds text, or one cannot be read (`read_pieces`).
    """
    counts: dict[Path, Count] = {}
    size = sum(file.stat().st_size for file in files)
    # encoders release the interpreter's lock
    with progress_bar(visible=progress) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = bar.add_task("count", total=size)
        for (file, text), tokens in _in_order(pool, _encodings(tokenizers), _pieces(files, piece_characters)):
            words = None if _base(language_of(file)) in WITHOUT_SPACES else len(text.split())
            count = Count(len(text), length := len(text.encode()), words, tokens)
            counts[file] = counts[file] + count if file in counts else count
            bar.advance(task, length)
    if not counts:
        raise UserError(f"{_names(files)}: empty text")
    return counts


def grouped(counts: Mapping[Path, Count], by: str | None) -> dict[str, Count]:
    """Counts by `file`, by `language` (as `language_of` has it, sorted) or, None, of all together."""
    groups: dict[str, Count] = {}
    for path, count in counts.items():
        key = str(path) if by == "file" else language_of(path) if by == "language" else ALL
        groups[key] = groups[key] + count if key in groups else count
    return dict(sorted(groups.items()))


def read_pieces(path: Path, piece_characters: int = PIECE_CHARACTERS) -> Iterator[tuple[str, bool]]:
    """A file's text piece by piece, and of each whether another goes before it; see the head of this module.

    Raises:
        UserError: not UTF-8, or not to be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, follows, position = "", False, 0
    try:
        with path.open("rb") as file:
            while True:
                data = file.read(piece_characters)
                held += decoder.decode(data, final=not data)
                position += len(data)
                if not data:
                    break
                while len(held) >= piece_characters:
                    end = _cut(held, piece_characters)
                    yield held[:end], follows
                    follows, held = True, held[end:]
    except UnicodeDecodeError as error:
        # the decoder's object begins with the bytes of a character that the block before left unfinished
        start = position + len(data) - len(error.object) + error.start
        raise UserError(
            f"{path}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x} at {start}"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if held:
        yield held, follows


def _cut(text: str, limit: int) -> int:
    """The last good place to cut a text at, or else `limit`."""
    for place in CUTS:
        ends = [match.end() for match in place.finditer(text, 1, limit + 1)]
        if ends:
            return ends[-1]
    return limit


def _pieces(files: Iterable[Path], piece_characters: int) -> Iterator[tuple[Path, str, bool]]:
    for file in files:
        if file.suffix == ".jsonl":
            yield from ((file, text, False) for text in read_documents(file))
        else:
            yield from ((file, text, follows) for text, follows in read_pieces(file, piece_characters))


def _encodings(tokenizers: Sequence[Tokenizer]) -> Callable[[str, bool], tuple[int, ...]]:
    """A function that counts a piece's tokens."""
    line_ends = [len(tokenizer.encode("\n")) for tokenizer in tokenizers]

    def count(text: str, follows: bool) -> tuple[int, ...]:
        if not follows:
            return tuple(len(tokenizer.encode(text)) for tokenizer in tokenizers)
        text = "\n" + text
        return tuple(
            len(tokenizer.encode(text)) - line_end for tokenizer, line_end in zip(tokenizers, line_ends, strict=True)
        )

    return count


def _in_order(
    pool: ThreadPoolExecutor, count: Callable[[str, bool], tuple[int, ...]], pieces: Iterable[tuple[Path, str, bool]]
) -> Iterator[tuple[tuple[Path, str], tuple[int, ...]]]:
    """Pieces and their tokens, in order, with a bounded number of them in memory."""
    flying: deque[tuple[tuple[Path, str], Future[tuple[int, ...]]]] = deque()
    for file, text, follows in pieces:
        flying.append(((file, text), pool.submit(count, text, follows)))
        if len(flying) >= PIECES_IN_FLIGHT:
            piece, tokens = flying.popleft()
            yield piece, tokens.result()
    while flying:
        piece, tokens = flying.popleft()
        yield piece, tokens.result()


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (", …" if len(files) > 3 else "")
