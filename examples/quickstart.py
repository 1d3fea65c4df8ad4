"""Loads a model, looks at its logits and lets it write: python examples/quickstart.py DIRECTORY PROMPT"""

import sys

import jax.numpy as jnp

import nemoe_jax

directory, prompt = sys.argv[1:]
config, params = nemoe_jax.load_pretrained(directory)
tokenizer = nemoe_jax.load_tokenizer(directory)
tokens = tokenizer.encode_prompt(prompt)
logits_BTV = nemoe_jax.forward(config, params, jnp.array([tokens])).logits
print("most likely next token:", tokenizer.decode([int(logits_BTV[0, -1].argmax())]))
for step_B in nemoe_jax.generate(config, params, [tokens], max_new_tokens=16):
    print(tokenizer.decode(step_B), end="", flush=True)
print()
