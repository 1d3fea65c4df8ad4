"""The conversions as commands: the options of each, which are its flags, and its help.

Nothing here needs JAX, so that help is there at once; a conversion's own module is imported when it runs.
"""

import dataclasses
from typing import Literal

from convert.command import Conversion, option

CHECK_TOKENS = 2048
REFIT_STEPS, REFIT_TOKENS = 150, 32768  # measured in docs/convert/carve.md


@dataclasses.dataclass(frozen=True)
class CarveOptions:
    """How a dense model is carved."""

    experts: int = option(16, "experts per layer; must divide the FFN's neurons")
    top_k: int = option(4, "experts chosen for each token")
    layout: Literal["mixtral", "shared"] = option(
        "mixtral",
        "mixtral: opens in transformers, vLLM and llama.cpp; shared: NekoMind's layout, where the most active neurons "
        "are a shared expert that every token uses, and first layers may stay dense",
    )
    shared_ffn: int = option(0, "shared: neurons of the shared expert; 0 takes FFN neurons / experts")
    shared_gate: Literal["auto", "fitted", "constant"] = option(
        "auto",
        "shared, with token-clusters: how much the shared expert counts on each token, fitted, or a constant half; "
        "auto fits it, but for models without QK-norm, whose layout in other programs (Ernie's) has no such gate",
    )
    keep_dense: int = option(0, "shared: how many first layers stay as they are")
    partition: Literal["auto", "token-clusters", "gate-kmeans", "contiguous"] = option(
        "auto",
        "neurons of an expert. token-clusters (auto with calibration, where top-k divides experts): the neurons most "
        "active on each cluster of tokens, in a group of top-k experts that are chosen together; a neuron may be in "
        "several; gate-kmeans (auto otherwise): balanced k-means of gate rows; contiguous: runs of neighbors (a "
        "baseline)",
    )
    overlap: int = option(
        1,
        "token-clusters: how many times the dense FFN's neurons the experts hold together: more groups of experts, "
        "for more kinds of tokens, at the same cost of a token; --experts 32 --overlap 2 has experts of the size of "
        "--experts 16",
    )
    router: Literal["auto", "gate-mean", "distilled", "random"] = option(
        "auto",
        "router rows: orthonormalized mean gate rows (auto without calibration), trained to find the experts with the "
        "largest outputs (auto with it), or random orthonormal ones (a baseline)",
    )
    svd: Literal["exact", "randomized", "gram"] = option(
        "randomized",
        "how the gate rows' subspace is found: exact takes minutes for a layer of the 12B, randomized and gram (the "
        "eigenvectors of a product) seconds",
    )
    rank: int = option(64, "dimensions of that subspace")
    logit_std: float = option(0.02, "standard deviation of the router logits; small keeps the chosen weights near 1/k")
    output_scale: float = option(0.0, "factor of every `down`; 0 takes the power of two next to √(top_k · experts)")
    calibration: tuple[str, ...] = option(
        (),
        "text files, directories or globs, mixed by their shares as `A:0.5,B:0.5`: distill the router, fit the output "
        "scales, refit `down`; `self` alone: text that the dense model writes, which is kept beside the result",
    )
    calibration_tokens: int = option(131072, "tokens of it to use; more is better")
    refit: bool = option(True, "with calibration: leave the experts' weights as they are, but for the output scales")
    control: bool = option(
        False,
        "no experts, the control that they have to beat: a dense model of the top_k / experts most active neurons on "
        "the calibration text, with the same refit",
    )
    refit_ridge: float = option(
        0.0, "how strongly the refit holds to the dense `down`; 0 takes 2 · FFN neurons / tokens of calibration text"
    )
    refit_steps: int = option(
        -1,
        "token-clusters and --control: steps of gradient descent on gate, up and `down` of each group, layer by layer, "
        f"after the refit; -1 takes {REFIT_STEPS} where there are {REFIT_TOKENS} tokens or more, as on fewer they fit "
        "those only",
    )
    explore: bool = option(
        False,
        "make no model: try active shares, overlap, finer and shared experts on some layers, and write a table and a "
        "plot of what each costs and saves, with its command, to DST",
    )
    explore_layers: int = option(3, "explore: how many layers are tried, evenly spaced")
    seed: int = option(0, "seed of the k-means and of everything random")


CARVE = Conversion(
    "carve",
    "convert.carve.carve:carve",
    CarveOptions,
    "deal a dense model's FFN neurons out to experts and make a router that finds them",
    "Any dense Mistral- or Llama-shaped directory becomes a Mixtral directory of that size; no data is needed.",
    source_help="dense model directory",
)


