"""Training: a recipe names a model, its data and what may learn; `train` turns it into a new model directory.

    from train import read_recipe, train
    report = train(read_recipe("nano-repair", ["steps=100"]))

recipe      the YAML file: phases, keys, defaults, help texts, overrides, errors
data        files and datasets → documents → token ids with a loss mask → packed rows in a resumable order
step        what is trained and what is frozen; the loss, the optimizer, one compiled update
run         one phase or several: preparing, checkpoints, metrics, acceptance tests, reports
plan        does a step fit a TPU slice? compiled ahead of time, its program read
cli         `nemoe-train run | cache-teacher | tokenizer | sweep | plan | show | recipes | keys`

The names are imported when they are first used.
"""

from typing import TYPE_CHECKING

from nemoe_jax.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from train.plan.plan import plan as plan_step
    from train.recipe import Recipe, read_recipe
    from train.run.cache_teacher import cache_teacher
    from train.run.loop import train

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
