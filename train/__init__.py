"""Training: a recipe names a model, its text and what may learn; `loop.train` turns it into a new model directory.

recipe      the YAML file: keys, defaults, help texts, overrides, errors
data        text files → one stream of tokens → batches that depend on (seed, step) alone
loss        cross-entropy and forward KL
optimizer   AdamW, schedule, and the routers' own learning rate
step        what is trained and what is frozen; one compiled update, one compiled evaluation
loop        load, shard, step, log, evaluate, save
cli         `nemoe-train run | show | recipes | keys`
"""
