"""Training: a recipe names a model, its text and what may learn; `loop.train` turns it into a new model directory.

recipe       the YAML file: phases, keys, defaults, help texts, overrides, errors
sources      files and datasets → rows; formats: rows → texts and chats; render: → token ids and what is learned of them
tokenize     a source's tokens on disk (token_cache); packing: rows of T tokens; data: their order, by Grain
prepare      from a recipe to weights on devices, everything checked before
place        batches on devices; mesh: what `mesh: auto` chooses
loss         cross-entropy and forward KL, the vocabulary's logits in chunks of tokens
optimizer    AdamW, schedule, and the routers' own learning rate
step         what is trained and what is frozen; one compiled update, one compiled evaluation
phase        one phase: steps, evaluations, gate, adapter; checkpoint: what it goes on from; loop: all phases
workspace    where a run works, and how it is stopped; journal: what it tells; report: what it leaves for people
plan         does a step fit a TPU slice? aot compiles it, hlo reads the program, flops counts its work
cli          `nemoe-train run | plan | show | recipes | keys`
"""

import nemoe_jax  # noqa: F401  former module names (nemoe_jax/moved.py)
