"""Eight virtual CPU devices, and small configurations whose sizes differ pairwise, so that no transposition passes."""

import json
import os
from pathlib import Path

# Nearly all the time goes into compiling: compile fast rather than well (see the fixture `optimised`), and keep what
# was compiled; each worker for itself, as JAX writes a file of its cache while another process may be reading it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla" / os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
import tokenizers

from nemoe_jax import hf, schema
from nemoe_jax.config import ModelConfig

COMMON = {"hidden": 24, "heads": 6, "kv_heads": 2, "head_dim": 10, "vocab": 72, "context": 96, "dtype": "float32"}
DENSE = ModelConfig(family="mistral", layers=3, ffn=48, **COMMON)
MIXTRAL = ModelConfig(family="mixtral", layers=3, experts=16, top_k=4, expert_ffn=12, **COMMON)
NEKOMIND = ModelConfig(
    family="nekomind",
    layers=5,
    ffn=40,
    experts=8,
    top_k=3,
    expert_ffn=12,
    shared_ffn=14,
    dense_layers=2,
    qk_norm=True,
    tied=True,
    **COMMON,
)
# the sizes of DENSE as transformers' configs want them
TORCH_SIZES = {
    name: DENSE.to_hf()[name]
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
        "sliding_window",
    )
}
CONFIGS = {"dense": DENSE, "mixtral": MIXTRAL, "nekomind": NEKOMIND}


def write_tokenizer(directory: Path, vocabulary: int = 72) -> tokenizers.Tokenizer:
    """A tokenizer of whole words, `word0` and so on behind three control tokens, for a model of random weights."""
    words = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(vocabulary - 3))]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return tokenizer


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Frees what a module compiled: all modules' programs together would have more mappings than Linux allows."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimised():
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
    params = schema.initialise(config, jax.random.key(3))
    # norm weights that are not all ones, so that forgetting one shows
    params["blocks"]["dense"]["ffn_norm"] += 0.3 * jax.random.normal(jax.random.key(4), (3, 24))
    hf.save(tmp_path / "dense", config, params)
    return tmp_path / "dense"
