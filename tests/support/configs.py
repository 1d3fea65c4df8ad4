"""Small configurations whose sizes differ pairwise, so that no transposition passes, and a tokenizer for them."""

import json
from pathlib import Path

import tokenizers

from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.hf_config import to_hf

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
    name: to_hf(DENSE)[name]
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
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return tokenizer
