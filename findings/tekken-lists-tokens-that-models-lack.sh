#!/usr/bin/env bash
# mistral-common 1.13.1, tiktoken 0.14.0
#
# Mistral's tekken.json lists more tokens than the models have: 150,000 entries, of which the first
# default_vocab_size - default_num_special_tokens = 130,072 count, with ids 1000 higher than their ranks. Nothing in the
# entries says so.
#
# Seen: " ETH" is entry 130,072. All entries given to tiktoken: id 131,072, one more than the last row of the model's
# embedding. mistral-common: two tokens, 1436 and 12001.
#
# Why it matters: a loader that takes the whole list works on common text, then now and then gives ids without a row
# (which JAX clamps or fills and does not report), and cuts some words in fewer tokens than the model was trained on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet mistral-common==1.13.1 tiktoken==0.14.0
cat > "$work/look.py" <<'PY'
import base64
import json
import pathlib

import mistral_common
import tiktoken
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

source = pathlib.Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
spec, tekken = json.loads(source.read_text()), Tekkenizer.from_file(source)
config, text = spec["config"], " ETH"
ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in spec["vocab"]}
whole = tiktoken.Encoding("whole", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
naive = [rank + config["default_num_special_tokens"] for rank in whole.encode(text)]
real = tekken.encode(text, bos=False, eos=False)
print(f"{len(ranks):,} entries, a vocabulary of {tekken.n_words:,}")
print(f"{text!r} with all entries: {naive}; by mistral-common: {real}")
assert len(ranks) > tekken.n_words and max(naive) >= tekken.n_words and real != naive, "the list is no longer too long"
PY
"$work/venv/bin/python" "$work/look.py"
