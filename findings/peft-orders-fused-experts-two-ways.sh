#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# LoRA on an MoE model's fused experts (`target_parameters`) is saved as two matrices for all experts together, and the two
# are ordered differently. Row e * r + i of A is rank i of expert e; column i * E + e of B is the same rank of the same
# expert. Nothing in the file says so, and all shapes fit the other orders as well.
#
# Seen (3 experts, rank 2, gate_up_proj and down_proj of a Mixtral): the merged weights are W + alpha / r * B A with A
# read expert by expert and B rank by rank, to 2e-7; every other reading is off by more than 10.
#
# Why it matters: an adapter that is read, merged, written or cut to fewer experts in the wrong order is valid in every
# way that can be checked without PEFT, and is noise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 safetensors==0.8.0
cat > "$work/look.py" <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

E, R, ALPHA = 3, 2, 4
torch.manual_seed(0)
config = MixtralConfig(
    vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=E,
)
model = MixtralForCausalLM(config)
before = {name: weight.clone() for name, weight in model.state_dict().items()}
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
adapted = get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=[], target_parameters=targets))
for name, weight in adapted.named_parameters():
    if "lora_" in name:
        torch.nn.init.normal_(weight)
adapted.save_pretrained(sys.argv[1])
file = load_file(f"{sys.argv[1]}/adapter_model.safetensors")
after = adapted.merge_and_unload().state_dict()

ORDERS_OF_A = {"expert-major": lambda a: a.reshape(E, R, -1), "rank-major": lambda a: a.reshape(R, E, -1).transpose(0, 1)}
ORDERS_OF_B = {
    "expert-major": lambda b: b.reshape(-1, E, R).permute(1, 0, 2),
    "rank-major": lambda b: b.reshape(-1, R, E).permute(2, 0, 1),
}
for parameter, module in (("gate_up_proj", "experts.base_layer"), ("down_proj", "experts")):
    key = f"base_model.model.model.layers.0.mlp.{module}.lora_"
    a, b = file[f"{key}A.weight"], file[f"{key}B.weight"]
    weight = f"model.layers.0.mlp.experts.{parameter}"
    update, errors = after[weight] - before[weight], {}
    for of_a, split_a in ORDERS_OF_A.items():
        for of_b, split_b in ORDERS_OF_B.items():
            product = torch.einsum("eor,eri->eoi", split_b(b), split_a(a)) * ALPHA / R
            errors[of_a, of_b] = float((product - update).abs().max())
            print(f"{parameter}: A {tuple(a.shape)} {of_a}, B {tuple(b.shape)} {of_b}: off by {errors[of_a, of_b]:.2g}")
    right = errors.pop(("expert-major", "rank-major"))
    assert right < 1e-5 and min(errors.values()) > 1, "fused experts are ordered otherwise now"
PY
"$work/venv/bin/python" "$work/look.py" "$work/adapter" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
