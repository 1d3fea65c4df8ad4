"""The writer: what is finished is found again, the result is the same bytes, and nothing is lost or left behind."""

import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from nemoe_jax.checkpoints import pretrained, reader, writer
from nemoe_jax.checkpoints.layout import INDEX
from nemoe_jax.checkpoints.safetensors_file import header_of, is_finite
from nemoe_jax.checkpoints.writer import Writer
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from nemoe_jax.utils.file_copy import is_mapped_whole, write_at
from tests.support.configs import DENSE

UNITS = DENSE.layers + 2


@pytest.fixture
def source(tmp_path):
    pretrained.save_pretrained(tmp_path / "source", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    return reader.Checkpoint(tmp_path / "source")


def copy(source, into, units):
    by_unit = reader.units(DENSE)
    for unit in units:
        into.write(unit, {ref.key: source.view(ref.key) for ref in by_unit[unit]}, {"unit": unit})


def files_of(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_an_interrupted_writer_goes_on_after_its_last_finished_unit(source, tmp_path, shard_bytes):
    def start(name, state):
        return Writer(tmp_path / name, DENSE, shard_bytes, state)

    with pytest.raises(KeyboardInterrupt), start("copy", {"options": 1}) as interrupted:
        copy(source, interrupted, [0, 3])
        raise KeyboardInterrupt
    assert not (tmp_path / "copy").exists()
    # as SIGKILL leaves it: half a line
    with (tmp_path / ".copy.partial" / "finished-0.jsonl").open("a") as journal:
        journal.write('{"unit": 1, "fig')
    with start("copy", {"options": 1}) as resumed:
        assert resumed.finished == {0: {"unit": 0}, 3: {"unit": 3}}
        copy(source, resumed, [1, 2])
    with start("copy", {"options": 1}) as resumed:  # what came after the half line is found, too
        assert resumed.finished.keys() == {0, 1, 2, 3}
        np.testing.assert_array_equal(resumed.read(4)["model.norm.weight"], np.zeros(24))
        copy(source, resumed, [4])
        resumed.finish(extra={"note.txt": "x"})
    with start("whole", None) as whole:
        copy(source, whole, reversed(range(UNITS)))
        whole.finish(extra={"note.txt": "x"})
    assert files_of(tmp_path / "copy") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source", "whole"]


def test_only_a_whole_mapped_array_is_copied_by_the_system(tmp_path, monkeypatch):
    numbers = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    (tmp_path / "source").write_bytes(b"12345678" + numbers.tobytes())
    mapped = np.memmap(tmp_path / "source", np.float32, "r", 8, numbers.shape)
    for array in (mapped, mapped[3:], mapped[:, 2:5].copy(), numbers):
        assert is_mapped_whole(array) == (array is mapped)
        with (tmp_path / "target").open("wb") as target:
            write_at(target.fileno(), 5, array)
        assert (tmp_path / "target").read_bytes()[5:] == array.tobytes()
    monkeypatch.delattr(os, "pwrite")
    with (tmp_path / "target").open("wb") as target:
        write_at(target.fileno(), 0, mapped)
    assert (tmp_path / "target").read_bytes() == numbers.tobytes()


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS])
def test_where_the_system_does_not_copy_the_bytes_are_written(tmp_path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    (tmp_path / "source").write_bytes(bytes(range(200)))
    with (tmp_path / "target").open("wb") as target:
        write_at(target.fileno(), 0, np.memmap(tmp_path / "source", np.uint8, "r"))
    assert (tmp_path / "target").read_bytes() == bytes(range(200))


def test_a_writer_with_other_options_starts_afresh(source, tmp_path):
    with Writer(tmp_path / "copy", DENSE, 1, {"options": 1}) as first:
        copy(source, first, [0])
    with Writer(tmp_path / "copy", DENSE, 1, {"options": 2}) as second:
        assert second.finished == {}


def test_the_files_are_what_safetensors_reads(source, tmp_path):
    with Writer(tmp_path / "copy", DENSE.replace(dtype="bfloat16"), 20_000) as copied:
        copy(source, copied, range(UNITS))
        copied.finish()
    read = {}
    for path in (tmp_path / "copy").glob("*.safetensors"):
        read |= load_file(path)
    for key in source.files:
        np.testing.assert_array_equal(read[key], source.view(key).astype(jnp.bfloat16))
    index = json.loads((tmp_path / "copy" / INDEX).read_text())
    assert index["weight_map"].keys() == read.keys()


def test_the_header_is_aligned():
    for width in range(20):
        header, offsets, _ = header_of({"a" * width: ((3,), "float16"), "b": ((2, 5), "float16")})
        assert len(header) % 8 == 0 and list(offsets.values()) == [len(header), len(header) + 6]
        assert len(header) == 8 + int.from_bytes(header[:8], "little")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(dtype, bad):
    tensor = np.full((700, 1000), -jnp.finfo(dtype).max, dtype)
    assert is_finite(tensor)
    tensor[699, 998] = bad
    assert not is_finite(tensor)


def test_what_is_not_finite_is_named_and_leaves_nothing(source, tmp_path):
    tensors = {ref.key: np.array(source.view(ref.key)) for ref in reader.units(DENSE)[1]}
    tensors["model.layers.0.mlp.up_proj.weight"][5, 7] = np.inf
    with (
        pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: NaN or infinite"),
        Writer(tmp_path / "deep" / "down" / "copy", DENSE, 1, {"options": 1}) as broken,
    ):
        broken.write(1, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=40_000))
    with pytest.raises(UserError, match=r"wants 0\.0 GB of disk, 0\.0 GB are free there"):
        Writer(tmp_path / "copy", DENSE)
    assert not any(tmp_path.iterdir())


FULL_ON_THE_WAY = """
import resource, sys
from nemoe_jax.checkpoints.reader import Checkpoint, units
from nemoe_jax.checkpoints.writer import Writer
source = Checkpoint(sys.argv[1])
with Writer(sys.argv[2], source.config, 10**9, {"options": 1}) as writer:
    for unit, refs in enumerate(units(source.config)):
        if unit == 3:  # the system itself refuses to write beyond this byte
            limit = int(sys.argv[3])
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        writer.write(unit, {ref.key: source.view(ref.key) for ref in refs})
"""


def test_a_disk_that_fills_up_keeps_what_is_finished(source, tmp_path):
    limit = writer.plan(DENSE)[0].offsets["model.layers.2.mlp.up_proj.weight"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_ON_THE_WAY, str(tmp_path / "source"), str(tmp_path / "copy"), str(limit)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "ResumableError" in done.stderr and "goes on from there" in done.stderr
    assert not (tmp_path / "copy").exists()
    with Writer(tmp_path / "copy", DENSE, 10**9, {"options": 1}) as resumed:
        assert sorted(resumed.finished) == [0, 1, 2]
        copy(source, resumed, [3, 4])
        resumed.finish()
    assert files_of(tmp_path / "copy")["model.safetensors"] == files_of(tmp_path / "source")["model.safetensors"]
