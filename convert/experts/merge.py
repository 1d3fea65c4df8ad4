"""Merging of experts instead of dropping them, after REAM (Jha et al., 2026, arXiv 2604.04356).

The experts of the highest scores stay, each with its router row. From the most useful one on, each takes the most
similar of those that are left into its group, as far as a group may grow: so most of the kept experts stay as they
are. Two experts are similar as far as their outputs and their router logits point the same way over the text. A
group becomes the mean of its experts, weighted by their scores, each expert's neurons first brought into the order in
which they are nearest to the kept one's (a neuron is its gate row, up row and down column, at length 1).

Other than in the paper neurons are ordered by their weights alone, not by their activity as well, and all layers are
scored on the unmerged model's stream.

T tokens, D embed, F expert_ffn, E experts.
"""

from collections.abc import Sequence

import numpy as np

GROUP_SHARE = 1 / 8  # of a layer's experts that a group may have, at most: in the paper 16 of 128


def similarities(logits_TE: np.ndarray, gram_TEE: np.ndarray) -> np.ndarray:
    """(E, E), from -1 to 1: the mean of the outputs' cosine over tokens and the cosine of the logits' profiles."""
    least = np.finfo(np.float32).tiny
    norm_TE = np.sqrt(np.maximum(np.diagonal(gram_TEE, axis1=1, axis2=2), least))
    outputs_EE = np.mean(gram_TEE / (norm_TE[:, :, None] * norm_TE[:, None, :]), axis=0)
    profiles_TE = logits_TE / np.maximum(np.linalg.norm(logits_TE, axis=0), least)
    return (outputs_EE + profiles_TE.T @ profiles_TE) / 2


def groups_of(kept: Sequence[int], scores_E: np.ndarray, similar_EE: np.ndarray) -> list[list[int]]:
    """The group of each kept expert, itself first."""
    left = [expert for expert in range(len(scores_E)) if expert not in kept]
    groups = {expert: [expert] for expert in kept}
    size = max(2, int(GROUP_SHARE * len(scores_E)), -(-len(scores_E) // len(kept)))  # enough to leave none out
    for expert in sorted(kept, key=lambda expert: -scores_E[expert]):
        near = sorted(left, key=lambda other: -similar_EE[expert, other])[: size - 1]
        groups[expert] += near
        left = [other for other in left if other not in near]
    return list(groups.values())


def merged(experts: Sequence[dict[str, np.ndarray]], scores: Sequence[float]) -> dict[str, np.ndarray]:
    """One expert of several, in the dtype of the first: gate and up (F, D), down (D, F)."""
    from scipy.optimize import linear_sum_assignment

    dtypes = {name: array.dtype for name, array in experts[0].items()}
    neurons = [
        np.concatenate([expert["gate"], expert["up"], expert["down"].T], axis=1, dtype=np.float32, casting="unsafe")
        for expert in experts
    ]
    weights = np.array(scores) / sum(scores) if sum(scores) > 0 else np.full(len(scores), 1 / len(scores))
    total = weights[0] * neurons[0]
    for own, weight in zip(neurons[1:], weights[1:], strict=True):
        order = linear_sum_assignment(_at_length_1(neurons[0]) @ _at_length_1(own).T, maximize=True)[1]
        total += weight * own[order]
    gate, up, down = np.split(total, 3, axis=1)
    return {name: array.astype(dtypes[name]) for name, array in (("gate", gate), ("up", up), ("down", down.T))}


def _at_length_1(neurons: np.ndarray) -> np.ndarray:
    return neurons / np.maximum(np.linalg.norm(neurons, axis=1, keepdims=True), np.finfo(np.float32).tiny)
