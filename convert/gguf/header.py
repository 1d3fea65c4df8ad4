"""The metadata of a GGUF file: the sizes and the rotary embedding of the model, and its tokenizer."""

import gguf
import numpy as np

from convert.gguf.tokenizer import Vocabulary
from nemoe_jax.checkpoints.gguf.config import llama3_factors, yarn_attention_factor
from nemoe_jax.checkpoints.reader import Checkpoint
from nemoe_jax.inference.generation_config import read_generation_config
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe")


def header(checkpoint: Checkpoint, vocabulary: Vocabulary, file_type: gguf.LlamaFileType) -> gguf.GGUFWriter:
    """All of the file but its tensors."""
    config = checkpoint.config
    family = FAMILIES[config.family]
    assert family.gguf is not None
    writer = gguf.GGUFWriter(None, family.gguf)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(checkpoint.path.resolve().name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab)
    # llama.cpp has no window in these architectures; within it, full attention is the same
    writer.add_context_length(min(config.context, config.sliding_window or config.context))
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn or config.expert_ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.experts:
        writer.add_expert_count(config.experts)
        writer.add_expert_used_count(config.top_k)
        if family.gguf != "llama":
            writer.add_expert_feed_forward_length(config.expert_ffn)
        if config.shared_ffn:
            writer.add_expert_shared_feed_forward_length(config.shared_ffn)
    _add_rope_scaling(writer, config)
    vocabulary.add_to(writer, read_generation_config(checkpoint.directory).with_end_tokens(config))
    return writer


def _add_rope_scaling(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Llama 3's is a tensor instead; a dynamic one changes nothing within the context that the file names."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        factor = scaling.attention_factor / yarn_attention_factor(scaling.factor)
        if not np.isclose(factor, 1):
            writer.add_rope_scaling_attn_factors(factor)


def rope_factors(config: ModelConfig) -> np.ndarray:
    """`rope_freqs.weight` of a model with Llama 3's scaling, (H/2,)."""
    assert config.rope_scaling is not None
    return llama3_factors(config.rope_theta, config.head_dim, config.rope_scaling.to_hf()).astype(np.float32)
