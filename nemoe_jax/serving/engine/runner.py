"""What the engine runs on the device, and what stays there: the pools of keys and values, the counts, the parameters.

Every program has few shapes, so that all can be compiled before the first request: a decode step takes 1, 2, 4, … slots
or all of them, whichever is the least that holds those at work (a lone request does not pay for idle slots), and a
prompt's chunks are padded to powers of two. Sums over another number of slots may be added up in another order: what a
slot gives then depends on the others by rounding. `deterministic`: every step takes all slots, and what a slot gives
depends on its own request alone, to the last bit.

B slots of a step, T tokens of a chunk, M pages of a sequence, E stop tokens, V vocabulary, W words of 32 bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nemoe_jax.adapters.loaded import LoadedAdapters
from nemoe_jax.inference.decode import DecodedTokens
from nemoe_jax.inference.sampler import SamplerInputs, controls, specialized
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.kernels.decode_matmul_cpu import MOST_ROWS
from nemoe_jax.model.decode_weights import can_unstack, prepare_decode_params
from nemoe_jax.model.kv_cache import division
from nemoe_jax.serving.engine import device
from nemoe_jax.serving.engine.device import Batch, DeviceState
from nemoe_jax.serving.engine.programs import Program
from nemoe_jax.serving.engine.request import MAX_TOP_LOGPROBS
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree

CHUNK = 512  # tokens of a prompt that are read at a time
_NARROWEST = 32


class ModelRunner:
    """A model with its cache, on its devices, under the ambient mesh.

    Args:
        specialize: compile what samples without penalties, biases, log-probabilities and constraints apart, which is
            sooner ready; otherwise one program does for all requests that have no log-probabilities or constraints.
        pages: of each device's pool, with page 0.
        tokens: of a sequence at most.
        adapters: those that slots may use. Slots without one pass through them as well.
        deterministic: every step takes all slots.

    batch_sizes: how many slots a step may take; checked_tokens: guesses that a step checks, with each slot's own token;
        widths: to how many tokens a prompt's chunk may be padded.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Tree,
        slots: int,
        tokens: int,
        pages: int,
        dtype: Any,
        adapters: LoadedAdapters,
        specialize: bool = False,
        deterministic: bool = False,
    ):
        self._specialize, self.deterministic = specialize, deterministic
        self.config, self.params, self.slots, self._adapters = config, params, slots, adapters
        self.parts, self.cuts = division(config, slots)
        self.batch_sizes = (slots,) if deterministic else tuple(_batch_sizes(config, slots))
        self.checked_tokens = 2 * MOST_ROWS if can_unstack(params) else MOST_ROWS
        of_steps = (*self.batch_sizes, self.checked_tokens)
        self._decode_params = {most <= MOST_ROWS: prepare_decode_params(params, most) for most in of_steps}
        self._shape = (tokens, pages, dtype)
        self.widths = [_NARROWEST]
        while self.widths[-1] < min(CHUNK, tokens):
            self.widths.append(2 * self.widths[-1])
        self.top = min(MAX_TOP_LOGPROBS, config.vocab)
        self.reset()

    @property
    def stacked(self) -> Tree | None:
        """All adapters, as they are now."""
        return self._adapters.stacked

    def reset(self) -> None:
        """An empty cache, as at the start."""
        self.held: Any = None  # there is no room for two
        cache, counts = device.start(self.config, self.slots, *self._shape)
        self.width = cache.table_BM.shape[1]
        self.held = DeviceState(cache.k, cache.v, counts)
        if jax.sharding.get_abstract_mesh().empty:  # where the parameters are: once for all, or it would compile twice
            self.held = jax.device_put(self.held, self.params["embed"].sharding)
        self._shapes = jax.tree.map(_shape, self.held)

    def places(self, numbers: Sequence[int], sizes: Sequence[int]) -> np.ndarray | None:
        """The slots that a step takes, by their places in its batch, int32 (B,); -1: an idle one.

        None where no batch of one of these sizes, the least first, holds them.

        Args:
            numbers: of the slots at work.
        """
        part_slots = self.slots // self.parts
        by_part = [[number for number in numbers if number // part_slots == part] for part in range(self.parts)]
        most = max(map(len, by_part)) * self.parts
        size = next((size for size in sizes if size >= most), None)
        if size is None:
            return None
        if size == self.slots:
            return np.array([number if number in numbers else -1 for number in range(size)], np.int32)
        places = np.full((self.parts, size // self.parts), -1, np.int32)
        for part, own in enumerate(by_part):
            places[part, : len(own)] = own
        return places.reshape(-1)

    def prefill(
        self, slot: int, tokens: np.ndarray, position: int, table_M: np.ndarray, adapter: int, width: int | None = None
    ) -> bool:
        """A chunk of a prompt, at most `CHUNK` tokens, from that position on; `adapter` is a number, or -1.

        Whether what it added to the cache is finite.

        Args:
            width: to which it is padded; by default the least.
        """
        width = padded_width(len(tokens)) if width is None else width
        given = self._prefill_inputs(self.held, slot, tokens, position, table_M, adapter, width)
        self.held, finite_B = device.prefill(*given)
        return bool(finite_B.all())

    def _prefill_inputs(
        self, held: Any, slot: int, tokens: np.ndarray, position: int, table_M: np.ndarray, adapter: int, width: int
    ) -> tuple[Any, ...]:
        part = self._part(slot)
        tokens_BT, table_BM = np.zeros((self.parts, width), np.int32), np.zeros((self.parts, self.width), np.int32)
        tokens_BT[part, : len(tokens)], table_BM[part] = tokens, table_M
        here_B = np.arange(self.parts, dtype=np.int32) == part
        num_new_tokens_B = np.where(here_B, np.int32(len(tokens)), np.int32(0))
        length_B = np.where(here_B, np.int32(position), np.int32(0))
        adapter_B = np.full(self.parts, adapter, np.int32)
        return (
            self.config,
            self.params,
            tokens_BT,
            num_new_tokens_B,
            held,
            table_BM,
            length_B,
            self.stacked,
            adapter_B,
        )

    def score(self, prompt: np.ndarray, adapter: int, top: int) -> Any:
        """Log-probabilities (nats) of a prompt's tokens but the first, and the `top` likeliest in their places."""
        given = self._score_inputs(np.pad(prompt, (0, padded_width(len(prompt)) - len(prompt))), adapter)
        scored = jax.device_get(device.score(*given, top=self.top))
        logprob_T, tokens_TN, logprobs_TN = (array[: len(prompt) - 1] for array in scored)
        return logprob_T, tokens_TN[:, :top], logprobs_TN[:, :top]

    def _score_inputs(self, tokens_T: np.ndarray, adapter: int) -> tuple[Any, ...]:
        return self.config, self.params, tokens_T, self.stacked, np.full(1, adapter, np.int32)

    def count_prompt(self, slot: int, prompt: np.ndarray) -> None:
        """The slot's counts are those of a new prompt."""
        for first in range(0, len(prompt), CHUNK):
            self.held = device.count(*self._count_inputs(self.held, slot, prompt[first : first + CHUNK], first == 0))

    def _count_inputs(self, held: Any, slot: int, chunk: np.ndarray, first: bool) -> tuple[Any, ...]:
        here_B = np.arange(self.slots) == slot
        tokens_BT = np.zeros((self.slots, CHUNK), np.int32)
        tokens_BT[slot, : len(chunk)] = chunk
        return held, here_B & first, tokens_BT, np.where(here_B, np.int32(len(chunk)), np.int32(0))

    def prepared(self, inputs: SamplerInputs, plain: bool) -> SamplerInputs:
        """The sampler's inputs as steps take them, for many of them; `plain`: no constraints and log-probabilities."""
        if self._specialize and plain:
            inputs = specialized(inputs)
        alone = jax.sharding.get_abstract_mesh().empty
        return jax.tree.map(jnp.asarray, inputs) if alone else inputs

    def decode(
        self,
        batch_BN: np.ndarray,
        places: np.ndarray,
        steps: int,
        controls: SamplerInputs,
        allowed_BW: np.ndarray | None,
        top: int | None,
        guesses: tuple[np.ndarray, np.ndarray] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> DecodedTokens:
        """Up to so many steps of the slots in those `places`; what they gave, on the host.

        Args:
            batch_BN: as `Slots.at` gives it.
            guesses: tokens that may come next, (B, K), and how many of them count, (B,): one step checks them.
            meanwhile: called while the device works.
        """
        given = self._decode_inputs(self.held, batch_BN, places, steps, controls, allowed_BW, guesses)
        self.held, packed, scores = device.decode(*given, top=top)
        meanwhile()
        packed, scores = jax.device_get((packed, scores))
        return DecodedTokens(packed[0, 0], packed[3:], packed[1], packed[2] > 0, scores)

    def _decode_inputs(
        self,
        held: Any,
        batch_BN: np.ndarray,
        places: np.ndarray,
        steps: int,
        controls: Any,
        allowed_BW: Any,
        guesses: Any,
    ) -> tuple[Any, ...]:
        size = len(places)
        slot_B = None if size == self.slots else np.where(places < 0, np.int32(self.slots), places)
        params = self._decode_params[(size if guesses is None else guesses[0].size + size) <= MOST_ROWS]
        return self.config, params, held, batch_BN, slot_B, steps, controls, allowed_BW, self.stacked, guesses

    def wipe(self, slot: int, pages: list[int]) -> None:
        """Zeros in a slot's pages: NaN in them would harm the next sequence even where it is masked."""
        self.held = device.wipe(*self._wipe_inputs(self.held, slot, pages))

    def _wipe_inputs(self, held: Any, slot: int, pages: list[int]) -> tuple[Any, ...]:
        pages_M = np.full(self.width, np.iinfo(np.int32).max, np.int32)
        pages_M[: len(pages)] = pages
        return held, pages_M, np.arange(self.parts) == self._part(slot)

    def copy_page(self, slot: int, source: int, target: int) -> None:
        """Copies a page to another one, of the part that has the slot."""
        self.held = device.copy(*self._copy_inputs(self.held, slot, source, target))

    def _copy_inputs(self, held: Any, slot: int, source: int, target: int) -> tuple[Any, ...]:
        return held, np.int32(source), np.int32(target), np.arange(self.parts) == self._part(slot)

    def first_programs(self) -> list[Program]:
        """What the first lone request needs, if it is short and wants nothing special."""
        return [Program("prefill", self.widths[0]), Program("decode", self.batch_sizes[0])]

    def programs(self, constraints: bool, guessed: Mapping[int, int]) -> list[Program]:
        """What else requests may need.

        Args:
            guessed: how many tokens are checked at a time, by the size of the batch.
        """
        extremes = sorted({self.batch_sizes[0], self.batch_sizes[-1]})
        return [
            Program("penalties"),
            Program("wipe"),
            Program("copy"),
            *(Program("prefill", width) for width in self.widths[1:]),
            *(Program("decode", size) for size in self.batch_sizes[1:]),
            *(Program("decode", size, width - 1) for size, width in guessed.items()),
            *(Program("decode", size, allowed=True) for size in extremes if constraints),
            *(Program("decode", size, scored=True) for size in extremes),
            *(Program("decode", size, allowed=True, scored=True) for size in extremes if constraints),
        ]

    def compile(self, program: Program, known_V: np.ndarray | None) -> None:
        """Compiles a program, for calls to find; in any thread, under the ambient mesh."""
        self.lower(program, known_V).compile()

    def lower(self, program: Program, known_V: np.ndarray | None) -> jax.stages.Lowered:
        """A program before it is compiled."""
        size = program.size
        if program.kind == "prefill":
            table_M, tokens = np.zeros(self.width, np.int32), np.zeros(size, np.int32)
            return device.prefill.lower(*self._prefill_inputs(self._shapes, 0, tokens, 0, table_M, -1, size))
        if program.kind == "score":
            return device.score.lower(*self._score_inputs(np.zeros(size, np.int32), -1), top=self.top)
        if program.kind == "penalties":
            return device.count.lower(*self._count_inputs(self._shapes, 0, np.zeros(1, np.int32), True))
        if program.kind == "wipe":
            return device.wipe.lower(*self._wipe_inputs(self._shapes, 0, []))
        if program.kind == "copy":
            return device.copy.lower(*self._copy_inputs(self._shapes, 0, 0, 0))
        zeros_B, idle_B = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        given = controls([SamplingParams()] * size, self.config.vocab, known_V)
        allowed_BW = np.zeros((size, math.ceil(self.config.vocab / 32)), np.uint32) if program.allowed else None
        guesses = (np.zeros((size, program.guesses), np.int32), zeros_B) if program.guesses else None
        inputs = self._decode_inputs(self._shapes, Batch.idle(size, self.width), idle_B, 1, given, allowed_BW, guesses)
        return device.decode.lower(*inputs, top=self.top if program.scored else None)

    def _part(self, slot: int) -> int:
        """Which of the equal parts of the slots has this one."""
        return slot // (self.slots // self.parts)


def chunk_length(left: int) -> int:
    """How many of so many tokens are prefilled next: two chunks where one would be padded by a quarter or more."""
    length = min(left, CHUNK)
    half = padded_width(length) // 2
    return half if 4 * (half + padded_width(length - half)) <= 3 * padded_width(length) else length


def padded_width(length: int) -> int:
    """To what so many tokens are padded: powers of two, for few programs."""
    return max(_NARROWEST, 1 << (length - 1).bit_length())


def _batch_sizes(config: ModelConfig, slots: int) -> Iterator[int]:
    """1, 2, 4, … slots for each part of the batch, as far as the mesh divides them as it does all, and all."""
    whole = division(config, slots)
    size = whole[0]
    while size < slots:
        if division(config, size) == whole:
            yield size
        size *= 2
    yield slots


def _shape(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding if array.committed else None)
