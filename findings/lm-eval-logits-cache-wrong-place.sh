#!/usr/bin/env bash
# lm_eval 0.4.13, transformers 5.24.0, torch 2.13.0
#
# HFLM keeps one pass of the model for all log-likelihood requests whose context + continuation without its last token
# are the same ids. The request with the longest continuation is the one that is run; another of the group, whose
# continuation is shorter because more of the text counts as context, then has its token looked up at the *first*
# position of the longer continuation, not at the last. Its score is that of the token in an earlier place. With
# logits_cache=False all scores are right. No message.
#
# Seen (log-likelihood of "e" behind "a b c", scored beside "c d" behind "a b"):
#   alone -10.4391, together without the cache -10.4391, together with the cache (default) -5.0658,
#   which is that of "e" behind "a b".
#
# Why it matters: a task that scores both a longer and a shorter ending of one text gets wrong numbers, and whether it
# does depends on which other requests are in the same run. Who compares an own model with the harness's has to set
# logits_cache=False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 lm_eval==0.4.13 accelerate==1.15.0
cat > "$work/look.py" <<'PY'
import logging

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logging.disable(logging.WARNING)
words = ["<s>", *"abcdefgh"]
library = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<s>", bos_token="<s>")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
    )
).eval()


def scores(pairs, **options):
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu", **options)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    return [round(score, 4) for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]


longer, shorter = ("a b", " c d"), ("a b c", " e")
alone = scores([shorter])[0]
without = scores([longer, shorter], logits_cache=False)[1]
cached = scores([longer, shorter])[1]
earlier = scores([("a b", " e")])[0]
print(f"'e' behind 'a b c': alone {alone}, beside another request {without} without the cache, {cached} with it")
print(f"'e' behind 'a b': {earlier}")
assert alone == without, "scores without the cache depend on other requests now"
assert cached == earlier != alone, "the cache behaves otherwise now"
PY
"$work/venv/bin/python" "$work/look.py"
