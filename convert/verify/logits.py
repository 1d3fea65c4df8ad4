"""Logits on the same tokens: ours against those of Hugging Face transformers in torch, or one model against another.

Of one directory, transformers' model is compared with ours; of two with the same vocabulary, whatever their families
(a dense model and its carved one, an old and a merged one), each in our implementation. Float32 throughout, one model
in memory after the other; the first one's logits are kept meanwhile, 4 bytes for each token and row of the vocabulary.

B sequences, T tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.checkpoints import pretrained, reader
from nemoe_jax.checkpoints.gguf.naming import is_gguf
from nemoe_jax.checkpoints.layout import MISTRAL, layout_of
from nemoe_jax.errors import UserError
from nemoe_jax.model.transformer import forward
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.text.corpus import spaced_batches, tokenize_corpus
from nemoe_jax.text.tokenizers.load import load_tokenizer


@dataclasses.dataclass(frozen=True)
class LogitComparison:
    """How far the float32 logits of A (torch's model, of a single directory) and B (ours) are apart."""

    agrees: bool
    max_difference: float  # of two logits, absolute
    logit_std: float  # of A's logits
    kl_divergence: float  # mean over tokens of KL(A ‖ B), nats
    kl_max: float  # its largest over tokens
    argmax_agreement: float  # share of tokens after which both find the same token likeliest
    tokens: int
    loss_a: float | None = None  # mean loss of the next token on the text, nats
    loss_b: float | None = None


def verify(
    directory: str | Path,
    other: str | Path | None = None,
    *,
    texts: Sequence[str] = (),
    tokens: int = 64,
    sequences: int = 2,
    seed: int = 0,
    tolerance: float = 1e-4,
) -> LogitComparison:
    """Runs the same tokens through two models and compares their logits.

    Args:
        other: model B; without it, torch's model of `directory` is A and ours is B.
        texts: files, directories or globs of text for A's tokenizer; without them tokens are random.
        tokens: length of a sequence.
        sequences: how many (evenly spaced windows of the text, fewer if it is short).
        seed: of the random tokens.
        tolerance: largest difference that agrees, relative to A's standard deviation (or 1 if that is less).

    Raises:
        UserError: not a model directory, different vocabularies, more tokens than a context, text that cannot be
            read, or torch or transformers is not installed.
    """
    checkpoints = [reader.Checkpoint(path) for path in (directory, other) if path is not None]
    configs = [checkpoint.config for checkpoint in checkpoints]
    vocab, context = configs[0].vocab, min(config.context for config in configs)
    if configs[-1].vocab != vocab:
        raise UserError(f"{other}: expected the vocabulary of {directory}, {vocab} tokens, got {configs[-1].vocab}")
    if not 1 <= tokens <= context:
        raise UserError(f"--tokens: expected 1 to the context of {context}, got {tokens}")
    if sequences < 1:
        raise UserError(f"--sequences: expected a positive number, got {sequences}")
    targets_BT = None
    if texts:
        stream = tokenize_corpus(texts, load_tokenizer(directory), vocab=vocab)
        windows = np.concatenate([window for window, _ in spaced_batches(stream, tokens, 1, sequences)])
        ids_BT, targets_BT = windows[:, :-1], windows[:, 1:]
    else:
        ids_BT = np.random.default_rng(seed).integers(0, vocab, (sequences, tokens))
    a_BTV = torch_logits(directory, ids_BT) if other is None else our_logits(checkpoints[0], ids_BT)
    b_BTV = our_logits(checkpoints[-1], ids_BT)
    return compare(a_BTV, b_BTV, tolerance, targets_BT)


@np.errstate(invalid="ignore")
def compare(
    a_BTV: np.ndarray, b_BTV: np.ndarray, tolerance: float, targets_BT: np.ndarray | None = None
) -> LogitComparison:
    """The figures for two arrays of logits, and losses if there are target tokens; NaNs and infinities never agree."""
    std = float(a_BTV.std())
    difference_BT, kl_BT, *losses_BT = np.empty((4, *a_BTV.shape[:2]))
    for row, sequence in enumerate(zip(a_BTV, b_BTV, strict=True)):  # one at a time: vocabularies are large
        difference_BT[row] = np.abs(sequence[0] - sequence[1]).max(-1)
        log_p, log_q = map(_log_softmax, sequence)
        kl_BT[row] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        if targets_BT is not None:
            for loss_BT, log_probabilities in zip(losses_BT, (log_p, log_q), strict=True):
                loss_BT[row] = -np.take_along_axis(log_probabilities, targets_BT[row, :, None], axis=-1)[:, 0]
    loss_a, loss_b = (None, None) if targets_BT is None else (float(loss_BT.mean()) for loss_BT in losses_BT)
    difference = float(difference_BT.max())
    return LogitComparison(
        agrees=bool(difference <= tolerance * max(std, 1.0)),  # False for NaN
        max_difference=difference,
        logit_std=std,
        kl_divergence=float(kl_BT.mean()),
        kl_max=float(kl_BT.max()),
        argmax_agreement=float((a_BTV.argmax(-1) == b_BTV.argmax(-1)).mean()),
        tokens=kl_BT.size,
        loss_a=loss_a,
        loss_b=loss_b,
    )


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """In float64: float32 rounding alone would look like a divergence of 1e-7 nats."""
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True)
    return shifted_TV - np.log(np.exp(shifted_TV).sum(-1, keepdims=True))


def our_logits(source: str | Path | reader.Checkpoint, ids_BT: np.ndarray) -> np.ndarray:
    """Float32 logits (B, T, V) of our implementation; nothing of the model stays in memory."""
    config, params = pretrained.load_pretrained(source, dtype=jnp.float32, progress=True)
    run = jax.jit(lambda params, ids: forward(config, params, ids).logits)
    return np.concatenate([np.asarray(run(params, ids_BT[row : row + 1])) for row in range(len(ids_BT))])


def torch_logits(directory: str | Path, ids_BT: np.ndarray) -> np.ndarray:
    """Float32 logits (B, T, V) of the directory's torch model.

    Raises:
        UserError: torch or transformers is missing, or a directory that transformers does not read.
    """
    if layout_of(directory) is MISTRAL:
        raise UserError(
            f"{directory}: transformers does not read Mistral's layout; verify what `nemoe-convert layout {directory} "
            "DST --to huggingface` makes of it"
        )
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"verify needs torch and transformers ({error}): pip install 'nemoe-jax[verify]'") from error
    options: dict[str, Any] = {}
    if FAMILIES[reader.read_config(directory).family].modeling:
        import nemoe_jax.checkpoints.modeling_nekomind  # noqa: F401, registers itself; needs torch

        options["experts_implementation"] = "eager"  # the grouped kernels want rows of a multiple of 16 bytes
    path, gguf_file = (Path(directory).parent, Path(directory).name) if is_gguf(directory) else (directory, None)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, gguf_file=gguf_file, dtype=torch.float32, trust_remote_code=False, **options
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids_BT, np.int64))).logits.float().numpy()
