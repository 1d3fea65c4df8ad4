"""The commands' compilation cache: where it is, when it is off, and that a second run finds the first's programs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.errors import UserError
from nemoe_jax.spec import schema
from nemoe_jax.utils.compilation_cache import VARIABLE, use_compilation_cache
from tests.support.configs import DENSE

DIRECTORY = "JAX_COMPILATION_CACHE_DIR"
OURS = (VARIABLE, DIRECTORY, "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_MAX_SIZE", "XLA_FLAGS")


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """One in which nothing is said of the cache; restored afterwards."""
    for name in (*OURS, "JAX_NUM_CPU_DEVICES", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # so that what is set below is forgotten at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return monkeypatch


def test_it_is_bounded_and_lies_in_the_users_cache(environment, tmp_path):
    use_compilation_cache()
    directory = Path(os.environ[DIRECTORY])
    assert directory.is_dir() and directory.is_relative_to(tmp_path / "home" / "nemoe-jax")
    assert 0 < int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]) < 10**10


def test_flag_and_variable_choose_the_directory_or_turn_it_off(environment, tmp_path):
    environment.setenv(VARIABLE, str(tmp_path / "variable"))
    use_compilation_cache()
    assert os.environ.pop(DIRECTORY) == str(tmp_path / "variable")
    use_compilation_cache(str(tmp_path / "flag"))
    assert os.environ.pop(DIRECTORY) == str(tmp_path / "flag")
    environment.setenv(VARIABLE, "none")
    use_compilation_cache()
    assert DIRECTORY not in os.environ and os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


@pytest.mark.parametrize(
    ("name", "value"), [("XLA_FLAGS", "--xla_force_host_platform_device_count=8"), ("JAX_NUM_CPU_DEVICES", "2")]
)
def test_it_is_off_with_virtual_devices(environment, name, value):
    environment.setenv(name, value)
    use_compilation_cache()
    assert DIRECTORY not in os.environ


def test_jaxs_own_variable_holds(environment):
    environment.setenv(DIRECTORY, "elsewhere")
    use_compilation_cache("mine")
    assert os.environ[DIRECTORY] == "elsewhere" and not Path("mine").exists()


def test_a_directory_that_cannot_be_is_an_error_only_where_it_was_asked_for(environment, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="compilation cache"):
        use_compilation_cache(str(tmp_path / "file" / "below"))
    environment.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    use_compilation_cache()
    assert DIRECTORY not in os.environ


def test_a_second_run_reads_what_the_first_one_compiled(environment, tmp_path):
    pretrained.save_pretrained(tmp_path / "model", DENSE, schema.initialize(DENSE, jax.random.key(0)))
    environment.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

    def run(*flags):
        words = ["logits", str(tmp_path / "model"), "--tokens", "1,2", "--out", str(tmp_path / "out.npy"), *flags]
        subprocess.run([sys.executable, "-m", "nemoe_jax.cli.main", *words], check=True, capture_output=True)
        files = (tmp_path / "home").rglob("*-cache")
        times = {file: file.with_name(file.name.removesuffix("-cache") + "-atime") for file in files}
        return {file.name: int.from_bytes(time.read_bytes(), "little") for file, time in times.items()}

    assert not run("--compilation-cache", "none")
    first = run()
    assert first
    second = run()
    assert second.keys() == first.keys() and all(second[name] > first[name] for name in first)  # all read again
