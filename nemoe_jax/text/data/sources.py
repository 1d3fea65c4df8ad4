"""Where rows come from: files of text, JSON Lines, JSON and Parquet, or a data set of Hugging Face.

Everything is streamed: a line, an element of a JSON list, or a batch of a Parquet row group at a time. Each row comes
with its place, for errors; a row that cannot even be read is a `BadRow` in its stead.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemoe_jax.errors import UserError
from nemoe_jax.text.data.formats import COLUMNS, without_nulls
from nemoe_jax.text.data.messages import BadRow

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
MISSING = "expected the package {0} for {1} (pip install 'nemoe-jax[datasets]')"
BATCH_ROWS = 1024
CHUNK = 1 << 20  # characters of a JSON list read at once
DATASET = "hf:"  # what the name of a data set begins with on the command line
LARGEST_ROW = 1 << 28  # characters after which an element of a list is taken to have no end

PlacedRow = tuple[str, Any]  # where it stands, and an object, a string or a BadRow


class Rows(NamedTuple):
    """A source that was found, not yet read."""

    name: str
    identity: list[Any]  # what changes when its rows do, for JSON
    read: Callable[[], Iterator[PlacedRow]]


def find_rows(patterns: Sequence[str], exclude: Iterable[Path] = ()) -> Rows:
    """Finds the files of paths, globs and directories, but for the excluded ones.

    Raises:
        UserError: a pattern that matches no file.
    """
    files = find_files(patterns, exclude)
    stats = [(str(file), file.stat()) for file in files]
    identity = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]
    return Rows(", ".join(patterns), identity, lambda: (row for file in files for row in read_file(file)))


def find_all(words: Sequence[str]) -> list[Rows]:
    """The sources that a command names: files as `find_rows` finds them, and data sets of Hugging Face.

    A data set is written `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:SUBSET:SPLIT`; the split is `train` by default.

    Raises:
        UserError: nothing there, or a package is missing.
    """
    sets = [word.removeprefix(DATASET).split(":") for word in words if word.startswith(DATASET)]
    patterns = [word for word in words if not word.startswith(DATASET)]
    found = [find_rows(patterns)] if patterns else []
    for name, *parts in sets:
        if not name or len(parts) > 2:
            raise UserError(
                f"{DATASET}{':'.join([name, *parts])}: expected hf:NAME, hf:NAME:SPLIT or hf:NAME:SUBSET:SPLIT"
            )
        subset, split = (parts[0] if len(parts) == 2 else None), (parts[-1] if parts else "train")
        found.append(find_dataset(name, subset, split))
    return found


def find_files(patterns: Sequence[str], exclude: Iterable[Path] = (), suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files of paths, globs and directories (their files of those suffixes), sorted, each once.

    Raises:
        UserError: a pattern that matches no file, or nothing left after the exclusion.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [file for suffix in suffixes for file in path.rglob(f"*{suffix}")]
        elif path.is_file():
            matches = [path]
        else:
            try:
                matches = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            except ValueError as error:  # such as a**b
                raise UserError(f"{pattern}: {error}") from error
        matches = [match for match in matches if match.is_file()]
        if not matches:
            kinds = " and ".join(suffixes)
            raise UserError(f"{pattern}: no text there; expected a file, a glob, or a directory of {kinds} files")
        found.update(match.resolve() for match in matches)
    left = sorted(found - {path.resolve() for path in exclude})
    if not left:
        raise UserError(f"{', '.join(patterns)}: every file there is held out")
    return left


def read_file(path: Path) -> Iterator[PlacedRow]:
    """The rows of a file; any suffix but .jsonl, .json and .parquet means one text.

    Raises:
        UserError: the file cannot be read, or what follows a damaged row cannot be found.
    """
    readers = {".jsonl": read_lines, ".json": read_list, ".parquet": read_parquet}
    try:
        yield from readers.get(path.suffix, read_text)(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def read_text(path: Path) -> Iterator[PlacedRow]:
    """A text file as one row, line ends as they are."""
    try:
        yield str(path), path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        yield str(path), BadRow(f"expected UTF-8 text, got byte 0x{error.object[error.start]:02x} at {error.start}")


def read_lines(path: Path) -> Iterator[PlacedRow]:
    """The rows of a JSON Lines file; blank lines are no rows."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes | str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return BadRow(f"expected a JSON object, got {line.strip()[:60]!r}")


