#!/usr/bin/env bash
# transformers 5.13.1 (and 5.23.0), torch 2.13.0
#
# Whether a model may change how its experts are computed is read from the text of the file that defines its class: it may
# if "@use_experts_implementation" stands there, anywhere. A subclass in another file has the very same experts, but not
# the word.
#
# Seen: a Qwen3-MoE of random weights takes `grouped_mm` without being asked. A subclass of it in a file of its own, with
# nothing but its name, falls back to `eager` without a warning, and refuses `experts_implementation="grouped_mm"` ("does
# not support setting experts implementation"). The same file with the word in a comment takes `grouped_mm` again. The
# logits are the same.
#
# Why it matters: code beside the weights (`trust_remote_code`) that derives from a model of the library computes one
# expert after the other, several times slower with many of them, and nothing says so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 transformers==5.13.1
for name in plain worded; do
  cat > "$work/$name.py" <<'PY'
from transformers import Qwen3MoeForCausalLM


class Own(Qwen3MoeForCausalLM):
    pass
PY
done
echo "# @use_experts_implementation" >> "$work/worded.py"
cat > "$work/look.py" <<'PY'
import plain
import torch
import worded
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

config = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
torch.manual_seed(0)
first = Qwen3MoeForCausalLM(config)
tokens = torch.arange(9)[None]
taken, logits = {}, {}
for name, kind in {"library": Qwen3MoeForCausalLM, "subclass": plain.Own, "with the word": worded.Own}.items():
    config._experts_implementation = None
    model = kind(config)
    model.load_state_dict(first.state_dict())
    taken[name], logits[name] = model.config._experts_implementation, model(tokens).logits
print(taken)
assert taken == {"library": "grouped_mm", "subclass": "eager", "with the word": "grouped_mm"}
assert all(torch.allclose(one, logits["library"], atol=1e-6) for one in logits.values())
try:
    plain.Own(config).set_experts_implementation("grouped_mm")
except ValueError as error:
    print(error)
else:
    raise SystemExit("the subclass takes grouped_mm")
PY
PYTHONPATH="$work" "$work/venv/bin/python" "$work/look.py"
