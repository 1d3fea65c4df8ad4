"""What the engine runs on the device, and what stays there: the pools of keys and values, the counts, the parameters.

Every program has few shapes: the rows of the batch are always as many, and a prompt's chunks have a few widths. So what
a row gives depends on its own request alone, to the last bit, whatever the other rows do.

B rows, T tokens of a chunk, M pages of a row, E stop tokens, V vocabulary, W words of 32 bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.adapter_bank import with_rows
from nemoe_jax.cache import Cache, Pages, division, shared_cache
from nemoe_jax.config import ModelConfig
from nemoe_jax.decoding import Block, State, decode, read_only
from nemoe_jax.schema import Tree
from nemoe_jax.stacked import for_decoding
from nemoe_jax.token_choice import Controls, Counts

CHUNK = 512  # tokens of a prompt that are read at a time
_NARROWEST = 32
MOST_ENDS = 16  # tokens that end a row on the device; more are found by the host, some steps later


class Programs:
    """A model with its cache, on its devices, under the ambient mesh.

    Args:
        pages: of each device's pool, with page 0.
        slots: tokens of a row at most.
        bank: all adapters (adapter_bank.py), or None. Where there are some, rows without one pass through them as well.
    """

    def __init__(
        self, config: ModelConfig, params: Tree, rows: int, slots: int, pages: int, dtype: Any, bank: Tree | None = None
    ):
        self.config, self.params, self.rows, self.bank = config, params, rows, bank
        # with adapters no weights are read in place
        self.decode_params = params if bank else for_decoding(params, rows)
        self.adapter_B = np.full(rows, -1, np.int32)
        self.parts, self.cuts = division(config, rows)
        self._shape = (slots, pages, dtype)
        self.forget_everything()

    def forget_everything(self) -> None:
        """An empty cache, as at the start."""
        self.state = _start(self.config, self.rows, *self._shape)
        self.width = self.state.cache.table_BM.shape[1]

    def read(self, row: int, tokens: np.ndarray, position: int, table_M: np.ndarray, adapter: int) -> None:
        """A chunk of a prompt, at most `CHUNK` tokens, from that position on; `adapter` is a number, or -1."""
        part = row // (self.rows // self.parts)
        width = max(_NARROWEST, 1 << (len(tokens) - 1).bit_length())
        tokens_BT = np.zeros((self.parts, width), np.int32)
        counts_B, length_B = np.zeros(self.parts, np.int32), np.zeros(self.parts, np.int32)
        table_BM = np.zeros((self.parts, self.width), np.int32)
        tokens_BT[part, : len(tokens)], table_BM[part] = tokens, table_M
        counts_B[part], length_B[part] = len(tokens), position
        k, v = self.state.cache.k, self.state.cache.v
        adapters = self.bank, np.full(self.parts, adapter, np.int32)
        self._hold(*_read(self.config, self.params, tokens_BT, counts_B, k, v, table_BM, length_B, *adapters))

    def count_prompt(self, row: int, prompt: np.ndarray) -> None:
        """The row's counts are those of a new prompt."""
        forgotten_B = np.arange(self.rows) == row
        counts = self.state.counts
        for first in range(0, len(prompt), CHUNK):
            chunk = prompt[first : first + CHUNK]
            tokens_BT = np.zeros((self.rows, CHUNK), np.int32)
            tokens_BT[row, : len(chunk)] = chunk
            counts_B = np.where(np.arange(self.rows) == row, len(chunk), 0)
            counts = _count(counts, forgotten_B, tokens_BT, counts_B)
            forgotten_B = np.zeros(self.rows, bool)
        self.state = self.state._replace(counts=counts)

    def place(self, table_BM: np.ndarray, length_B: np.ndarray, adapter_B: np.ndarray, **rows: np.ndarray) -> None:
        """The rows as the host wants them to be from now on."""
        self.adapter_B = adapter_B.copy()
        cache = self.state.cache._replace(table_BM=table_BM.copy(), length_B=length_B.copy())
        self.state = self.state._replace(cache=cache, **{name: array.copy() for name, array in rows.items()})

    def decode(self, steps: int, controls: Controls, allowed_BW: np.ndarray | None, top: int | None) -> Block:
        """Up to so many steps of all rows; what they gave, on the host."""
        adapters = self.bank, self.adapter_B
        self.state, block = _decode(
            self.config, self.decode_params, self.state, steps, controls, allowed_BW, *adapters, top=top
        )
        return jax.device_get(block)

    def wipe(self, row: int, pages: list[int]) -> None:
        """Zeros in a row's pages: what is no number in them would harm the next row even where it is hidden from it."""
        part, all = row // (self.rows // self.parts), self._shape[1]
        places = [(part * self.cuts + cut) * all + page for cut in range(self.cuts) for page in pages]
        where = np.full(self.width, -1, np.int32)
        where[: len(places)] = places
        self._hold(*_wipe(self.state.cache.k, self.state.cache.v, np.where(where < 0, 2**31 - 1, where)))

    def _hold(self, k: Pages, v: Pages) -> None:
        self.state = self.state._replace(cache=self.state.cache._replace(k=k, v=v))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _start(config: ModelConfig, rows: int, slots: int, pages: int, dtype: Any) -> State:
    cache, zeros_B = shared_cache(config, rows, slots, pages, dtype), jnp.zeros(rows, jnp.int32)
    stop_BE = jnp.full((rows, MOST_ENDS), -1, jnp.int32)
    return State(cache, Counts.empty(rows, config.vocab), zeros_B, zeros_B, zeros_B, stop_BE)


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("k", "v"))
def _read(
    config: ModelConfig,
    params: Tree,
    tokens_BT: Any,
    counts_B: Any,
    k: Pages,
    v: Pages,
    table_BM: Any,
    length_B: Any,
    bank: Tree | None,
    adapter_B: Any,
) -> tuple[Pages, Pages]:
    adapters = with_rows(bank, adapter_B) if bank else None
    _, cache = read_only(config, params, tokens_BT, counts_B, Cache(k, v, table_BM, length_B), adapters)
    return cache.k, cache.v


@functools.partial(jax.jit, donate_argnames="counts")
def _count(counts: Counts, forgotten_B: Any, tokens_BT: Any, counts_B: Any) -> Counts:
    return counts.forget(forgotten_B).add_prompt(tokens_BT, counts_B)


@functools.partial(jax.jit, static_argnames=("config", "top"), donate_argnames="state")
def _decode(
    config: ModelConfig,
    params: Tree,
    state: State,
    steps: Any,
    controls: Controls,
    allowed_BW: Any | None,
    bank: Tree | None,
    adapter_B: Any,
    top: int | None,
) -> tuple[State, Block]:
    adapters = with_rows(bank, adapter_B) if bank else None
    return decode(config, params, state, steps, controls, adapters=adapters, allowed_BW=allowed_BW, top=top)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _wipe(k: Pages, v: Pages, where_M: Any) -> tuple[Pages, Pages]:
    return jax.tree.map(lambda array: array.at[:, :, where_M].set(0, mode="drop"), (k, v))