@dataclasses.dataclass(frozen=True)
class UpcycleOptions:
    """How an MoE model gets more experts."""

    experts: int = option(dataclasses.MISSING, "experts per layer of the result: a multiple of the source's")
    mode: Literal["wide", "split", "copies"] = option(
        "wide",
        "wide: copies of experts, top-k grows as they do: same output, more FLOPs; split: experts cut into smaller "
        "ones: same output, FLOPs and parameters; copies: same top-k and FLOPs, same output for nearly all tokens",
    )
    shift: float = option(
        0.0,
        "copies: how far groups are apart, in spreads of the chosen experts' logits; more: fewer tokens between "
        "groups, coarser logits; 0 takes 1024 for float32 weights, else 16, which costs half-precision logits less",
        "SPREADS",
    )
    noise: float = option(
        0.01, "wide: largest relative noise on `down`; sums to zero over the copies; 0 leaves them alike", "SHARE"
    )
    check: tuple[str, ...] = option((), "text files, directories or globs: compare the result with the source on them")
    check_tokens: int = option(
        0, f"tokens to compare on (0: {CHECK_TOKENS} of the text); without --check random ones (0: no comparison)"
    )
    seed: int = option(0, "seed of the noise and of random tokens")


UPCYCLE = Conversion(
    "upcycle",
    "convert.experts.upcycle:upcycle",
    UpcycleOptions,
    "give an MoE model two, three, … times its experts",
    "No data, no model in memory. Expert j·E + e of the result descends from expert e of the source's E.\n"
    "wide and split give the source's logits. copies gives them but for tokens between two groups or near a tie,\n"
    "about 1 in 1000 in each layer with float32 weights and up to 1 in 10 with others.\n"
    "--check prints how far the logits are apart, relative to their standard deviation, and the share of (token,\n"
    "layer) pairs with other experts chosen.",
    source_help="directory of an MoE model",
)


@dataclasses.dataclass(frozen=True)
class PruneOptions:
    """Which experts are dropped."""

    experts: int = option(
        dataclasses.MISSING,
        "experts per layer that are kept; at least top-k, and a multiple of it where "
        "groups of experts share a router row",
    )
    calibration: tuple[str, ...] = option((), "text files, directories or globs on which experts show their use")
    method: Literal["reap", "exhaustive", "frequency"] = option(
        "reap",
        "reap: drop the experts with the least mean routing weight × output norm; exhaustive: try all subsets, keep "
        "the one with the least error of the layer's output; frequency: drop the least often chosen (a baseline)",
    )
    merge: bool = option(
        False,
        "merge the experts that are not kept into the most similar ones that are, weighted by their scores; not for "
        "those of a carve, which have nothing in common",
    )
    calibration_tokens: int = option(16384, "tokens of the text to use; 131072 or more for the 12B")
    choices: str = option(
        "",
        "instead of calibration: conversion.json of an earlier run on this model; the experts that it kept, or those "
        "of its highest scores where another number is asked for",
        "FILE",
    )


PRUNE = Conversion(
    "prune-experts",
    "convert.experts.prune:prune",
    PruneOptions,
    "keep the most useful experts of every MoE layer and drop the others",
    "One pass over calibration text with one layer in memory finds them; the rest is nearly a file copy. Scores, kept\n"
    "experts and each layer's error (of the experts' summed output, in squares, relative) are in the manifest.\n"
    "`distill-routers` may recover part of what it costs.",
    source_help="directory of an MoE model",
)


@dataclasses.dataclass(frozen=True)
class DistillRoutersOptions:
    """How routers are recalibrated."""

    teacher: str = option(
        dataclasses.MISSING, "model directory of the same vocabulary: the unpruned MoE model or the dense model", "DIR"
    )
    calibration: tuple[str, ...] = option(dataclasses.MISSING, "text files, directories or globs")
    method: Literal["distil", "ridge", "both"] = option(
        "distil",
        "distil: gradient steps on all routers towards the teacher's next-token distribution; ridge: layer by layer "
        "towards the teacher's layer outputs (a teacher with the same layers); both: ridge, then distil",
    )
    calibration_tokens: int = option(65536, "tokens of the text to use; the last tenth judges")
    steps: int = option(200, "distil: gradient steps, one batch of 8 windows each")
    learning_rate: float = option(0.1, "distil: Adam's first, as a share of each router's deviation; falls to 0", "X")
    ridge: float = option(0.1, "ridge: how strongly the old router is held to", "X")
    mesh: str = option("", "devices as axes, such as fsdp=4,expert=2; both models lie on them (default: one)", "MESH")
    dtype: Literal["float32", "bfloat16"] = option("float32", "dtype to compute in; routers are float32 always")


