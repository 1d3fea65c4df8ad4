"""Conversions of model directories: one function and one class of options for each command of `nemoe-convert`.

    from convert import CarveOptions, carve_model
    carve_model("models/nemo-12b", "models/nemoe-12b-16e", CarveOptions(experts=16, top_k=4))

Each reads a layer, transforms it and writes it, goes on where it was interrupted, and returns its manifest. The names
are imported when they are first used.

carve                 experts from the neurons of a dense model
experts               upcycling, expert pruning, router distillation
minitron              pruning of width, heads and depth
merge_lora, layout    adapters merged in; Hugging Face's and Mistral's layouts
quantize              FP8, and back
gguf                  llama.cpp's files
verify                logits and routing of two models compared
options, command      the options of every command, which are its flags, and how a conversion becomes a command
streaming, settings   the layer-by-layer engine, and what every conversion is told
manifest, report      what a conversion returns and records; the same as a page
layerwise             a model run layer by layer over calibration text
"""

from typing import TYPE_CHECKING

from nemoe_jax.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from convert.carve.carve import carve as carve_model
    from convert.experts.prune import prune as prune_experts
    from convert.experts.router_distillation import distill_routers as distill_routers
    from convert.experts.upcycle import upcycle
    from convert.gguf.export import to_gguf
    from convert.gguf.from_gguf import from_gguf
    from convert.layout import change_layout
    from convert.manifest import Manifest
    from convert.merge_lora import merge as merge_adapter
    from convert.minitron.minitron import minitron as prune_width
    from convert.options import (
        CarveOptions,
        FromGgufOptions,
        GgufOptions,
        LayoutOptions,
        MergeOptions,
        MinitronOptions,
        PruneOptions,
        QuantizeOptions,
        UpcycleOptions,
    )
    from convert.options import DistillRoutersOptions as DistillRoutersOptions
    from convert.quantize import quantize as quantize_model
    from convert.settings import ConversionSettings
    from convert.verify.logits import LogitComparison
    from convert.verify.logits import verify as compare_logits

__getattr__, __dir__, __all__ = lazy_exports(__name__, __file__)
