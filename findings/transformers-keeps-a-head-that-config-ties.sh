#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0, safetensors 0.8.0
#
# With `"tie_word_embeddings": true` and a file that holds an lm_head.weight of other values than the embedding,
# transformers 5 does not tie: it keeps the file's head, with a warning. The loaded config still says true, and so does
# what is saved from it, head included. An equal lm_head.weight in the file is tied as the config says.
#
# Seen: head of all sevens in the file: lm_head.weight[0, 0] is 7, and no longer the embedding's own parameter;
# config.tie_word_embeddings True before and after saving.
#
# Why it matters: config.json alone does not say what the model is. A reader that goes by it and leaves the head out
# computes other logits than transformers from the same directory.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 safetensors==0.8.0
cat > "$work/look.py" <<'PY'
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=True,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
file = f"{sys.argv[1]}/model.safetensors"
weights = load_file(file)
embedding = weights["model.embed_tokens.weight"]
assert "lm_head.weight" not in weights
tied = {}
for name, head in (("equal", embedding.clone()), ("other", torch.full_like(embedding, 7.0))):
    save_file(weights | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    tied[name] = model.lm_head.weight is model.model.embed_tokens.weight
    print(f"{name} head in the file: tied {tied[name]}, lm_head.weight[0, 0] = {model.lm_head.weight[0, 0].item():.4f}")
model.save_pretrained(f"{sys.argv[1]}/again")
with open(f"{sys.argv[1]}/again/config.json") as saved:
    says = json.load(saved)["tie_word_embeddings"]
keeps = "lm_head.weight" in load_file(f"{sys.argv[1]}/again/model.safetensors")
print(f"saved again: tie_word_embeddings {says}, lm_head.weight in the file {keeps}")
assert tied == {"equal": True, "other": False} and model.lm_head.weight[0, 0] == 7, "the head is treated otherwise now"
assert model.config.tie_word_embeddings and says and keeps
PY
"$work/venv/bin/python" "$work/look.py" "$work/model" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