def read_list(path: Path) -> Iterator[PlacedRow]:
    """The rows of a JSON file that holds a list; JSON Lines under the name .json are read as well."""
    decode = json.JSONDecoder().raw_decode
    blank, between = re.compile(r"\s*"), re.compile(r"[\s,]*")
    with path.open(encoding="utf-8-sig") as file:
        try:
            text = file.read(CHUNK)
            start = _end(blank, text, 0)
            line, newline, _ = text[start:].partition("\n")
            if line.startswith("{") and not (newline and isinstance(_parsed(line), BadRow)):
                yield from read_lines(path)
                return
            if text[start : start + 1] != "[":
                raise UserError(f"{path}: expected a list of rows, or one row a line, got {text[start : start + 40]!r}")
            at, number, more = start + 1, 1, CHUNK
            while True:
                at = _end(between, text, at)
                if text[at : at + 1] == "]":
                    return
                try:
                    value, end = decode(text, at)
                except (ValueError, RecursionError) as error:
                    rest = file.read(more) if len(text) - at < LARGEST_ROW else ""
                    if not rest:
                        shown = text[at : at + 60]
                        raise UserError(f"{path}: row {number}: not JSON, or cut short: {shown!r}") from error
                    text, at, more = text[at:] + rest, 0, 2 * more
                    continue
                yield f"{path}: row {number}", value
                at, number, more = end, number + 1, CHUNK
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: expected UTF-8, got byte 0x{error.object[error.start]:02x}") from error


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def read_parquet(path: Path) -> Iterator[PlacedRow]:
    """The rows of a Parquet file, its row groups read one after another."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: {MISSING.format('pyarrow', 'Parquet files')}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _known(file.schema_arrow.names)
            yield from _placed(
                str(path), (batch.to_pylist() for batch in file.iter_batches(BATCH_ROWS, columns=columns))
            )
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # ValueError: text that is not UTF-8
        raise UserError(f"{path}: not a Parquet file, or damaged ({' '.join(str(error).split())})") from error


def find_dataset(name: str, subset: str | None, split: str, streaming: bool = False) -> Rows:
    """A data set of Hugging Face, on the hub or in a directory.

    Args:
        split: its name, perhaps with the rows of it that are meant, as in `train[400:400000]`.
        streaming: read the rows from where they are, as they are wanted, and keep no copy of the data set.

    Raises:
        UserError: there is none, it has no such split, or the package `datasets` is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"dataset {name}: {MISSING.format('datasets', 'data sets of Hugging Face')}") from error
    path = Path(name).expanduser()
    saved = [path / file for file in ("dataset_dict.json", "state.json") if (path / file).is_file()]
    try:
        if saved:  # these are read from where they are in any case
            data = datasets.load_from_disk(str(path))
        elif streaming:
            builder = datasets.load_dataset_builder(name, subset)
            data = _rows_of_stream(builder, split)
        else:
            data = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library and the hub's client raise errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"dataset {name}: cannot be loaded: {reason}") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"dataset {name}: split: expected one of {', '.join(data)}, got {split!r}")
        data = data[split]
    identity = data._fingerprint if isinstance(data, datasets.Dataset) else f"stream {builder.cache_dir}"
    columns = _known(data.column_names or [])
    label = f"{name} ({split})"

    def read() -> Iterator[PlacedRow]:
        tables = (data.select_columns(columns) if columns else data).with_format("arrow").iter(BATCH_ROWS)
        return _placed(label, (table.to_pylist() for table in tables))

    return Rows(label, ["dataset", str(path.resolve()) if saved else name, subset, split, identity], read)


def _rows_of_stream(builder: Any, split: str) -> Any:
    """A split as a stream, or the rows of it that brackets behind its name say."""
    named = re.fullmatch(r"(.*)\[(\d*):(\d*)\]", split)
    if named is None:
        return builder.as_streaming_dataset(split=split)
    first, last = int(named[2] or 0), named[3]
    stream = builder.as_streaming_dataset(split=named[1]).skip(first)
    return stream.take(max(int(last) - first, 0)) if last else stream


def _known(columns: Sequence[str]) -> list[str] | None:
    """The columns that are read; all of them where none is known, so that errors can name them."""
    return [name for name in columns if name in COLUMNS] or None


def _placed(name: str, batches: Iterable[list[Any]]) -> Iterator[PlacedRow]:
    rows = (row for batch in batches for row in batch)
    return ((f"{name}: row {number}", without_nulls(row)) for number, row in enumerate(rows, 1))
