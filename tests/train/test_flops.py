import jax
import jax.numpy as jnp
import pytest

from nemoe_jax.adapters.lora import Target
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig, preset
from tests.support.configs import DENSE, MIXTRAL, NEKOMIND
from train.step import model_flops

# One layer: XLA counts the body of a scan once. Wide enough for the matmuls to be nearly all there is to count.
WIDE = ModelConfig(
    family="mistral", hidden=512, layers=1, heads=6, kv_heads=2, head_dim=96, vocab=768, ffn=1280, context=64
)
BATCH, LENGTH = 2, 64


def _counted_by_xla(config: ModelConfig, trained: str) -> float:
    """FLOPs per token of XLA's cost analysis; nothing is run."""
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16), schema.declare(config))
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)

    def loss(trainable, frozen, tokens):
        return forward(config, frozen | trainable, tokens).logits.mean()

    function = loss if trained == "nothing" else jax.value_and_grad(loss)
    names = {"nothing": (), "all": tuple(params), "norm": ("norm",), "embed": ("embed",)}[trained]
    trainable = {name: params[name] for name in names}
    frozen = {name: params[name] for name in params if name not in names}
    counted = jax.jit(function).lower(trainable, frozen, tokens).compile().cost_analysis()["flops"]
    return counted / (BATCH * LENGTH)


def _with_full_attention(formula: float, passes: int) -> float:
    """The formula with attention over whole rows, as the CPU computes it."""
    return formula + passes * 2 * 2 * WIDE.heads * WIDE.head_dim * (LENGTH - (LENGTH + 1) / 2)


@pytest.mark.parametrize(
    ("trained", "formula", "passes"),
    [
        ("nothing", model_flops.forward_flops_per_token(WIDE, LENGTH), 1),
        ("all", model_flops.model_flops_per_token(WIDE, LENGTH, "all"), 3),
        # the embedding alone: the gradient of every activation and of no linear map, as under adapters
        ("embed", model_flops.model_flops_per_token(WIDE, LENGTH, "lora"), 3),
    ],
)
def test_formula_is_what_xla_counts(trained, formula, passes, optimized):
    assert _counted_by_xla(WIDE, trained) == pytest.approx(_with_full_attention(formula, passes), rel=0.02)


def test_by_hand_for_the_12b():
    """The figures of the 12B-16E, worked out from its shape."""
    config, length, rank = preset("nemoe-12b-16e"), 8192, 16
    attention = 5120 * 128 * (32 + 8 + 8 + 32)
    layer = attention + 5120 * 16 + 4 * 3 * 5120 * 896
    matmuls = 40 * layer + 5120 * 131072
    scores = 40 * 4 * 32 * 128 * 8193 / 2
    assert model_flops.forward_flops_per_token(config, length) == 2 * matmuls + scores
    assert model_flops.model_flops_per_token(config, length, "all") == 6 * matmuls + 3 * scores
    targets = [Target("blocks/*/attn/*", rank, 32), Target("blocks/moe/ffn/[gud]*", rank, 32)]
    adapters = 40 * rank * (2 * (5120 + 4096) + 2 * (5120 + 1024) + 4 * 3 * (5120 + 896))
    with_lora = model_flops.model_flops_per_token(config, length, "lora", targets=targets)
    assert with_lora == 4 * matmuls + 3 * scores + 6 * adapters
    with_router = model_flops.model_flops_per_token(config, length, "lora", targets=targets, train_router=True)
    assert with_router - with_lora == 2 * 40 * 5120 * 16
    distilled = model_flops.model_flops_per_token(
        config, length, "router", teacher=preset("mistral-nemo-12b")
    ) - model_flops.model_flops_per_token(config, length, "router")
    assert distilled == model_flops.forward_flops_per_token(preset("mistral-nemo-12b"), length)


def test_identities():
    """All experts chosen cost what a dense FFN of their joint width does; a tied head costs what its own would."""
    dense = DENSE.replace(ffn=MIXTRAL.expert_ffn * MIXTRAL.top_k)
    router = 2 * MIXTRAL.layers * MIXTRAL.hidden * MIXTRAL.experts
    assert model_flops.forward_flops_per_token(MIXTRAL, 8) == model_flops.forward_flops_per_token(dense, 8) + router
    untied = NEKOMIND.replace(tied=False)
    for trained in ("all", "lora", "router"):
        assert model_flops.model_flops_per_token(NEKOMIND, 8, trained) == model_flops.model_flops_per_token(
            untied, 8, trained
        )


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert model_flops.peak_flops(kind) == peak
