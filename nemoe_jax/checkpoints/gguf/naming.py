"""What tells a GGUF file and the parts of a split model; nothing here needs the gguf package."""

import re
from pathlib import Path

MAGIC = b"GGUF"
EXACT_SPACES = "sentencepiece_spaces"  # in tokenizer_config.json: text gets its space in front as SentencePiece does it
SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def is_gguf(path: str | Path) -> bool:
    """Whether a path means a GGUF file: by its name, or by its first bytes."""
    path = Path(path)
    if not path.is_file():
        return path.suffix == ".gguf" and not path.exists()
    if path.suffix == ".gguf":
        return True
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
