#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0, accelerate 1.15.0
#
# Dequantizing a checkpoint of quant_method "fp8" (FineGrainedFP8Config(dequantize=True), what CPUs get), transformers
# does not use the config's weight_block_size: it divides the number of rows by the number of scales. Where blocks of
# 128 do not divide the rows, the last block is partial, and the quotient is another block: rows then get a neighbor's
# scale, without a word. Where the quotient is no whole number, loading fails instead.
#
# Seen: a projection of 192 rows, blocks of 128, scales 1 and 2 (two blocks of rows: 128 and 64). Rows 96 to 127 come
# out twice as large as weight x scale; all others are right. With 320 rows (3 scales) loading raises.
#
# Why it matters: SmolLM2-135M has 192 rows of keys and values, many small models have such widths. A writer of this
# format should take a block that divides every width and say so in weight_block_size.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0
cat > "$work/look.py" <<'PY'
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file


def opened(folder: pathlib.Path, rows: int) -> torch.Tensor:
    """k_proj as transformers dequantizes it; its weights are 1, the scales of its blocks of rows 1, 2, 3 ..."""
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=rows, vocab_size=8,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        height, width = tensors[name].shape
        tensors[name] = torch.ones(height, width).to(torch.float8_e4m3fn)
        scales = torch.arange(1.0, 1 + -(-height // 128))[:, None].repeat(1, -(-width // 128))
        tensors[name + "_scale_inv"] = scales.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(content))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
    )
    return model.model.layers[0].self_attn.k_proj.weight.float()[:, 0]


folder = pathlib.Path(sys.argv[1])
found = opened(folder / "even", 256)
assert found[:128].eq(1).all() and found[128:].eq(2).all(), "whole blocks are read otherwise now"
found = opened(folder / "partial", 192)
changes = [row for row in range(1, 192) if found[row] != found[row - 1]]
print(f"192 rows in blocks of 128: the scale changes at rows {changes}; expected [128]")
assert changes == [96], "partial blocks are read otherwise now"
try:
    opened(folder / "odd", 320)
except RuntimeError as error:
    print("320 rows:", type(error).__name__)
else:
    raise SystemExit("320 rows can be loaded now")
PY
"$work/venv/bin/python" "$work/look.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
