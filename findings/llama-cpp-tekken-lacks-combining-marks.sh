#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp), gguf 0.19.0, mistral-common 1.13.1, numpy 2.3.5
#
# GGUF files do not hold the expression that cuts a text into words, only its name. llama.cpp's expression for "tekken"
# differs from the one in Mistral's tekken.json: combining marks (\p{M}) do not belong to words there. The same vocabulary
# and merges then give other tokens for scripts that write vowels or tones as marks.
#
# Seen (the real Tekken vocabulary in a GGUF file): English, German, Tamil and Korean words come out equal; Hindi
# "हिन्दी" is 3 tokens for mistral-common and 4 for llama.cpp, a Hindi sentence 12 and 17, Bengali "বাংলা" 3 and 4,
# Arabic with a shadda has as many but others.
#
# Why it matters: such prompts reach the model as it was not trained to read them, and longer, without a
# message; and comparing logits of the two sides by text fails for a reason that is not the weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0 mistral-common==1.13.1 numpy==2.3.5
cat > "$work/look.py" <<'PY'
import base64
import json
import pathlib
import sys
import urllib.request

import mistral_common
import numpy as np
import xllamacpp
from gguf import GGUFWriter, TokenType
from gguf.vocab import bytes_to_unicode
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

source = pathlib.Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
spec, tekken = json.loads(source.read_text()), Tekkenizer.from_file(source)
control = spec["config"]["default_num_special_tokens"]
words = [base64.b64decode(entry["token_bytes"]) for entry in spec["vocab"][: tekken.n_words - control]]
ranks, spelling = {word: rank for rank, word in enumerate(words)}, bytes_to_unicode()


def spell(word):
    return "".join(spelling[byte] for byte in word)


def merge_of(word):
    """The two halves of the merge that makes a word: byte-pair encoding of the word itself, up to its last step."""
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 2:
        pairs = [(ranks.get(left + right, len(ranks)), at) for at, (left, right) in enumerate(zip(parts, parts[1:]))]
        rank, at = min(pairs)
        if rank == len(ranks):
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return " ".join(map(spell, parts))


width, path = 32, f"{sys.argv[1]}/tekken.gguf"
writer = GGUFWriter(path, "llama")
for add, value in (
    (writer.add_context_length, 256), (writer.add_embedding_length, width), (writer.add_block_count, 1),
    (writer.add_feed_forward_length, width), (writer.add_head_count, 1), (writer.add_head_count_kv, 1),
    (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, width),
    (writer.add_vocab_size, tekken.n_words), (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "tekken"),
    (writer.add_token_list, [f"<SPECIAL_{i}>" for i in range(control)] + [spell(word) for word in words]),
    (writer.add_token_types, [TokenType.CONTROL] * control + [TokenType.NORMAL] * len(words)),
    (writer.add_token_merges, [merge for word in words if len(word) > 1 and (merge := merge_of(word))]),
    (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2),
):
    add(value)
writer.add_tensor("token_embd.weight", np.zeros((tekken.n_words, width), np.float32))
writer.add_tensor("output_norm.weight", np.zeros(width, np.float32))
for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
    writer.add_tensor(f"blk.0.{name}.weight", np.zeros((width, width), np.float32))
for name in ("attn_norm", "ffn_norm"):
    writer.add_tensor(f"blk.0.{name}.weight", np.zeros(width, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers = path, 256, 0
params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, -1
server = xllamacpp.Server(params)
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def llama_cpp(text):
    body = json.dumps({"content": text, "parse_special": False}).encode()
    request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    with direct.open(request) as answer:
        return json.load(answer)["tokens"]


equal = {}
for text in ("the house", "Straße", "மனித", "한국어", "हिन्दी", "सभी मनुष्यों को गौरव और अधिकारों", "বাংলা", "عربيّ"):
    mistral, other = tekken.encode(text, bos=False, eos=False), llama_cpp(text)
    equal[text] = mistral == other
    print(f"{text}: mistral-common {len(mistral)} tokens, llama.cpp {len(other)}, {'equal' if equal[text] else 'other'}")
assert list(equal.values()) == [True] * 4 + [False] * 4, "llama.cpp cuts words otherwise now"
PY
"$work/venv/bin/python" "$work/look.py" "$work"
