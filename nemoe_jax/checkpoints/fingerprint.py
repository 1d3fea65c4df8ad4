"""Fingerprints of models: what results that are kept on disk are keyed by, so that none outlives its model."""

import hashlib
from pathlib import Path

from nemoe_jax.checkpoints.reader import Checkpoint

SAMPLES, SAMPLE = 32, 1 << 12  # of each weight file: so many places, so many bytes at each
# what decides about a model's text beside its weights
COMPANIONS = (
    "*token*",
    "tekken.json",
    "*.model",
    "*.model.v*",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
)


def weights_fingerprint(source: Checkpoint, times: bool = True) -> str:
    """A hash of the config, of every tensor's name, dtype, shape and place, and of samples, sizes and times of files.

    It tells a changed source without reading gigabytes of weights.

    Args:
        times: False where a copy of the files is as good as they are.
    """
    digest = hashlib.sha256(repr(source.config).encode())
    for file in sorted(set(source.files.values()), key=lambda file: file.path.name):
        status = file.path.stat()
        time = status.st_mtime_ns if times else None
        digest.update(repr((file.path.name, status.st_size, time, file.entries)).encode())
        with file.path.open("rb") as data:
            for number in range(SAMPLES):
                data.seek(number * max(status.st_size - SAMPLE, 0) // (SAMPLES - 1))
                digest.update(data.read(SAMPLE))
    return digest.hexdigest()


def model_fingerprint(directory: str | Path) -> str:
    """`weights_fingerprint`, with the contents of the files of tokenizer, chat templates and generation settings."""
    digest = hashlib.sha256(weights_fingerprint(Checkpoint(directory)).encode())
    for path in sorted({path for pattern in COMPANIONS for path in Path(directory).glob(pattern)}):
        if path.is_file():
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
