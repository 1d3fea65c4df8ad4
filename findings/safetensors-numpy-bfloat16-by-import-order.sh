#!/usr/bin/env bash
# safetensors 0.8.0, numpy 2.3.5, ml_dtypes 0.6.0
#
# safetensors' NumPy side reads bfloat16 from a file only if something has imported ml_dtypes before (JAX does). Without
# it the same call raises TypeError. From bytes in memory (`load`) bfloat16 is a KeyError either way. float8 is not read
# at all: the files' F8_E4M3 is looked for in numpy itself, although ml_dtypes has that type.
#
# Seen: load_file of bfloat16: TypeError before `import ml_dtypes`, the values after it; load: KeyError 'BF16' both
# times; load_file of float8: AttributeError both times.
#
# Why it matters: a reader of checkpoints works in one program and fails in another, by the order of imports. Files of
# these dtypes want an own reader (the bytes viewed as an ml_dtypes type), or torch.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.3.5 ml_dtypes==0.6.0
cat > "$work/look.py" <<'PY'
import json
import struct
import sys

import safetensors.numpy


def write(name, dtype, data):
    header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, len(data)]}}).encode()
    path = f"{sys.argv[1]}/{name}"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data)
    return path


wide = write("bf16.safetensors", "BF16", bytes.fromhex("803f0040"))  # 1, 2
narrow = write("f8.safetensors", "F8_E4M3", bytes.fromhex("3840"))  # 1, 2


def attempt(function, argument):
    try:
        return function(argument)["a"].tolist()
    except Exception as error:
        return type(error).__name__


def attempts():
    with open(wide, "rb") as file:
        content = file.read()
    return (
        attempt(safetensors.numpy.load_file, wide),
        attempt(safetensors.numpy.load, content),
        attempt(safetensors.numpy.load_file, narrow),
    )


assert "ml_dtypes" not in sys.modules
before = attempts()
import ml_dtypes  # noqa: E402, F401

after = attempts()
print("bfloat16 file, bfloat16 bytes, float8 file")
print("before import ml_dtypes:", before)
print("after it:               ", after)
assert before == ("TypeError", "KeyError", "AttributeError"), "the dtypes are read otherwise now"
assert after == ([1.0, 2.0], "KeyError", "AttributeError"), "the dtypes are read otherwise now"
PY
"$work/venv/bin/python" "$work/look.py" "$work"