DISTILL_ROUTERS = Conversion(
    "distill-routers",
    "convert.experts.router_distillation:distill_routers",
    DistillRoutersOptions,
    "distill the routers of an MoE, as after prune-experts, from a teacher",
    'Only what lowers the loss on the last tenth of the text is kept, and nothing but routers changes; "kept 0 of N\n'
    'layers" says that nothing helped. Both models are in memory, in --dtype; ridge adds one layer of each.',
    source_help="directory of an MoE",
    former=("relay",),
)


@dataclasses.dataclass(frozen=True)
class MinitronOptions:
    """What a model is pruned to; what is not given stays as wide as it is."""

    hidden: int | None = option(None, "channels of the residual stream to keep")
    ffn: int | None = option(None, "FFN neurons to keep in each layer; of an MoE model, in each expert")
    shared_ffn: int | None = option(None, "neurons of the shared expert to keep (NekoMind)")
    dense_ffn: int | None = option(None, "neurons to keep in an MoE model's dense first layers (NekoMind)")
    heads: int | None = option(None, "query heads to keep in each layer, as many for each key/value head")
    layers: int | None = option(None, "layers to keep")
    target: float | None = option(
        None,
        "parameters to keep, or up to 1 their share: depths and widths are compared by their loss on held-out text",
    )
    calibration: tuple[str, ...] = option((), "text files, directories or globs to measure activations on; needed")
    calibration_tokens: int = option(16384, "tokens of it to use, in sequences of 256; the papers take 1024 sequences")
    importance: Literal["activations", "random"] = option(
        "activations", "what is kept: what the text excites most, or anything (a baseline)"
    )
    depth_importance: Literal["influence", "loss"] = option(
        "influence",
        "which layers are kept: those that turn the residual stream most, or those without which the loss is highest",
    )
    rescale_norms: bool = option(True, "leave norm weights and epsilon as they are, as Minitron does")
    seed: int = option(0, "seed of random importance")


MINITRON = Conversion(
    "minitron",
    "convert.minitron.minitron:minitron",
    MinitronOptions,
    "prune width and depth: drop the channels, neurons, heads and layers that calibration text needs least",
    "Any dense or MoE model becomes a smaller one of its family: one pass over the text scores every channel,\n"
    "neuron, head and layer, and the best are kept (Minitron, arXiv 2407.14679 and 2408.11796). Each expert of an MoE\n"
    "keeps its own neurons. The result is a damaged model until it is distilled from its source (nemoe-train).\n\n"
    "  nemoe-convert minitron nemo-12b minitron-8b --hidden 4096 --ffn 11520 --calibration text/\n"
    "  nemoe-convert minitron nemo-12b nemo-8b --target 0.65 --calibration text/\n",
)


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """What is merged."""

    adapter: str = option(dataclasses.MISSING, "adapter directory", "ADAPTER", positional=True)
    resize_vocab: bool = option(False, "take the vocabulary of the adapter's embedding, head and tokenizer")


MERGE = Conversion(
    "merge",
    "convert.merge_lora:merge",
    MergeOptions,
    "merge a LoRA adapter of Hugging Face PEFT or mistral-finetune into a model",
    "ADAPTER holds adapter_config.json and adapter_model.safetensors, or mistral-finetune's lora.safetensors. Merged\n"
    "are LoRA and DoRA of attention, dense FFNs, experts (fused or one by one), routers, embedding and head, with\n"
    "rank and alpha patterns and rank-stabilized scales, biases, trained rows of the embedding, and whole tensors\n"
    "(modules_to_save). A tied model whose embedding and head are adapted apart gets a head of its own.\n"
    "It prints tensors_updated, how many got a low-rank update, and tensors_replaced, how many came whole.",
)


@dataclasses.dataclass(frozen=True)
class LayoutOptions:
    """What is to be written."""

    to: Literal["mistral", "huggingface", "qwen3-next", "ernie"] = option(
        dataclasses.MISSING,
        "layout of DST: mistral: consolidated.safetensors and params.json; huggingface: config.json and shards; "
        "qwen3-next, ernie: an MoE with a shared expert as Qwen3NextForCausalLM (with QK-norm) or as "
        "Ernie4_5_MoeForCausalLM (a carved one without QK-norm)",
    )


