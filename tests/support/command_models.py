"""A small model that commands can run: a mixture of random weights with a real Tekken vocabulary, cut."""

from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.spec import schema
from nemoe_jax.text.tokenizers.load import cut_tekken
from tests.support.configs import MIXTRAL

VOCABULARY = 400


def write_model(directory: Path, **changes) -> Path:
    """Writes it; `changes` are other values of its config."""
    config = MIXTRAL.replace(**({"vocab": VOCABULARY} | changes))
    pretrained.save_pretrained(directory, config, schema.initialize(config, jax.random.key(0)))
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path, vocabulary: int = VOCABULARY) -> None:
    """Puts the first tokens of Tekken's vocabulary beside a model."""
    package = find_spec("mistral_common")
    if package is None or package.origin is None:
        pytest.skip("mistral-common is not installed")
    tekken = Path(package.origin).parent / "data" / "tekken_240718.json"
    cut_tekken(tekken, directory / "tekken.json", vocabulary)
