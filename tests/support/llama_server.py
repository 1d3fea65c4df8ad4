"""llama.cpp's server in this process, and small models that it takes."""

import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest

llama_cpp = pytest.importorskip("xllamacpp")
mistral_common = pytest.importorskip("mistral_common")

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import declare, leaves, unflatten
from nemoe_jax.text.tokenizers.load import cut_tekken

DATA = Path(mistral_common.__file__).parent / "data"
COMMON = {
    "hidden": 64,
    "layers": 2,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 32,
    "vocab": 1400,
    "rope_theta": 3e4,
    "norm_eps": 1e-3,
    "context": 256,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "dense": ModelConfig(family="mistral", ffn=96, **COMMON),
    "tied": ModelConfig(family="llama", ffn=96, tied=True, **COMMON),
    "moe": ModelConfig(family="mixtral", experts=5, top_k=3, expert_ffn=32, **COMMON),
}


def random_params(config: ModelConfig):
    """Weights of twice the usual size and norms that are not ones, so that the likeliest token stands out."""
    random = np.random.default_rng(0)
    specs = leaves(declare(config))
    return unflatten(
        {
            path: (
                random.normal(0, 0.3, spec.shape) + 1
                if spec.std is None
                else random.normal(0, 1, spec.shape) * 2 * spec.std
            ).astype(np.float32)
            for path, spec in specs.items()
        }
    )


def save(directory: Path, config: ModelConfig, tokenizer_from: Path | None = None):
    """Writes a model directory; returns the parameters."""
    params = random_params(config)
    pretrained.save_pretrained(directory, config, params, tokenizer_from=tokenizer_from)
    return params


def cut(directory: Path, size: int) -> None:
    """Puts the first `size` tokens of the real Tekken into a directory."""
    cut_tekken(DATA / "tekken_240718.json", directory / "tekken.json", size)


class LlamaCpp:
    """llama.cpp's server in this process, on the CPU, with caches in float32."""

    def __init__(self, path: Path):
        params = llama_cpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_gpu_layers, params.cpuparams.n_threads = 256, 0, 1
        params.warmup, params.verbosity = False, -1
        params.cache_type_k = params.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = llama_cpp.Server(params)
        # a server that is closed before its loop has begun is never told to end, and hangs
        self.post("/completion", prompt=[1], n_predict=1, cache_prompt=False)

    def post(self, path: str, **body):
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request) as answer:
            return json.load(answer)

    def tokenize(self, text: str, **options) -> list[int]:
        return self.post("/tokenize", content=text, **options)["tokens"]

    def chat(self, messages) -> list[int]:
        prompt = self.post("/apply-template", messages=messages)["prompt"]
        return self.tokenize(prompt, add_special=True, parse_special=True)

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        answer = self.post(
            "/completion", prompt=prompt, n_predict=new_tokens, temperature=0, ignore_eos=True, return_tokens=True
        )
        return answer["tokens"]

    def log_probabilities(self, prompt: list[int], vocab: int) -> np.ndarray:
        """Of the token after the prompt, (V,)."""
        letter = [[20 + ord("a"), 1000]]  # half a character or an end token would come without its probabilities
        answer = self.post("/completion", prompt=prompt, n_predict=1, temperature=0, n_probs=vocab, logit_bias=letter)
        rows = answer["completion_probabilities"][0]["top_logprobs"]
        by_token = {row["id"]: row["logprob"] for row in rows}
        assert len(by_token) == vocab
        return np.array([by_token[token] for token in range(vocab)])
