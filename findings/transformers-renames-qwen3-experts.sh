#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.6
#
# Qwen3-MoE's number of experts is `num_experts` in config.json as Qwen published it and as transformers 4 and 5.0 write
# it. Later releases (5.3 to 5.24 have been looked at) write `num_local_experts` instead, for this family but not for
# Qwen2-MoE. transformers 4.57 takes no notice of that key: it goes by its default of 128 experts.
#
# Seen (a config with 8 experts): 5.24 writes num_local_experts 8 and no num_experts; 4.57.6 reads that file as 128
# experts. For Qwen2-MoE 5.24 writes num_experts. 5.24 itself reads both spellings.
#
# Why it matters: a directory that was only loaded and saved again is of another shape for older readers, and whatever
# else looks for `num_experts` finds nothing. Readers should know both keys, and writers write both.
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

from transformers import AutoConfig, Qwen2MoeConfig, Qwen3MoeConfig

for name, kind in (("qwen2", Qwen2MoeConfig), ("qwen3", Qwen3MoeConfig)):
    kind(num_experts=8).save_pretrained(f"{sys.argv[1]}/{name}")
    with open(f"{sys.argv[1]}/{name}/config.json") as file:
        saved = json.load(file)
    found = {key: saved[key] for key in ("num_experts", "num_local_experts") if key in saved}
    print(f"5.24.0 writes for {name}_moe: {found}")
    assert found == {"num_local_experts" if name == "qwen3" else "num_experts": 8}, "5.24.0 writes other keys"
for key in ("num_experts", "num_local_experts"):
    assert AutoConfig.for_model("qwen3_moe", **{key: 8}).num_experts == 8, "5.24.0 reads one spelling only"
PY
cat > "$work/read.py" <<'PY'
import sys

from transformers import AutoConfig

experts = [AutoConfig.from_pretrained(f"{sys.argv[1]}/{name}").num_experts for name in ("qwen2", "qwen3")]
print(f"4.57.6 reads {experts[0]} experts for qwen2_moe and {experts[1]} for qwen3_moe")
assert experts == [8, 128], "4.57.6 reads the new key"
PY
"$work/5.24.0/bin/python" "$work/write.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
"$work/4.57.6/bin/python" "$work/read.py" "$work" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
