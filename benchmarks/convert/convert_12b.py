"""Time and memory of the conversions at the size of Mistral NeMo 12B, against copying the same files.

    python -m benchmarks.convert.convert_12b --directory /big/disk  (70 GB of disk, half an hour; --layers 4 for a look)
    python -m benchmarks.convert.convert_12b --tpu                (compiles the per-layer program for a v5e:2x2; no TPU)

First a model of the 12B's shape is written, with random weights. Each conversion is a public command in a process of
its own; its result is removed when it has been measured. Named limits: a multiple of the time in which `cp -r` copies
the source, and 4 GiB of resident memory, mapped pages of files included.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from examples.demo.nano import tekken_file
from nemoe_jax.checkpoints.reader import units
from nemoe_jax.checkpoints.writer import Writer
from nemoe_jax.spec.config import ModelConfig, preset

MEMORY_LIMIT = 4 * 2**30  # bytes
POOL = 1 << 26  # random numbers, used over and over
CALIBRATION_SCORES = "scores.json"


def main() -> None:
    """Writes the model, runs the conversions, prints the table; exit status 1 beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/12b"), help="where to work (default runs/12b)")
    parser.add_argument("--layers", type=int, default=40, help="layers of the model (default 40)")
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU instead (pip install libtpu)")
    arguments = parser.parse_args()
    if arguments.tpu:
        compile_for_tpu()
        return
    directory: Path = arguments.directory
    directory.mkdir(parents=True)
    dense, moe, result = directory / "dense", directory / "moe", directory / "result"
    started = time.monotonic()
    write_random(dense, preset("mistral-nemo-12b").replace(layers=arguments.layers))
    size = size_of(dense)
    print(f"dense model of {size / 1e9:.1f} GB written in {time.monotonic() - started:.0f} s")
    shutil.copyfile(tekken_file(), dense / "tekken.json")  # gguf wants a tokenizer
    write_scores(directory / CALIBRATION_SCORES, arguments.layers)

    within = []
    copied = copy_seconds(dense, result)
    within.append(convert("gguf", dense, result, copied, 2, "--type", "bf16"))
    discard(result)
    within.append(convert("carve", dense, moe, copied, 8, "--experts", "16", "--top-k", "4"))
    discard(dense)
    copied = copy_seconds(moe, result)
    scores = ("--choices", str(directory / CALIBRATION_SCORES))
    within.append(convert("prune-experts", moe, result, copied, 2, "--experts", "8", *scores))
    discard(result)
    within.append(convert("upcycle", moe, result, copied, 2, "--experts", "32"))
    print(f"  (the result of upcycling is {size_of(result) / size_of(moe):.2f} x its source)")
    shutil.rmtree(directory)
    sys.exit(not all(within))


def write_random(directory: Path, config: ModelConfig) -> None:
    """A model of that shape: normal weights from a pool of random numbers, norms of ones."""
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32).astype("bfloat16")
    with Writer(directory, config) as writer:
        place = 0
        for unit, refs in enumerate(units(config)):
            tensors = {}
            for ref in refs:
                place = (place + 7_654_321) % POOL  # neighboring tensors begin elsewhere
                scale = np.asarray(ref.spec.std or 0, pool.dtype)
                numbers = np.resize(np.roll(pool, place), ref.spec.torch_size) * scale
                tensors[ref.key] = (numbers if ref.spec.std else numbers + 1).reshape(ref.spec.torch_shape)
            writer.write(unit, tensors)
        writer.finish()


def write_scores(path: Path, layers: int) -> None:
    """What `prune-experts` would find on calibration text, made up: finding it is not what is measured here."""
    random = np.random.default_rng(1)
    rows = [{"layer": layer, "scores": random.random(16).tolist()} for layer in range(layers)]
    path.write_text(json.dumps({"layers": rows}), encoding="utf-8")


def copy_seconds(source: Path, destination: Path) -> float:
    """The time of `cp -r`, after what was written before has reached the disk."""
    os.sync()
    started = time.monotonic()
    subprocess.run(["cp", "-r", source, destination], check=True)
    seconds = time.monotonic() - started
    discard(destination)
    print(f"copying {source.name}: {seconds:.0f} s, {size_of(source) / seconds / 1e9:.2f} GB/s", flush=True)
    return seconds


def convert(command: str, source: Path, destination: Path, copied: float, limit: float, *flags: str) -> bool:
    """Runs a command, prints its figures, and tells whether they are within the limits."""
    os.sync()
    program = [sys.executable, "-m", "convert.cli", command, str(source), str(destination), *flags]
    started = time.monotonic()
    child = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds, peak = time.monotonic() - started, usage.ru_maxrss * 1024
    if status:
        sys.exit(f"{command} failed")
    print(
        f"{command:14} {seconds:6.0f} s   {seconds / copied:5.2f} x the copy (limit {limit})   "
        f"peak {peak / 2**30:.2f} GiB (limit {MEMORY_LIMIT / 2**30:.0f})",
        flush=True,
    )
    return seconds <= limit * copied and peak <= MEMORY_LIMIT


def discard(path: Path) -> None:
    """Removes a file or a directory."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def size_of(directory: Path) -> int:
    """Bytes of a directory's files."""
    return sum(path.stat().st_size for path in directory.iterdir())


def compile_for_tpu() -> None:
    """Compiles what carves one layer of the 12B for one device of a v5e:2x2, as every device of the slice runs it."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from convert.carve.layer import cluster_and_route
    from convert.options import CarveOptions

    device = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0])
    config, options = preset("mistral-nemo-12b"), CarveOptions()

    def program(gate_FD, norm_D, seed):
        return cluster_and_route(gate_FD, norm_D, options, jax.random.key(seed), np.empty(0, int))

    shapes = [((config.ffn, config.hidden), "bfloat16"), ((config.hidden,), "float32"), ((), "uint32")]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=device) for shape, dtype in shapes]
    started = time.monotonic()
    compiled = jax.jit(program).lower(*arguments).compile()
    seconds, memory = time.monotonic() - started, compiled.memory_analysis()
    in_and_out = memory.argument_size_in_bytes + memory.output_size_in_bytes
    print(f"compiled in {seconds:.0f} s ({seconds / 60:.2f} x a minute)")
    temporary = memory.temp_size_in_bytes
    print(f"per device: {in_and_out / 1e9:.2f} GB of arguments and results, {temporary / 1e9:.2f} GB temporary")
    sys.exit(seconds > 60)


if __name__ == "__main__":
    main()
