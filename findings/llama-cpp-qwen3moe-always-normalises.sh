#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp), gguf 0.19.0, transformers 5.24.0, torch 2.13.0
#
# Qwen3-MoE has a switch, norm_topk_prob: whether the weights of the chosen experts are divided by their sum.
# transformers' config has it off unless it is given. llama.cpp always divides for its architecture qwen3moe; a GGUF file
# that says expert_weights_norm = false is loaded without a word and changes nothing.
#
# Seen (largest difference of log-probabilities, one small model, 8 experts, top-2): against transformers with
# norm_topk_prob=False 0.62, with True 3e-6, whether the file says false, true or nothing.
#
# Why it matters: an MoE model whose router is meant to weigh without normalising (carved from a dense model, say) answers
# differently in llama.cpp, and nothing in its file can be set to correct that.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0 torch==2.13.0 transformers==5.24.0
cat > "$work/look.py" <<'PY'
import json
import sys
import urllib.request

import numpy as np
import torch
import xllamacpp
from gguf import GGUFWriter, TokenType
from gguf.vocab import bytes_to_unicode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCAB, HIDDEN, FFN, EXPERTS, PROMPT = 300, 64, 32, 8, [97, 98, 99, 100, 101, 102]
BLOCK = {
    "self_attn.q_proj.weight": "attn_q", "self_attn.k_proj.weight": "attn_k", "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output", "self_attn.q_norm.weight": "attn_q_norm",
    "self_attn.k_norm.weight": "attn_k_norm", "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm", "mlp.gate.weight": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
} | {f"model.layers.0.{theirs}": f"blk.0.{name}.weight" for theirs, name in BLOCK.items()}


def reference(normalise):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, moe_intermediate_size=FFN, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts=EXPERTS, num_experts_per_tok=2,
        norm_topk_prob=normalise, rope_theta=1e4, rms_norm_eps=1e-5, initializer_range=0.2, max_position_embeddings=256,
    )
    return Qwen3MoeForCausalLM(config).eval()


def write(path, weights, normalise):
    writer, spelling = GGUFWriter(path, "qwen3moe"), bytes_to_unicode()
    tokens = [spelling[byte] for byte in range(256)] + [f"<{i}>" for i in range(256, VOCAB)]
    for add, value in (
        (writer.add_context_length, 256), (writer.add_embedding_length, HIDDEN), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, FFN), (writer.add_expert_feed_forward_length, FFN),
        (writer.add_expert_count, EXPERTS), (writer.add_expert_used_count, 2), (writer.add_head_count, 2),
        (writer.add_head_count_kv, 1), (writer.add_key_length, 32), (writer.add_value_length, 32),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 1e4), (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "gpt-2"), (writer.add_token_list, tokens),
        (writer.add_token_types, [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * (VOCAB - 256)),
        (writer.add_token_merges, [f"{tokens[0]} {tokens[1]}"]), (writer.add_bos_token_id, 256),
        (writer.add_eos_token_id, 257),
    ):
        add(value)
    if normalise is not None:
        writer.add_expert_weights_norm(normalise)
    for name, weight in weights.items():
        if name.endswith("gate_up_proj"):
            writer.add_tensor("blk.0.ffn_gate_exps.weight", np.ascontiguousarray(weight[:, :FFN]))
            writer.add_tensor("blk.0.ffn_up_exps.weight", np.ascontiguousarray(weight[:, FFN:]))
        else:
            writer.add_tensor(NAMES[name], weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp(path):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers = path, 256, 0
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    # one letter is forced, as half a character would come without its probabilities; the bias does not change them
    body = {"prompt": PROMPT, "n_predict": 1, "temperature": 0, "n_probs": VOCAB, "logit_bias": [[97, 1000]]}
    request = urllib.request.Request(
        server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        rows = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    found = {row["id"]: row["logprob"] for row in rows}
    return np.array([found[token] for token in range(VOCAB)])


expected = {}
for normalise in (False, True):
    with torch.no_grad():
        logits = reference(normalise)(torch.tensor([PROMPT])).logits[0, -1]
    expected[normalise] = logits.log_softmax(-1).numpy()
weights = {name: weight.detach().float().numpy() for name, weight in reference(False).state_dict().items()}
for said in (None, False, True):
    write(f"{sys.argv[1]}/{said}.gguf", weights, said)
    found = llama_cpp(f"{sys.argv[1]}/{said}.gguf")
    off = {normalise: float(np.abs(found - logits).max()) for normalise, logits in expected.items()}
    print(f"file says {said}: differs by {off[False]:.2g} from norm_topk_prob=False, by {off[True]:.2g} from True")
    assert off[True] < 1e-3 < 0.1 < off[False], "llama.cpp no longer always normalises"
PY
"$work/venv/bin/python" "$work/look.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
