"""A model directory for a GGUF file: everything but the weights, which stay where they are.

It is made once, in the cache, when a `.gguf` is first opened: config.json, the tokenizer, chat templates,
generation_config.json, and a link to each file. Whatever reads model directories then reads GGUF files.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from nemoe_jax.checkpoints.gguf.naming import SPLIT_NAME, is_gguf
from nemoe_jax.checkpoints.layout import HUGGING_FACE
from nemoe_jax.errors import UserError

_FORM = 1  # counted up when other files are made of the same header


def model_directory(path: str | Path) -> Path:
    """The path itself; for a GGUF file the directory that stands for it.

    Raises:
        UserError: see `read_header`, `config_json` and `tokenizer_files`; or the cache cannot be written.
    """
    path = Path(path)
    if not is_gguf(path):
        return path
    directory = _cached(path)
    if not directory.is_dir():
        _make(directory, path)
    return directory


def gguf_files(directory: Path) -> list[Path]:
    """The GGUF files of a directory that `model_directory` made, the first one first; empty for any other."""
    return sorted(directory.glob("*.gguf"))


def _cached(path: Path) -> Path:
    """Where the directory of a file is, or will be; another one when the file has changed."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    known = f"{_FORM} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemoe-jax" / "gguf"
    split = SPLIT_NAME.match(path.name)
    return cache / hashlib.sha256(known.encode()).hexdigest()[:16] / (split["stem"] if split else path.stem)


def _make(directory: Path, path: Path) -> None:
    from nemoe_jax.checkpoints.gguf.config import config_json, generation_config_json  # the gguf package loads here
    from nemoe_jax.checkpoints.gguf.header import read_header
    from nemoe_jax.checkpoints.gguf.tokenizer import tokenizer_files

    header = read_header(path)
    content = config_json(header)
    HUGGING_FACE.parse(content, str(path))  # refused under the file's own name
    files = {
        "config.json": (json.dumps(content, indent=2) + "\n").encode(),
        "generation_config.json": (json.dumps(generation_config_json(header), indent=2) + "\n").encode(),
        **tokenizer_files(header),
    }
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
        try:
            for name, data in files.items():
                (staging / name).parent.mkdir(exist_ok=True)
                (staging / name).write_bytes(data)
            for file in header.paths:
                (staging / file.name).symlink_to(file.resolve())
            with contextlib.suppress(OSError):  # another process was faster, with the same
                staging.rename(directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{directory.parent}: {error.strerror}") from error
