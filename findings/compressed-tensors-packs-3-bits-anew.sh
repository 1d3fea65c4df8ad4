#!/usr/bin/env bash
# compressed-tensors 0.17.1 and 0.18.0, torch 2.13.0
#
# The bytes that stand for weights of 3, 5, 6 and 7 bits in `pack-quantized` changed from 0.17.1 to 0.18.0, under the same
# format name and key: before, each int32 held as many whole values as fit and left the rest of its bits unused; since, the
# values follow each other without a gap, across the borders of int32s. 4 and 8 bits are as they were.
#
# Seen: 64 values of 3 bits take 7 int32s in 0.17.1 (10 values each) and 6 in 0.18.0; 0.18.0 cannot give back what 0.17.1
# packed (it gives other values, or an error for the shape). 64 values of 4 bits are the same 8 int32s in both.
#
# Why it matters: a checkpoint of 3 bits that one version wrote is not read by the other, and nothing in its config says
# which of them it is; only the width of `weight_packed` does. Check it before weights are taken for packed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PY'
import json
import sys

import torch
from compressed_tensors.compressors.pack_quantized import helpers

written = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
packed, read = {}, {}
for bits in (3, 4):
    low = -(1 << (bits - 1))
    values = (torch.arange(64) % (1 << bits) + low).to(torch.int8)[None]
    packed[bits] = helpers.pack_to_int32(values, bits).tolist()
    if written:
        try:
            again = helpers.unpack_from_int32(torch.tensor(written[str(bits)], dtype=torch.int32), bits, values.shape)
            read[bits] = bool(torch.equal(again.to(torch.int8), values))
        except Exception as error:
            read[bits] = f"{type(error).__name__}"
print(json.dumps({"packed": packed, "read": read}))
PY
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5 psutil==7.2.2 compressed-tensors==0.17.1
"$work/venv/bin/python" "$work/look.py" > "$work/old.json"
"$work/venv/bin/pip" install --quiet compressed-tensors==0.18.0
"$work/venv/bin/python" "$work/look.py" "$(python3 -c "import json; print(json.dumps(json.load(open('$work/old.json'))['packed']))")" > "$work/new.json"
python3 - "$work" <<'PY'
import json
import sys
from pathlib import Path

old, new = (json.loads((Path(sys.argv[1]) / name).read_text()) for name in ("old.json", "new.json"))
widths = {bits: [len(one["packed"][bits][0]) for one in (old, new)] for bits in ("3", "4")}
print("int32s for 64 values, 0.17.1 and 0.18.0:", widths)
print("0.18.0 reads what 0.17.1 packed:", new["read"])
assert widths == {"3": [7, 6], "4": [8, 8]}
assert new["read"]["3"] is not True and new["read"]["4"] is True
assert old["packed"]["4"] == new["packed"]["4"]
PY
