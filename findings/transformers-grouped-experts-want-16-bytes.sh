#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0
#
# MoE models of transformers 5 compute their experts by `torch._grouped_mm` unless told otherwise. It raises on experts
# whose rows are no multiple of 16 bytes, which the config and the weights do not tell: the model loads, and the first
# forward pass fails. `set_experts_implementation("eager")` or `"batched_mm"` computes all of them.
#
# Seen (Mixtral with experts of width 4, 6, 8 and 12): "RuntimeError: strides should be multiple of 16 bytes" in float32
# for 6, in bfloat16 for 4, 6 and 12.
#
# Why it matters: cutting a dense FFN into many small experts, or pruning neurons, easily gives such widths; and the
# same model may run in float32 and fail in bfloat16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$work/look.py" <<'PY'
import torch
from transformers import MixtralConfig, MixtralForCausalLM

tokens = torch.arange(8)[None]
for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
    for width in (4, 6, 8, 12):
        config = MixtralConfig(
            vocab_size=16, hidden_size=32, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4,
        )
        model = MixtralForCausalLM(config).to(dtype).eval()
        try:
            with torch.no_grad():
                model(tokens)
            error = None
        except RuntimeError as raised:
            error = str(raised)
        print(f"{dtype}, experts of {width}, rows of {width * size} bytes: {error or 'computed'}")
        assert (error is not None) == (width * size % 16 > 0), "other widths are computed now"
        model.set_experts_implementation("eager")
        with torch.no_grad():
            assert model(tokens).logits.isfinite().all()
PY
"$work/venv/bin/python" "$work/look.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
