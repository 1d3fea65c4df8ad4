"""Floating-point operations: of the mathematics, of a compiled program, and what a chip can do at most.

Model FLOPs are what the mathematics needs, whatever the program does (PaLM, arXiv 2204.02311, appendix B). A matmul
with a weight of P elements costs each token

    2·P forward,   2·P for the gradient of its input,   2·P for the gradient of the weight, if that is trained.

Experts count by top-k / experts; the embedding's look-up is free; the output layer counts, tied or not. An adapter of
rank R on a weight of D inputs and F outputs adds R·(D + F) trained elements. Attention of N heads of size H over T
tokens costs a token 2·2·N·H·(T + 1)/2 forward (scores and sums over itself and what came before), and twice that
backward.

Executed FLOPs are what a compiled program multiplies, recomputation included. XLA's own cost analysis counts the body
of a loop once, and a TPU kernel (`tpu_custom_call`) not at all; here loops count by their trip counts, and kernels by
the estimate that they carry or by what the caller knows of them.

D inputs, F outputs, R rank, N heads, H head_dim, T sequence.
"""

import fnmatch
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from nemoe_jax.adapters import lora
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import ParamSpec, declare, leaves
from train.recipe import Phase

Trained = Literal["lora", "router", "weights", "esft", "all"]


def matmul_elements(config: ModelConfig) -> dict[str, float]:
    """{path: elements of the weight that one token is multiplied with}, of every linear map; "head" is always there."""
    specs = leaves(declare(config))
    elements = {path: _active(spec, config) for path, spec in specs.items() if spec.contracted and not spec.lookup}
    return elements | {"head": float(config.vocab * config.hidden)}


def attention_flops(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs per token of all layers' scores and sums in a forward pass, each token seeing half the row on average."""
    return config.layers * 2 * 2 * config.heads * config.head_dim * (sequence_length + 1) / 2


def forward_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs per token of a forward pass without adapters: a teacher's, or those of an evaluation."""
    return 2 * sum(matmul_elements(config).values()) + attention_flops(config, sequence_length)


def model_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    trained: Trained = "all",
    *,
    targets: Sequence[lora.Target] = (),
    train_router: bool = False,
    weights: Sequence[str] = (),
    esft_share: float | None = None,
    teacher: ModelConfig | None = None,
) -> float:
    """FLOPs per token of one update: forward, gradients of the activations, gradients of what is trained.

    Args:
        trained: every weight, those that match `weights`, the routers alone, or adapters alone.
        targets: the weights that have adapters, for "lora".
        esft_share: with "esft", the share of the routing weights that the experts have which learn.
        train_router: with "lora", whether the routers learn as well.
        teacher: a model that runs forward on the same tokens, for distillation.
    Raises:
        UserError: a target that fits no weight.
    """
    elements = matmul_elements(config)
    routers = trained == "router" or (trained == "lora" and train_router)

    specs = leaves(declare(config))

    def learns(path: str) -> float:
        if esft_share and path in specs and "experts" in specs[path].stacked:
            return esft_share
        named = any(fnmatch.fnmatchcase(path, pattern) for pattern in weights)
        return trained == "all" or named or (routers and path.endswith("/router"))

    products = sum(size * (2 + learns(path)) for path, size in elements.items())
    adapters = 3 * sum(_adapter_elements(config, targets)) if trained == "lora" else 0
    total = 2 * (products + adapters) + 3 * attention_flops(config, sequence_length)
    return total + (forward_flops_per_token(teacher, sequence_length) if teacher else 0)


def of_phase(phase: Phase, config: ModelConfig, targets: Sequence[lora.Target], teacher: ModelConfig | None) -> float:
    """`model_flops_per_token` of a recipe's phase."""
    teacher = None if phase.distill and phase.distill.offline else teacher
    return model_flops_per_token(
        config,
        phase.data.sequence_length,
        phase.trainable,
        targets=targets,
        train_router=phase.train_router,
        weights=phase.weights,
        esft_share=phase.esft_share,
        teacher=teacher,
    )


def _active(spec: ParamSpec, config: ModelConfig) -> float:
    share = config.top_k / config.experts if "experts" in spec.stacked else 1
    return math.prod(spec.shape) * share


def _adapter_elements(config: ModelConfig, targets: Sequence[lora.Target]) -> Iterator[float]:
    if not targets:
        return
    for spec, target in lora.match(config, targets).values():
        for factor in lora.factors(spec, target.rank):
            yield 0 if spec.lookup and "rank" in factor.produced else _active(factor, config)


# Dense bfloat16 with float32 accumulation, as JAX counts devices (a TPU chip; v4 and v5p with their two cores as one).
# The first pattern that the device kind contains decides.
# TPU: cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e. NVIDIA: the data sheets and architecture white papers; where they
# give figures with 2:4 sparsity, half of those.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"TPU v4 lite|TPU v4i", 138e12),
    (r"TPU v4", 275e12),
    (r"TPU v5 ?lite|TPU v5e", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v6 ?lite|TPU v6e", 918e12),
    (r"GB200|B200", 2250e12),
    (r"H200 NVL|H100 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"GH200|H200|H100|H800", 989e12),
    (r"A100|A800", 312e12),
    (r"A10G", 70e12),
    (r"A10\b", 125e12),
    (r"L40S", 362e12),
    (r"L40\b", 181e12),
    (r"L4\b", 121e12),
    (r"RTX 5090\b", 209.5e12),
    (r"RTX 4090\b", 165.2e12),
    (r"RTX 4080\b", 97.5e12),
    (r"RTX 3090\b", 71e12),
)


def peak_flops(device_kind: str) -> float | None:
    """The most dense bfloat16 FLOPs per second of a `jax.Device.device_kind`; None where it is not known (a CPU)."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, device_kind, re.IGNORECASE)), None)
