"""A needle in a haystack: does a model find one sentence in a long text (Kamradt, 2023)?

A line that tells a number is planted at a depth of a filler text, and the text ends in the same line as far as the
number. A model that looks back goes on with it, whether it was trained to chat or not. Found means that every token of
the number is the likeliest; the log-probability of the number, beside that of another one, says how nearly.

The text is read through the cache in chunks, so that the whole context fits where generating fits.

B batch, T tokens of a chunk, V vocabulary.
"""

import functools
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from nemoe_jax.errors import UserError
from nemoe_jax.evaluation.scoring import of_targets
from nemoe_jax.inference.generate import cache_dtype_of
from nemoe_jax.kernels.attention.paged import PAGE
from nemoe_jax.model.kv_cache import KVCache, empty_cache
from nemoe_jax.model.transformer import hidden_states, logits
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.mesh import use_mesh
from nemoe_jax.spec.schema import Tree
from nemoe_jax.text.tokenizers.load import Tokenizer
from nemoe_jax.utils.progress import progress_bar

LINE = "\nThe magic number of Graz is"
CHUNK = 2048  # tokens that are read at a time
ANSWER = 32  # tokens of an answer at most
NUMBERS = range(1_000_000, 10_000_000)


class Haystack(NamedTuple):
    """A text with a needle, up to where the number is asked for."""

    prompt: list[int]
    answer: list[int]  # the number's tokens
    wrong: list[int]  # another number's
    at: int  # where the planted line begins


class Finding(NamedTuple):
    """What came of one haystack."""

    tokens: int  # of the text with the number
    depth: float  # per cent
    at: int
    number: int
    found: bool
    logprob: float  # nats
    wrong_number: int
    wrong_logprob: float
    seconds: float


def haystack(
    tokenizer: Tokenizer, filler: np.ndarray, length: int, depth: float, number: int, wrong_number: int
) -> Haystack:
    """A text of `length` tokens, the answer included, with the number's line at `depth` per cent of the filler.

    Raises:
        UserError: a length that has no room for the lines.
    """
    question, answer = _continued(tokenizer, number)
    _, wrong = _continued(tokenizer, wrong_number)
    planted = tokenizer.encode(f"{LINE} {number}.\n")
    before = tokenizer.before
    lines = len(before) + len(planted) + len(question) + max(len(answer), len(wrong))
    if length < lines:
        raise UserError(f"needle: expected lengths of at least the {lines} tokens of its lines, got {length}")
    hay = np.resize(filler, length - lines).tolist()
    cut = round(len(hay) * depth / 100)
    prompt = [*before, *hay[:cut], *planted, *hay[cut:], *question]
    return Haystack(prompt, answer, wrong, len(before) + cut)


def _continued(tokenizer: Tokenizer, number: int) -> tuple[list[int], list[int]]:
    """The tokens of the line without its number, and those of the number behind it."""
    ids, whole = tokenizer.encode(LINE), tokenizer.encode(f"{LINE} {number}")
    alike = next((at for at, (one, other) in enumerate(zip(ids, whole, strict=False)) if one != other), len(ids))
    return whole[:alike], whole[alike:]


