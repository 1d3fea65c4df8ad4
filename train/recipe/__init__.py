"""Recipes: one YAML file says everything about a training run.

`read_recipe` takes the file (or the bare name of a shipped recipe), applies `key=value` overrides with dotted keys, and
validates the whole before any device is touched.

A run is a list of phases, each on the result of the last accepted one. The keys of a phase may stand at the top of the
file, where they hold for every phase that does not say otherwise; a file without `phases` is a run of one.
"""

from train.recipe.read import list_keys, read_recipe, shipped_recipes, to_yaml
from train.recipe.run import Checkpoints, Phase, Recipe
from train.recipe.sections import Data, Distill, Divergence, LoraTarget, Optimizer, Preference, Section, Source
