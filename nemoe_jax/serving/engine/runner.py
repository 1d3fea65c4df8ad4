"""What the engine runs on the device, and what stays there: the pools of keys and values, the counts, the parameters.

Every program has few shapes: the rows of the batch are always as many, and a prompt's chunks have a few widths. So what
a row gives depends on its own request alone, to the last bit, whatever the other rows do.

B rows, T tokens of a chunk, M pages of a row, E stop tokens, V vocabulary, W words of 32 bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from nemoe_jax.adapters.multi_lora import select_adapters
from nemoe_jax.inference.decode import DecodedTokens, DecodeState, decode, read_only
from nemoe_jax.inference.sampler import SamplerInputs, TokenCounts, scores, specialized
from nemoe_jax.kernels.attention.paged import KVPages
from nemoe_jax.model.decode_weights import prepare_decode_params
from nemoe_jax.model.kv_cache import KVCache, division, shared_cache, zero_pages
from nemoe_jax.model.transformer import hidden_states, logits
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree
from nemoe_jax.spec.sharding import constrain_tokens

CHUNK = 512  # tokens of a prompt that are read at a time
_NARROWEST = 32
MOST_ENDS = 16  # tokens that end a row on the device; more are found by the host, some steps later


class DeviceState(NamedTuple):
    """What stays on the device."""

    k: KVPages
    v: KVPages
    counts: TokenCounts


class Batch(NamedTuple):
    """The rows as the host wants them to be; all NumPy's int32 until a program has them."""

    table_BM: Any
    length_B: Any  # tokens that each row holds in the cache
    next_B: Any  # the tokens that are read next
    step_B: Any  # tokens chosen so far
    remaining_B: Any  # tokens that each row may still have; 0: it rests
    stop_BE: Any  # tokens that end the row; -1 for none
    adapter_B: Any  # the number of each row's adapter; -1 for none


class ModelRunner:
    """A model with its cache, on its devices, under the ambient mesh.

    Args:
        specialize: compile what samples without penalties, biases, log-probabilities and constraints apart, which is
            sooner ready; otherwise one program does for all requests that have no log-probabilities or constraints.
        pages: of each device's pool, with page 0.
        slots: tokens of a row at most.
        bank: all adapters (adapters/multi_lora), or None. Rows without one pass through them as well.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Tree,
        rows: int,
        slots: int,
        pages: int,
        dtype: Any,
        bank: Tree | None = None,
        specialize: bool = False,
    ):
        self._specialize = specialize
        self.config, self.params, self.rows, self.bank = config, params, rows, bank
        self.decode_params = prepare_decode_params(params, rows)
        self.parts, self.cuts = division(config, rows)
        self._shape = (slots, pages, dtype)
        self.reset()

    def reset(self) -> None:
        """An empty cache, as at the start."""
        cache, counts = _start(self.config, self.rows, *self._shape)
        self.width = cache.table_BM.shape[1]
        self.held = DeviceState(cache.k, cache.v, counts)
        if jax.sharding.get_abstract_mesh().empty:  # where the parameters are: once for all, or it would compile twice
            self.held = jax.device_put(self.held, self.params["embed"].sharding)

    def read(self, row: int, tokens: np.ndarray, position: int, table_M: np.ndarray, adapter: int) -> None:
        """A chunk of a prompt, at most `CHUNK` tokens, from that position on; `adapter` is a number, or -1."""
        part = self._part(row)
        width = max(_NARROWEST, 1 << (len(tokens) - 1).bit_length())
        tokens_BT, table_BM = np.zeros((self.parts, width), np.int32), np.zeros((self.parts, self.width), np.int32)
        tokens_BT[part, : len(tokens)], table_BM[part] = tokens, table_M
        here_B = np.arange(self.parts, dtype=np.int32) == part
        self.held = _read(
            self.config,
            self.params,
            tokens_BT,
            np.where(here_B, np.int32(len(tokens)), np.int32(0)),
            self.held,
            table_BM,
            np.where(here_B, np.int32(position), np.int32(0)),
            self.bank,
            np.full(self.parts, adapter, np.int32),
        )

    def score(self, prompt: np.ndarray, adapter: int, top: int) -> Any:
        """Log-probabilities (nats) of a prompt's tokens but the first, and the `top` likeliest in their places."""
        width = max(_NARROWEST, 1 << (len(prompt) - 1).bit_length())
        tokens_T = np.pad(prompt, (0, width - len(prompt)))
        scored = _score(self.config, self.params, tokens_T, self.bank, np.full(1, adapter, np.int32), top=top)
        return [array[: len(prompt) - 1] for array in jax.device_get(scored)]

    def count_prompt(self, row: int, prompt: np.ndarray) -> None:
        """The row's counts are those of a new prompt."""
        here_B = np.arange(self.rows) == row
        for first in range(0, len(prompt), CHUNK):
            chunk = prompt[first : first + CHUNK]
            tokens_BT = np.zeros((self.rows, CHUNK), np.int32)
            tokens_BT[row, : len(chunk)] = chunk
            num_new_tokens_B = np.where(here_B, np.int32(len(chunk)), np.int32(0))
            self.held = _count(self.held, here_B & (first == 0), tokens_BT, num_new_tokens_B)

    def decode(
        self, batch: Batch, steps: int, controls: SamplerInputs, allowed_BW: np.ndarray | None, top: int | None
    ) -> DecodedTokens:
        """Up to so many steps of all rows; what they gave, on the host."""
        if self._specialize and allowed_BW is None and top is None:
            controls = specialized(controls)
        self.held, block = _decode(
            self.config, self.decode_params, self.held, batch, steps, controls, allowed_BW, self.bank, top=top
        )
        return jax.device_get(block)

    def wipe(self, row: int, pages: list[int]) -> None:
        """Zeros in a row's pages: what is no number in them would harm the next row even where it is hidden from it."""
        pages_M = np.full(self.width, np.iinfo(np.int32).max, np.int32)
        pages_M[: len(pages)] = pages
        self.held = _wipe(self.held, pages_M, np.arange(self.parts) == self._part(row))

    def _part(self, row: int) -> int:
        """Which of the equal parts of the rows has this one."""
        return row // (self.rows // self.parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _start(config: ModelConfig, rows: int, slots: int, pages: int, dtype: Any) -> tuple[KVCache, TokenCounts]:
    return shared_cache(config, rows, slots, pages, dtype), _laid(TokenCounts.empty(rows, config.vocab))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="held")
