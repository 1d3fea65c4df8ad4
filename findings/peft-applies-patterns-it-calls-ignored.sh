#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# A rank or alpha of its own for one fused expert parameter (`rank_pattern`, `alpha_pattern` with `target_parameters`) is
# applied, while PEFT warns that the key matched nothing and was ignored.
#
# Seen (3 experts, r=2, lora_alpha=2): rank_pattern {"gate_up_proj": 4} gives A 12 rows instead of 6, alpha_pattern
# {"gate_up_proj": 32} a scale of 16 instead of 1, each with "did not match any targeted module and were ignored".
#
# Why it matters: who believes the warning takes the adapter for one of equal ranks; who "corrects" the pattern until the
# warning goes away loses it. Ranks must be read from the tensors' shapes, scales from the config's patterns.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cat > "$work/look.py" <<'PY'
import warnings

from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM


def adapt(**patterns):
    """(rows of A, scale, what is said of patterns) of the parameter gate_up_proj."""
    config = MixtralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3,
    )
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=targets, **patterns)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(MixtralForCausalLM(config), lora)
    wrapper = next(module for module in model.modules() if getattr(module, "parameter_name", "") == "gate_up_proj")
    said = [str(warning.message) for warning in caught if "_pattern" in str(warning.message)]
    print(f"{patterns}: {wrapper.lora_A['default'].out_features} rows, scale {wrapper.scaling['default']}, {said}")
    return wrapper.lora_A["default"].out_features, wrapper.scaling["default"], said


assert adapt() == (6, 1.0, [])
rows, _, said = adapt(rank_pattern={"gate_up_proj": 4})
assert rows == 12 and "ignored" in said[0], "patterns of parameters are treated otherwise now"
_, scale, said = adapt(alpha_pattern={"gate_up_proj": 32})
assert scale == 16 and "ignored" in said[0], "patterns of parameters are treated otherwise now"
PY
"$work/venv/bin/python" "$work/look.py" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