LAYOUT = Conversion(
    "layout",
    "convert.layout:change_layout",
    LayoutOptions,
    "write a model in Mistral's own layout, in Hugging Face's, or as an architecture that transformers opens",
    "SRC may have either layout: config.json with model*.safetensors, or params.json with consolidated.safetensors.\n"
    "Tokenizer files are carried along. Mistral's layout has one weight file, whatever --shard-gb says.\n"
    "qwen3-next and ernie give the same logits in transformers, and are not read back here.",
)


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """What is to be written."""

    to: Literal["fp8-dynamic", "fp8-static", "fp8-block", "mistral", "bf16"] = option(
        "fp8-dynamic",
        "fp8-dynamic: compressed-tensors' FP8_DYNAMIC, a scale for each row; fp8-static: its FP8, a scale for each "
        "matrix and one for its input; fp8-block: transformers' fp8, a scale for each block of 128 x 128 (smaller "
        "where a width is no multiple); mistral: Mistral's own layout, a scale for each matrix, and with calibration "
        "one for its input; bf16: no FP8",
    )
    calibration: tuple[str, ...] = option(
        (), "text files, directories or globs on which inputs, keys and values are measured; needed for their scales"
    )
    calibration_tokens: int = option(16384, "tokens of the text to use")
    kv_cache: bool = option(False, "write scales of keys and values for a cache in FP8; not with fp8-block or bf16")


QUANTIZE = Conversion(
    "quantize",
    "convert.quantize:quantize",
    QuantizeOptions,
    "write a model's linear maps in FP8, or an FP8 model in bfloat16",
    "FP8 weights take half the bytes of bfloat16. Every command reads what this writes, and the FP8 checkpoints of\n"
    "compressed-tensors, transformers, vLLM, ModelOpt and Mistral. fp8-dynamic and fp8-static open in vLLM, SGLang\n"
    "and transformers (with the package compressed-tensors), fp8-block in transformers and vLLM. Only fp8-static and\n"
    "--kv-cache need calibration text: elsewhere activations are scaled when they are computed. An expert that saw\n"
    "too few of the text's tokens gets the largest scale of its layer's experts, and is named.\n\n"
    "  nemoe-convert quantize nemo-12b nemo-12b-fp8 --to fp8-static --kv-cache --calibration text/\n",
)


@dataclasses.dataclass(frozen=True)
class GgufOptions:
    """How a model is written."""

    type: Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q5_k_m", "q4_k_m"] = (
        option(
            "auto",
            "of the weights; auto is the dtype that config.json names. Norms and routers are always f32; below q8_0 "
            "the output head is q8_0, and rows that are no multiple of 32 are f16. q4_k_m, q5_k_m and q6_k are "
            "refused: llama.cpp's llama-quantize makes them of a bf16 file",
        )
    )
    dry_run: bool = option(False, "print the plan; write nothing")


GGUF = Conversion(
    "gguf",
    "convert.gguf.export:to_gguf",
    GgufOptions,
    "write a model as one file for llama.cpp",
    "Llama, Mistral, Mixtral, Qwen2 and Qwen3 models with and without experts, with their tokenizer and chat\n"
    "templates: Tekken, SentencePiece, a byte-level tokenizer.json, or one made from SentencePiece. llama.cpp runs\n"
    "the file as it is, or quantizes it further.",
    streams=False,
    destination_help="file to make; must not exist",
)


@dataclasses.dataclass(frozen=True)
class FromGgufOptions:
    """How the model is written."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "of the weights; auto is that of the file, and bfloat16 where they are quantized (float32 keeps every value)",
    )


FROM_GGUF = Conversion(
    "from-gguf",
    "convert.gguf.from_gguf:from_gguf",
    FromGgufOptions,
    "write a GGUF file of llama.cpp's as a model directory",
    "Llama, Mistral, Mixtral, Qwen2 and Qwen3 models in any type that the gguf package dequantizes: F32, F16, BF16,\n"
    "Q4_0 to Q8_0, Q2_K to Q6_K, IQ types. Of a split model, any file stands for all. Tokenizer, chat templates, and\n"
    "end tokens become files of the directory. Every other command takes a .gguf file for a directory as well.",
    source_help="GGUF file",
)


CONVERSIONS = (CARVE, UPCYCLE, PRUNE, DISTILL_ROUTERS, MINITRON, MERGE, LAYOUT, QUANTIZE, GGUF, FROM_GGUF)