def _read(
    config: ModelConfig,
    params: Tree,
    tokens_BT: Any,
    num_new_tokens_B: Any,
    held: DeviceState,
    table_BM: Any,
    length_B: Any,
    bank: Tree | None,
    adapter_B: Any,
) -> DeviceState:
    adapters = select_adapters(bank, adapter_B) if bank else None
    _, cache = read_only(
        config, params, tokens_BT, num_new_tokens_B, KVCache(held.k, held.v, table_BM, length_B), adapters
    )
    return DeviceState(cache.k, cache.v, held.counts)


@functools.partial(jax.jit, static_argnames=("config", "top"))
def _score(config: ModelConfig, params: Tree, tokens_T: Any, bank: Tree | None, adapter_B: Any, top: int) -> Any:
    adapters = select_adapters(bank, adapter_B) if bank else None
    x_TD = hidden_states(config, params, tokens_T[None], adapters=adapters).x_BTD[0]

    def chunk(given):
        x_CD, target_C = given
        return scores(logits(config, params, x_CD[None], adapters)[0], target_C, top)

    chunks = (-1, _NARROWEST)  # the logits of all tokens at once would take gigabytes
    target_T = jax.numpy.roll(tokens_T, -1)
    scored = jax.lax.map(chunk, (x_TD.reshape(*chunks, x_TD.shape[-1]), target_T.reshape(chunks)))
    return [array.reshape(-1, *array.shape[2:]) for array in scored]


@functools.partial(jax.jit, donate_argnames="held")
def _count(held: DeviceState, forgotten_B: Any, tokens_BT: Any, num_new_tokens_B: Any) -> DeviceState:
    return held._replace(counts=_laid(held.counts.forget(forgotten_B).add_prompt(tokens_BT, num_new_tokens_B)))


@functools.partial(jax.jit, static_argnames=("config", "top"), donate_argnames="held")
def _decode(
    config: ModelConfig,
    params: Tree,
    held: DeviceState,
    batch: Batch,
    steps: Any,
    controls: SamplerInputs,
    allowed_BW: Any | None,
    bank: Tree | None,
    top: int | None,
) -> tuple[DeviceState, DecodedTokens]:
    cache = KVCache(held.k, held.v, batch.table_BM, batch.length_B)
    penalized = controls.repetition_B is not None  # a slot with a penalty has it from its first token to its last
    state = DecodeState(
        cache, held.counts if penalized else None, batch.next_B, batch.step_B, batch.remaining_B, batch.stop_BE
    )
    adapters = select_adapters(bank, batch.adapter_B) if bank else None
    state, block = decode(config, params, state, steps, controls, adapters=adapters, allowed_BW=allowed_BW, top=top)
    counts = held.counts if state.counts is None else _laid(state.counts)
    return DeviceState(state.cache.k, state.cache.v, counts), block


@functools.partial(jax.jit, donate_argnames="held")
def _wipe(held: DeviceState, pages_M: Any, here_B: Any) -> DeviceState:
    k, v = zero_pages((held.k, held.v), pages_M, here_B)
    return held._replace(k=k, v=v)


def _laid(counts: TokenCounts) -> TokenCounts:
    return TokenCounts(*map(constrain_tokens, counts))
