"""The engine: however a conversion is run, interrupted or spread out, the directory holds the same bytes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert import cli
from convert.streaming import MANIFEST, REPORT
from nemoe_jax.checkpoints import reader
from nemoe_jax.checkpoints.layout import INDEX
from nemoe_jax.errors import UserError

FLAGS = ["--experts", "4", "--top-k", "2", "--shard-gb", "1e-5"]
KILLED = """
import os, signal, sys
from convert import cli
from nemoe_jax.checkpoints.writer import Writer
write, calls = Writer._encoded, []
def write_or_die(*arguments):
    calls.append(1)
    if len(calls) == 18:  # in the midst of a layer
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
Writer._encoded = write_or_die
cli.main(sys.argv[1:])
"""


def start(*program):
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device
    return subprocess.Popen([sys.executable, *program], env=environment, cwd=Path(__file__).parents[2])


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def expected(dense_directory, tmp_path):
    """What a single process with one device makes without interruption."""
    assert start("-m", "convert.cli", "carve", str(dense_directory), str(tmp_path / "expected"), *FLAGS).wait() == 0
    files = files_of(tmp_path / "expected")
    assert {"model-00001-of-00005.safetensors", INDEX, MANIFEST, REPORT} <= files.keys()
    return files


def test_killed_spread_over_devices_or_over_processes_the_bytes_are_the_same(dense_directory, tmp_path, expected):
    # eight devices, in this process
    assert cli.main(["carve", str(dense_directory), str(tmp_path / "devices"), *FLAGS]) == 0
    assert files_of(tmp_path / "devices") == expected

    # killed in the midst of a layer, and started again
    command = ["carve", str(dense_directory), str(tmp_path / "killed"), *FLAGS]
    assert start("-c", KILLED, *command).wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    finished = (tmp_path / ".killed.partial" / "finished-0.jsonl").read_text().splitlines()
    assert 1 <= len(finished) < 5
    assert start("-m", "convert.cli", *command).wait() == 0
    assert files_of(tmp_path / "killed") == expected

    # two processes, each with its own layers
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = ["-m", "convert.cli", "carve", str(dense_directory), str(tmp_path / "two"), *FLAGS, "--distributed"]
    processes = [start(*command, address, "2", str(number)) for number in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert files_of(tmp_path / "two") == expected
    assert not list(tmp_path.glob(".*"))  # nothing is left behind


def test_a_dry_run_says_what_would_be_and_writes_nothing(dense_directory, tmp_path, capsys):
    flags = [*FLAGS, "--dry-run", "--json"]
    assert cli.main(["carve", str(dense_directory), str(tmp_path / "deep" / "moe"), *flags]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    assert cli.main(["carve", str(dense_directory), str(tmp_path / "moe"), *FLAGS]) == 0
    written = {path.name: path.stat().st_size for path in (tmp_path / "moe").glob("*.safetensors")}
    assert plan["files"] == written
    assert plan["gigabytes"] == pytest.approx(sum(written.values()) / 1e9)
    assert plan["free_gigabytes"] > 0 and plan["seconds_per_layer"] > 0


def test_the_manifest_names_the_source_by_its_sums(dense_directory, tmp_path):
    import hashlib

    assert cli.main(["carve", str(dense_directory), str(tmp_path / "moe"), *FLAGS]) == 0
    manifest = json.loads((tmp_path / "moe" / MANIFEST).read_text())
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in dense_directory.iterdir()}
    assert manifest["source"] == {"name": "dense", "sha256": sums}
    assert manifest["options"]["command"] == "carve" and manifest["options"]["experts"] == 4
    assert [layer["layer"] for layer in manifest["layers"]] == [0, 1, 2]


def test_an_error_in_one_thread_stops_all_and_leaves_nothing(dense_directory, tmp_path, monkeypatch):
    from convert.carve import carve, layer

    original = layer.cluster_and_route

    def choose(gate_FD, *rest):
        if np.asarray(gate_FD, np.float32)[0, 0] == third:
            raise UserError("layer two is bad")
        return original(gate_FD, *rest)

    source = reader.Checkpoint(dense_directory)
    third = float(source.view("model.layers.2.mlp.gate_proj.weight")[0, 0])
    monkeypatch.setattr(layer, "cluster_and_route", choose)
    with pytest.raises(UserError, match="dense: layer two is bad"):
        carve.carve(dense_directory, tmp_path / "moe", carve.CarveOptions(experts=4, top_k=2))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
