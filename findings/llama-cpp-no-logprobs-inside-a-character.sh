#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp), gguf 0.19.0, numpy 2.3.5
#
# llama.cpp's server lists log-probabilities (`n_probs`) for each piece of text, not for each token. A token that ends in
# the middle of a character has no entry of its own, so `completion_probabilities` has fewer entries than `tokens`.
#
# Seen (a byte-level vocabulary): forced to the letter a, 6 tokens have 6 entries; forced to the first byte of ä, 6
# tokens have none.
#
# Why it matters: zipping tokens with probabilities silently puts them side by side wrongly from the first character
# that takes several tokens on. Entries have to be matched by their ids, and logits compared on tokens that are whole
# characters.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import json
import sys
import urllib.request

import numpy as np
import xllamacpp
from gguf import GGUFWriter, TokenType
from gguf.vocab import bytes_to_unicode

vocab, width, path = 258, 32, f"{sys.argv[1]}/bytes.gguf"
writer, spelling = GGUFWriter(path, "llama"), bytes_to_unicode()
tokens = [spelling[byte] for byte in range(256)] + ["<s>", "</s>"]
for add, value in (
    (writer.add_context_length, 256), (writer.add_embedding_length, width), (writer.add_block_count, 1),
    (writer.add_feed_forward_length, width), (writer.add_head_count, 1), (writer.add_head_count_kv, 1),
    (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, width), (writer.add_vocab_size, vocab),
    (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "gpt-2"), (writer.add_token_list, tokens),
    (writer.add_token_types, [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 2),
    (writer.add_token_merges, [f"{tokens[0]} {tokens[1]}"]), (writer.add_bos_token_id, 256),
    (writer.add_eos_token_id, 257),
):
    add(value)
random = np.random.default_rng(0)
shapes = {"token_embd": (vocab, width), "output_norm": (width,)}
shapes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
shapes |= {f"blk.0.ffn_{name}": (width, width) for name in ("gate", "up", "down")}
shapes |= {"blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,)}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers = path, 256, 0
params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, -1
server = xllamacpp.Server(params)
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def entries(token):
    body = {"prompt": [97, 98], "n_predict": 6, "temperature": 0, "n_probs": 2, "return_tokens": True}
    body["logit_bias"] = [[token, 1000]]
    request = urllib.request.Request(
        server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with direct.open(request) as reply:
        answer = json.load(reply)
    counts = len(answer["tokens"]), len(answer.get("completion_probabilities", []))
    print(f"token {token} ({bytes([token])}): {counts[0]} tokens, {counts[1]} entries with probabilities")
    return counts


assert entries(ord("a")) == (6, 6)
assert entries(0xC3) == (6, 0), "tokens inside a character have their probabilities now"
PY
"$work/venv/bin/python" "$work/look.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
