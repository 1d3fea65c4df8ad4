"""Small models behind the HTTP API, in this process."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from nemoe_jax.adapters import lora
from nemoe_jax.serving.api.app import create_app
from nemoe_jax.serving.api.http_server import HttpServer, bind, url
from nemoe_jax.serving.api.served_model import ServedModel
from nemoe_jax.serving.engine.engine import Engine
from nemoe_jax.spec import schema
from nemoe_jax.spec.schema import Tree
from nemoe_jax.text.tokenizers.load import Tokenizer, cut_tekken, load_tokenizer
from tests.support.compiled import normal
from tests.support.configs import DENSE, write_tokenizer

CONFIG = DENSE.replace(vocab=1300, context=512)
ROWS, WAITING = 4, 8
TARGETS = [lora.Target("blocks/dense/*/*", rank=3, alpha=12)]


def tekken(directory: Path) -> Tokenizer:
    """The Tekken vocabulary, cut."""
    package = find_spec("mistral_common")
    assert package and package.origin
    data = Path(package.origin).parent / "data" / "tekken_240718.json"
    cut_tekken(data, directory / "tekken.json", CONFIG.vocab)
    return load_tokenizer(directory)


def words(directory: Path) -> Tokenizer:
    """Whole words, without a chat format."""
    write_tokenizer(directory, CONFIG.vocab)
    return load_tokenizer(directory)


def weights() -> Tree:
    """A dense model's, of large outputs: its answers depend on what it reads."""
    return schema.initialize(CONFIG, jax.random.key(0))


def adapter(seed: int) -> Tree:
    """An adapter that changes answers."""
    tree = lora.initialize(CONFIG, TARGETS, jax.random.key(seed))
    return jax.tree.map(lambda leaf: normal(jax.random.key(seed + 1), leaf.shape), tree)


@contextlib.contextmanager
def serve(
    engine: Any, tokenizer: Tokenizer, adapter_folder: Path | None = None, drain_seconds: int = 5, **options: Any
) -> Iterator[str]:
    """The base URL of a server, for as long as the context lasts; then it ends as at SIGTERM."""
    served = ServedModel(engine, CONFIG, tokenizer, "nano", adapter_folder, max_answers=ROWS + WAITING)
    server = HttpServer(drain_seconds, abort=lambda: engine.close(drain=False))
    options = {"closing": lambda: server.closing, **options}
    with bind("127.0.0.1", 0) as bound:
        address = url(bound)
        thread = threading.Thread(target=server.serve_app, args=(create_app(served, **options), bound))
        thread.start()
        try:
            while not getattr(server, "started", False):
                time.sleep(0.01)
            yield address
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join()


@contextlib.contextmanager
def started(tokenizer: Tokenizer, adapters: dict[str, Tree] | None = None) -> Iterator[Engine]:
    """An engine with the small model."""
    engine = Engine(  # deterministic: fewer programs
        CONFIG, weights(), tokenizer, max_num_seqs=ROWS, max_queued=WAITING, adapters=adapters, deterministic=True
    )
    try:
        yield engine
    finally:
        engine.close(drain=False)