def find_needles(
    config: ModelConfig,
    params: Tree,
    tokenizer: Tokenizer,
    filler: np.ndarray,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    seed: int = 0,
    mesh: Mesh | None = None,
    cache_dtype: str | None = None,
) -> list[Finding]:
    """A finding for each length and depth.

    Args:
        filler: tokens of any text; it is repeated as often as it takes.
        seed: of the numbers.

    Raises:
        UserError: lengths beyond the context or too short, depths outside of 0 to 100, no filler, tokens that the model
            has no row for, or an unknown dtype.
    """
    if not len(filler):
        raise UserError("needle: the filler text is empty")
    wrong = [length for length in lengths if length > config.context]
    if wrong:
        raise UserError(f"needle: expected lengths up to the context of {config.context} tokens, got {wrong[0]}")
    outside = [depth for depth in depths if not 0 <= depth <= 100]
    if outside:
        raise UserError(f"needle: expected depths from 0 to 100 per cent, got {outside[0]:g}")
    rng = random.Random(seed)
    plans = []
    for length in lengths:
        for depth in depths:
            number, wrong_number = rng.sample(NUMBERS, 2)
            hay = haystack(tokenizer, filler, length, depth, number, wrong_number)
            largest, rows = max(map(max, (hay.prompt, hay.answer, hay.wrong))), config.vocab
            if largest >= rows:
                raise UserError(f"{tokenizer.path}: gives token {largest}; the model's embedding has {rows} rows")
            plans.append((length, depth, number, wrong_number, hay))
    dtype = cache_dtype_of(params, cache_dtype)
    slots = min(-(-max(lengths) // PAGE) * PAGE, config.context)
    findings = []
    with progress_bar() as bar, use_mesh(mesh):
        for length, depth, number, wrong_number, hay in bar.track(plans, description="looking for needles"):
            started = time.monotonic()
            cache = _empty(config, slots, dtype)
            for tokens_BT, num_new_tokens_B in chunks(hay.prompt[:-1], min(CHUNK, slots)):
                cache = _read(config, params, tokens_BT, num_new_tokens_B, cache)
            logprob, found = answer_score(config, params, cache, hay.prompt[-1], hay.answer)
            wrong_logprob, _ = answer_score(config, params, cache, hay.prompt[-1], hay.wrong)
            seconds = time.monotonic() - started
            findings.append(
                Finding(length, depth, hay.at, number, found, logprob, wrong_number, wrong_logprob, seconds)
            )
    return findings


def chunks(tokens: Sequence[int], width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A row of tokens in chunks (1, T) of one width, and how many of each count (1,)."""
    for first in range(0, len(tokens), width):
        part = tokens[first : first + width]
        yield np.pad(np.asarray([part], np.int32), [(0, 0), (0, width - len(part))]), np.array([len(part)], np.int32)


def answer_score(
    config: ModelConfig, params: Tree, cache: KVCache, last: int, answer: Sequence[int]
) -> tuple[float, bool]:
    """log p of an answer behind what the cache holds and the token `last`, and whether greedy decoding gives it."""
    if len(answer) > ANSWER:
        raise UserError(f"needle: expected a tokenizer that writes a number in {ANSWER} tokens, got {len(answer)}")
    ((tokens_BT, num_new_tokens_B),) = chunks([last, *answer[:-1]], ANSWER)
    target_T = np.resize(np.asarray(answer, np.int32), ANSWER)
    logprob_T, greedy_T = _answer(config, params, tokens_BT, num_new_tokens_B, cache, target_T)
    return float(np.sum(logprob_T[: len(answer)])), bool(np.all(greedy_T[: len(answer)]))


def print_findings(findings: Sequence[Finding]) -> None:
    """A table on standard output: lengths down, depths across, whether found and by how much it was likelier."""
    depths = list(dict.fromkeys(one.depth for one in findings))
    table = Table(box=None, pad_edge=False)
    for title in ("tokens", *(f"{depth:g} %" for depth in depths)):
        table.add_column(title, justify="right")
    for length in dict.fromkeys(one.tokens for one in findings):
        row = [one for one in findings if one.tokens == length]
        words = ("found" if one.found else "missed" for one in row)
        margins = (one.logprob - one.wrong_logprob for one in row)
        table.add_row(f"{length}", *(f"{word} {margin:+.1f}" for word, margin in zip(words, margins, strict=True)))
    console = Console()
    console.print(table)
    found = sum(one.found for one in findings)
    console.print(f"{found} of {len(findings)} found; beside it, log p of the number less that of another, in nats")


@functools.partial(jax.jit, static_argnames=("config", "slots", "dtype"))
def _empty(config: ModelConfig, slots: int, dtype: Any) -> KVCache:
    return empty_cache(config, 1, slots, dtype)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _read(
    config: ModelConfig, params: Tree, tokens_BT: jax.Array, num_new_tokens_B: jax.Array, cache: KVCache
) -> KVCache:
    extended = hidden_states(config, params, tokens_BT, cache=cache, num_new_tokens_B=num_new_tokens_B).cache
    assert extended is not None
    return extended


@functools.partial(jax.jit, static_argnames="config")
def _answer(
    config: ModelConfig,
    params: Tree,
    tokens_BT: jax.Array,
    num_new_tokens_B: jax.Array,
    cache: KVCache,
    target_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x_BTD = hidden_states(config, params, tokens_BT, cache=cache, num_new_tokens_B=num_new_tokens_B).x_BTD
    return of_targets(logits(config, params, x_BTD)[0], target_T)
