#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.6
#
# transformers 5 writes the base of the rotary embedding into `rope_parameters`, and no `rope_theta` at the top level of
# config.json any more. transformers 4 takes no notice of that and goes on with 10000.
#
# Seen (a Mistral config with rope_theta 1e6, as Mistral NeMo has it): 5.24 writes rope_parameters
# {"rope_theta": 1000000.0, "rope_type": "default"}; 4.57.6 reads that file as rope_theta 10000.
#
# Why it matters: the model loads without a message and answers worse the longer the text is. Older readers, converters
# and own loaders that look for `rope_theta` need it beside the new key.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 5.24.0 4.57.6; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet transformers==$version
done
cat > "$work/write.py" <<'PY'
import json
import sys

from transformers import MistralConfig

MistralConfig(rope_theta=1e6).save_pretrained(sys.argv[1])
with open(f"{sys.argv[1]}/config.json") as file:
    saved = {key: value for key, value in json.load(file).items() if "rope" in key}
print(f"5.24.0 writes {saved}")
assert saved == {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "5.24.0 writes other keys"
PY
cat > "$work/read.py" <<'PY'
import sys

from transformers import AutoConfig

theta = AutoConfig.from_pretrained(sys.argv[1]).rope_theta
print(f"4.57.6 reads rope_theta {theta}")
assert theta == 1e4, "4.57.6 reads the new key"
PY
"$work/5.24.0/bin/python" "$work/write.py" "$work/model" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
"$work/4.57.6/bin/python" "$work/read.py" "$work/model" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
