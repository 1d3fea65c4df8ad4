"""Eight virtual CPU devices, and fixtures of the small configurations."""

import gc
import os
import sys
from pathlib import Path

# Nearly all the time goes into compiling: compile fast rather than well (see the fixture `optimized`), and keep what
# was compiled for all workers. JAX writes a file of its cache in place; who reads half of one warns and compiles.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # programs without the lines that they come from
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# without its newer emitters of fusions XLA:CPU compiles three times faster
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS)).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# our modules' bytecode is kept for the commands that tests start
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import jax
import pytest

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig
from tests.support.compiled import normal
from tests.support.configs import CONFIGS, DENSE


def pytest_collection_modifyitems(items):
    """Whole runs and the largest files come first, so that no worker has a long one left when the other has ended."""
    first = ("benchmarks", "train")
    items.sort(key=lambda item: (*(part not in item.path.parts for part in first), -item.path.stat().st_size))


def pytest_collection_finish():
    """What is imported by now stays: tracing makes so many objects that looking through it again takes much time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Frees what a module compiled: all modules' programs together would have more mappings than Linux allows."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimized():
    """Compiles as users do, for tests that are about the compiled program."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request) -> ModelConfig:
    """Each of the small configurations in turn."""
    return request.param


@pytest.fixture
def dense_directory(tmp_path):
    """A model directory of random dense weights, in bfloat16, with no tokenizer."""
    config = DENSE.replace(dtype="bfloat16")
    params = schema.initialize(config, jax.random.key(3))
    # norm weights that are not all ones, so that forgetting one shows
    params["blocks"]["dense"]["ffn_norm"] += normal(jax.random.key(4), (3, 24), 0.3)
    pretrained.save_pretrained(tmp_path / "dense", config, params)
    return tmp_path / "dense"
