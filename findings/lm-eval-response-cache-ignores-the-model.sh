#!/usr/bin/env bash
# lm_eval 0.4.13, transformers 5.24.0, torch 2.13.0
#
# The harness's cache of responses (CachingLM, what --use_cache PATH makes) looks answers up by the kind of request and
# its texts alone. Nothing of the model goes into the key or is kept in the file, so a second model that is given the
# same path is not run at all: it gets the first one's scores.
#
# Seen (log-likelihood of " c d" behind "a b"): first model -12.0616, second model -6.6255; both through one cache
# -12.0616.
#
# Why it matters: a model before and after a conversion or a repair, evaluated with one path, come out exactly equal,
# which looks like a perfect conversion. A path for each model avoids it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 lm_eval==0.4.13 accelerate==1.15.0
cat > "$work/look.py" <<'PY'
import logging
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logging.disable(logging.WARNING)
words = ["<s>", *"abcdefgh"]
library = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<s>", bos_token="<s>")


def harness(seed):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
        )
    )
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1, device="cpu")


def ask(model):
    return round(model.loglikelihood([Instance("loglikelihood", {}, ("a b", " c d"), 0)])[0][0], 4)


first, second = harness(0), harness(1)
direct = ask(first), ask(second)
cached = tuple(ask(CachingLM(model, sys.argv[1])) for model in (first, second))
print(f"first and second model: {direct}; through one cache: {cached}")
assert direct[0] != direct[1] and cached == (direct[0], direct[0]), "the cache tells models apart now"
PY
"$work/venv/bin/python" "$work/look.py" "$work/responses.db" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
