"""The streaming engine that every conversion runs on: read a layer, transform it, write it.

A conversion says what a layer of the result is made of that the source does not hold as it stands; everything else is
copied, tensor by tensor. Memory holds two layers, whatever the model: layers are transformed in as many threads as
there are devices, each on its own device, and at least in two, so that one is written while the next is computed. In a
`jax.distributed` job every process takes its own layers. Conversions whose layers depend on one another (carving with
calibration text) go one by one instead.

The result grows in a directory beside the target and takes its name when complete; a job that was interrupted goes on
after its last finished layer when it is started again with the same options.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.manifest import Figures, Manifest, Plan, versions
from convert.report import page
from convert.settings import MANIFEST, REPORT, ConversionSettings
from nemoe_jax.checkpoints.fingerprint import weights_fingerprint
from nemoe_jax.checkpoints.layout import HUGGING_FACE, Layout
from nemoe_jax.checkpoints.reader import Checkpoint, TensorRef, units
from nemoe_jax.checkpoints.writer import KEPT, Writer
from nemoe_jax.checkpoints.writer import plan as plan_files
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.utils.output_path import check_room, free_bytes, refuse_existing
from nemoe_jax.utils.progress import progress_bar

MOST_THREADS = 8

Tensors = dict[str, np.ndarray]  # {checkpoint key: tensor in the checkpoint's layout}
Layer = Callable[[int], tuple[Tensors, Figures]]  # layer number -> its new tensors, and figures for the manifest


def convert_layers(
    source: Checkpoint,
    destination: str | Path,
    config: ModelConfig,
    layer: Layer,
    options: dict[str, Any],
    *,
    run: ConversionSettings = ConversionSettings(),
    copy: Callable[[TensorRef], np.ndarray] | None = None,
    finished: Callable[[int, Tensors], None] | None = None,
    summary: Callable[[], Figures] | None = None,
    layout: Layout = HUGGING_FACE,
    inputs: dict[str, str] | None = None,
    extra: dict[str, str] | None = None,
    tokenizer_from: Path | None = None,
) -> Manifest:
    """Writes the model directory `destination` of shape `config`; returns its manifest.

    The manifest (conversion.json beside the weights; conversion.html shows it) holds the options, versions, the
    source's SHA-256 sums and the figures of each layer. A dry run returns the plan instead and leaves nothing.

    Args:
        layer: makes a layer; called from several threads, in any order, unless `finished` is given.
        options: the command and all that decides about the result.
        copy: makes the tensors that `layer` does not; by default they are the source's of the same key.
        finished: is shown each layer as it was written, in ascending order (those of an interrupted job, too), before
            the next is made; layers then go one by one, in a single process.
        summary: figures of the whole for the manifest, asked for at the end.
        layout: of the destination.
        inputs: hashes of what else decides about the result, such as calibration text: an interrupted job goes on only
            where they are the same.
        extra: {name: content} of text files to put beside the weights.
        tokenizer_from: a directory whose tokenizer is carried along instead of the source's.

    Raises:
        UserError: the destination exists, the source turns out bad (nothing is left behind then), no room on the disk.
    """
    by_unit = units(config)
    take = copy or (lambda ref: source.view(ref.key, config.dtype))

    def make(unit: int) -> tuple[Tensors, Figures]:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused, by name, when it is written
            tensors, figures = layer(unit - 1) if 1 <= unit <= config.layers else ({}, {})
        return tensors | {ref.key: take(ref) for ref in by_unit[unit] if ref.key not in tensors}, figures

    if run.dry_run:
        plan = _dry_run(destination, config, make, run, layout, sequential=finished is not None)
        return Manifest(options, config, plan=plan)
    if finished and jax.process_count() > 1:
        raise UserError(f"{options['command']}: its layers depend on one another; run it in a single process")
    state = {
        "options": options,
        "fingerprint": weights_fingerprint(source),
        "inputs": inputs or {},
        "result": dataclasses.asdict(config),
        "shard_bytes": run.shard_bytes,
        "versions": versions(),
    }
    with (
        resumable(),
        Writer(destination, config, run.shard_bytes, state, layout) as writer,
        Hashes(source) as hashes,
        progress_bar() as bar,
    ):
        mine = [unit for unit in range(len(by_unit)) if unit % jax.process_count() == jax.process_index()]
        task = bar.add_task(f"{options['command']} {source.directory.name}", total=len(mine))

        def write(unit: int) -> None:
            if unit not in writer.finished:
                try:
                    writer.write(unit, *make(unit))
                except UserError as error:
                    if type(error) is not UserError or str(source.path) in str(error):
                        raise
                    raise UserError(f"{source.path}: {error}") from error
            bar.advance(task)

        if finished:
            for unit in mine:
                write(unit)
                if 1 <= unit <= config.layers:
                    finished(unit - 1, writer.read(unit))
        else:
            _each_in_threads(write, mine)
        writer.wait()
        manifest = Manifest(
            options,
            config,
            source.path.resolve().name,
            hashes.result(),
            inputs or {},
            summary() if summary else {},
            [{"layer": unit - 1, **writer.finished[unit]} for unit in range(1, config.layers + 1)],
        )
        texts = {MANIFEST: json.dumps(manifest.as_json(), indent=2) + "\n", REPORT: page(manifest)}
        writer.finish(tokenizer_from or source.directory, texts | (extra or {}))
    return manifest


def _each_in_threads(write: Callable[[int], None], todo: list[int]) -> None:
    """Calls `write` for each unit from a few threads, each with a device of its own; the first error stops all."""
    devices = jax.local_devices()
    threads = min(max(2, len(devices)), MOST_THREADS)

    def on_device(unit: int) -> None:
        with jax.default_device(devices[unit % len(devices)]):
            write(unit)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(on_device, unit) for unit in todo]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _dry_run(
    destination: str | Path,
    config: ModelConfig,
    make: Callable[[int], Any],
    run: ConversionSettings,
    layout: Layout,
    sequential: bool,
) -> Plan:
    """What would be written, whether it fits, and how long a layer takes; nothing stays behind."""
    refuse_existing(destination)
    files = {file.name: file.size for file in plan_files(config, run.shard_bytes, layout)}
    check_room(Path(destination), sum(files.values()))
    started = time.monotonic()
    make(1 if sequential else config.layers)
    seconds = time.monotonic() - started
    threads = 1 if sequential else len(jax.local_devices()) * jax.process_count()
    return Plan(files, free_bytes(Path(destination)), seconds, seconds * config.layers / threads)


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Says how an interrupted conversion goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(KEPT) from None


class Hashes:
    """SHA-256 of config.json and of every weight file, computed beside the conversion; in the first process alone."""

    def __init__(self, source: Checkpoint):
        self._paths = [source.directory / source.config_file, *sorted({file.path for file in source.files.values()})]
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._stop = threading.Event()

    def _compute(self) -> dict[str, str]:
        return {path.name: self._sha256(path) for path in self._paths}

    def _sha256(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not self._stop.is_set() and (block := file.read(1 << 20)):
                digest.update(block)
        return digest.hexdigest()

    def result(self) -> dict[str, str]:
        """{file name: hexadecimal sum}; waits for it."""
        return self._future.result() if self._future else {}

    def __enter__(self) -> "Hashes":
        self._future = self._pool.submit(self._compute) if jax.process_index() == 0 else None
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown()
