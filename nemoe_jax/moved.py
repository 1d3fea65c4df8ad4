"""The former names of modules, which go on working for this release: importing one warns and gives the new module.

A former module's attributes are those of the new one, under their former names where they were renamed as well.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

_TEXT, _CHAT, _SERVING = "nemoe_jax.text.tokenizers", "nemoe_jax.text.chat", "nemoe_jax.serving"
MOVED = {
    "nemoe_jax.adapter_bank": "nemoe_jax.adapters.multi_lora",
    "nemoe_jax.cache": "nemoe_jax.model.kv_cache",
    "nemoe_jax.chat": f"{_CHAT}.render",
    "nemoe_jax.chat_template": f"{_CHAT}.template",
    "nemoe_jax.chat_tools": f"{_CHAT}.tools",
    "nemoe_jax.checkpoint": "nemoe_jax.checkpoints.reader",
    "nemoe_jax.config": "nemoe_jax.spec.config",
    "nemoe_jax.decoding": "nemoe_jax.inference.decode",
    "nemoe_jax.evaluate": "nemoe_jax.evaluation.perplexity",
    "nemoe_jax.evaluation.harness": "nemoe_jax.evaluation.lm_eval_model",
    "nemoe_jax.evaluation.suite": "nemoe_jax.evaluation.lm_eval_suites",
    "nemoe_jax.generate": "nemoe_jax.inference.generate",
    "nemoe_jax.hf": "nemoe_jax.checkpoints.pretrained",
    "nemoe_jax.lora": "nemoe_jax.adapters.lora",
    "nemoe_jax.moe": "nemoe_jax.model.moe",
    "nemoe_jax.peft": "nemoe_jax.adapters.peft_load",
    "nemoe_jax.peft_writer": "nemoe_jax.adapters.peft_save",
    "nemoe_jax.sampling": "nemoe_jax.inference.sampling",
    "nemoe_jax.schema": "nemoe_jax.spec.schema",
    "nemoe_jax.serving.answer": f"{_CHAT}.tool_parser",
    "nemoe_jax.serving.constraint": f"{_SERVING}.structured.grammar",
    "nemoe_jax.serving.request": f"{_SERVING}.engine.request",
    "nemoe_jax.serving.request_maker": f"{_SERVING}.request_builder",
    "nemoe_jax.serving.served": f"{_SERVING}.api.served_model",
    "nemoe_jax.serving.server": f"{_SERVING}.api.app",
    "nemoe_jax.sharding": "nemoe_jax.spec.sharding",
    "nemoe_jax.spm": f"{_TEXT}.sentencepiece_tokenizer",
    "nemoe_jax.tekken": f"{_TEXT}.tekken",
    "nemoe_jax.token_choice": "nemoe_jax.inference.sampler",
    "nemoe_jax.tokenizer": f"{_TEXT}.load",
    "nemoe_jax.tokenizer_base": f"{_TEXT}.base",
    "nemoe_jax.tokenizer_json": f"{_TEXT}.hf_tokenizer",
    "nemoe_jax.transformer": "nemoe_jax.model.transformer",
    "nemoe_jax.writer": "nemoe_jax.checkpoints.writer",
    "convert.merge": "convert.merge_lora",
    "convert.prune": "convert.experts.prune",
    "convert.relay": "convert.experts.router_distillation",
    "convert.stream": "convert.streaming",
    "convert.upcycle": "convert.experts.upcycle",
    "train.formats": "nemoe_jax.text.data.formats",
    "train.loop": "train.run.loop",
    "train.render": "nemoe_jax.text.data.render",
    "train.sources": "nemoe_jax.text.data.sources",
}
RENAMED = {
    "nemoe_jax.chat": {"spoken_ids": "encode_with_assistant_mask"},
    "nemoe_jax.evaluate": {"Evaluation": "PerplexityResult"},
    "nemoe_jax.hf": {"load": "load_pretrained", "save": "save_pretrained"},
    "nemoe_jax.sampling": {"Sampling": "SamplingParams"},
    "nemoe_jax.schema": {"initialise": "initialize"},
    "nemoe_jax.transformer": {"hidden": "hidden_states"},
}


class _FormerModule(types.ModuleType):
    """Callable, since some former modules had the name of what is now a public function, such as `generate`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _FormerModule(spec.name, f"Former name of {MOVED[spec.name]}.")

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        warnings.warn(f"{name} has become {MOVED[name]}", FutureWarning, stacklevel=2)
        new, renamed = importlib.import_module(MOVED[name]), RENAMED.get(name, {})
        module.__getattr__ = lambda attribute: getattr(new, renamed.get(attribute, attribute))  # type: ignore[method-assign]


def install() -> None:
    """Makes the former names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
