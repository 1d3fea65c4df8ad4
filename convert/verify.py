"""Our logits against Hugging Face transformers in torch, on the same directory and the same tokens."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax import checkpoint, hf
from nemoe_jax.errors import UserError
from nemoe_jax.transformer import forward

SEQUENCES = 2


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far two sets of float32 logits are apart."""

    agrees: bool
    max_difference: float  # absolute
    logit_std: float
    kl_divergence: float  # mean over tokens of KL(torch ‖ ours), nats
    argmax_agreement: float  # share of tokens with the same likeliest token
    tokens: int


def verify(directory: str | Path, tokens: int = 64, seed: int = 0, tolerance: float = 1e-4) -> Verification:
    """Runs random tokens through both, in float32, and compares.

    Args:
        tolerance: largest difference that agrees, relative to the logits' standard deviation (or 1 if that is less).

    Raises:
        UserError: not a model directory, torch or transformers is not installed, or more tokens than the context.
    """
    config = checkpoint.read_config(directory)
    if not 1 <= tokens <= config.context:
        raise UserError(f"--tokens: wanted 1 to the context of {config.context}, got {tokens}")
    config, params = hf.load(directory, dtype=jnp.float32, progress=True)
    ids_BT = np.random.default_rng(seed).integers(0, config.vocab, (SEQUENCES, tokens))
    theirs = torch_logits(directory, ids_BT)
    ours = np.asarray(jax.jit(lambda params, ids: forward(config, params, ids).logits)(params, ids_BT))
    return compare(theirs, ours, tolerance)


def compare(theirs: np.ndarray, ours: np.ndarray, tolerance: float) -> Verification:
    """The figures for two arrays of logits (B, T, V); logits that are not finite never agree."""
    difference = float(np.abs(theirs - ours).max())
    std = float(theirs.std())
    log_p, log_q = (np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1)) for logits in (theirs, ours))
    return Verification(
        agrees=bool(difference <= tolerance * max(std, 1.0)),  # False for NaN
        max_difference=difference,
        logit_std=std,
        kl_divergence=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        argmax_agreement=float((theirs.argmax(-1) == ours.argmax(-1)).mean()),
        tokens=theirs.shape[0] * theirs.shape[1],
    )


def torch_logits(directory: str | Path, ids_BT: np.ndarray) -> np.ndarray:
    """Float32 logits (B, T, V) of the directory's torch model.

    Raises:
        UserError: torch or transformers is missing.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"verify needs torch and transformers ({error}): pip install 'nemoe-jax[verify]'") from error
    if checkpoint.read_config(directory).family == "nekomind":
        from convert.nekomind_torch import load_nekomind  # needs torch at import

        model = load_nekomind(directory)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids_BT)).logits.float().numpy()
