"""The objective on pairs of responses (`train.data.preference_packing.PairBatch`).

The loss is a function of the log-probabilities of whole responses, and those are sums over tokens: so the head runs
once without gradient, for the sums, and once more with each token weighted by the derivative of the loss with respect
to its response's sum. Tokens whose weight is 0, of responses that only set KTO's baseline, are left out there.

Letters: B rows, T tokens of a row, S slots of a row, P pairs, G segments of each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from nemoe_jax.model.next_token import token_logprobs
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree
from train.data.preference_packing import RESPONSE
from train.recipe import Phase, Recipe
from train.step.loss import Sums, chunked_sums, masked_sum
from train.step.preference_loss import PairLogprobs, preference_loss
from train.step.step import Flat, Objective

SEGMENTS = {"kto": 3}  # of a pair; two for the other losses


class PreferenceObjective(Objective):
    """A phase's loss on pairs of responses as a function of arrays."""

    def weight(self, batch: Any) -> Array:
        """What a batch's loss is a mean over: its pairs."""
        return batch.items.sum().astype(jnp.float32)

    def loss(
        self, trainable: Tree, frozen: Flat, teacher: Tree | None, batch: Any, step: Array | int = 0
    ) -> tuple[Array, Sums]:
        """(the loss, its parts): mean over the pairs, with the routers' losses."""
        hidden, trained, rest = self._student(trainable, frozen, batch)
        sums = self._sums(*jax.lax.stop_gradient((trained, hidden.x_BTD)), rest, batch)

        def of(logprobs: Sums) -> tuple[Array, Sums]:
            assert self.phase.preference
            return preference_loss(self.phase.preference, self._pairs(logprobs | counts, batch))

        counts = {name: sums.pop(name) for name in ("tokens", "text_tokens")}
        (loss, parts), slopes = jax.value_and_grad(of, has_aux=True)(sums)
        slot_BT = self._slots(batch)
        weights_BT = jnp.where(batch.mask == RESPONSE, slopes["response"][slot_BT], 0)
        weights_BT += jnp.where((batch.mask > 0) & self._is_chosen(batch), slopes["text"][slot_BT], 0)

        def weighted(trained: Tree, chunk: dict[str, Array], rest: Tree) -> tuple[Array, Sums]:
            return jnp.sum(self._chunk_logprobs(trained, chunk, rest) * chunk["mask"]), {}

        arrays = {"targets": batch.targets, "mask": weights_BT}
        linear, _ = chunked_sums(
            weighted, trained, hidden.x_BTD, arrays, rest, self.recipe.logits_chunk, self.all_count
        )
        # the value of the loss, and the gradient of its linear approximation, which is the same
        return self._with_routing(hidden, loss + linear - jax.lax.stop_gradient(linear), parts)

    def held_out(self, trainable: Tree, frozen: Flat, batch: Any) -> Sums:
        """Sums over the pairs: "loss", "accuracy", "weight"; and "load" (L, E) of MoE layers, times their number."""
        assert self.phase.preference
        hidden, trained, rest = self._student(trainable, frozen, batch)
        sums = self._sums(trained, hidden.x_BTD, rest, batch)
        loss, parts = preference_loss(self.phase.preference, self._pairs(sums, batch))
        weight = self.weight(batch)
        figures = {"loss": loss * weight, "accuracy": parts["accuracy"] * weight, "weight": weight}
        return figures | self._load(hidden, weight)

    def response_logprobs(self, trainable: Tree, frozen: Flat, batch: Any) -> Array:
        """log p of the response in each slot (B, S)."""
        hidden, trained, rest = self._student(trainable, frozen, batch)
        return self._sums(trained, hidden.x_BTD, rest, batch)["response"].reshape(batch.reference.shape)

    def _sums(self, trained: Tree, hidden_BTD: Array, rest: Tree, batch: Any) -> Sums:
        """Sums of the tokens of each slot, (B · S,): log p of "response" and "text", and how many they are."""
        slots = batch.reference.size

        def per_slot(trained: Tree, chunk: dict[str, Array], rest: Tree) -> tuple[Array, Sums]:
            logprobs, mask, slot = self._chunk_logprobs(trained, chunk, rest), chunk["mask"], chunk["slot"]
            of_response, of_text = mask == RESPONSE, (mask > 0) & chunk["is_chosen"]
            values = {"response": of_response * logprobs, "text": of_text * logprobs}
            values |= {"tokens": of_response * 1.0, "text_tokens": of_text * 1.0}
            zero = jnp.zeros(slots, jnp.float32)
            return masked_sum(logprobs, mask), {name: zero.at[slot].add(value) for name, value in values.items()}

        arrays = {
            "targets": batch.targets,
            "mask": batch.mask,
            "slot": self._slots(batch),
            "is_chosen": self._is_chosen(batch),
        }
        return chunked_sums(per_slot, trained, hidden_BTD, arrays, rest, self.recipe.logits_chunk, self.all_count)[1]

    def _chunk_logprobs(self, trained: Tree, chunk: dict[str, Array], rest: Tree) -> Array:
        return token_logprobs(self._logits(trained, chunk, rest), chunk["targets"])

    def _slots(self, batch: Any) -> Array:
        """Each token's slot of the batch's B · S; of padding the row's first, to which it adds nothing."""
        rows, slots = batch.reference.shape
        return jnp.arange(rows)[:, None] * slots + jnp.maximum(batch.segments - 1, 0)

    def _is_chosen(self, batch: Any) -> Array:
        return (batch.segments - 1) % self._group == 0

    @property
    def _group(self) -> int:
        assert self.phase.preference
        return SEGMENTS.get(self.phase.preference.loss, 2)

    def _pairs(self, sums: Sums, batch: Any) -> PairLogprobs:
        rows, slots = batch.reference.shape
        pairs = slots // self._group
        names = ("response", "text", "tokens", "text_tokens")
        shaped = {f"{name}_PG": sums[name].reshape(rows * pairs, self._group) for name in names}
        reference_PG, scores_PG = (
            array.reshape(rows * pairs, self._group) for array in (batch.reference, batch.scores)
        )
        valid_P = (jnp.arange(pairs) < batch.items[:, None]).reshape(-1)
        return PairLogprobs(**shaped, reference_PG=reference_PG, scores_PG=scores_PG, valid_P=valid_P)


def make_objective(
    recipe: Recipe, phase: Phase, config: ModelConfig, teacher: ModelConfig | None, all_count: bool = False
) -> Objective:
    """The objective of a phase, on pairs or on text."""
    kind = PreferenceObjective if phase.preference else Objective
    return kind(recipe, phase, config, teacher, all_count=all_count)
