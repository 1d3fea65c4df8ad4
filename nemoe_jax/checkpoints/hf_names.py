"""The names of tensors in Hugging Face's files, where they are not those of the parameter schema.

- transformers 5 can save a model as it holds it in memory: all experts of a layer in `gate_up_proj` (E, 2F, D) and
  `down_proj` (E, D, F), and Mixtral's modules under other names. An expert's part of a fused tensor is contiguous, so
  it is a tensor of its own at a later byte.
- A model of several modalities has its text model under a prefix.
- What belongs to no language model is left out, and said to be: vision towers, TRL's value head.

E experts, F expert_ffn, D embed.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from nemoe_jax.checkpoints.safetensors_file import Entry, bytes_of
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.utils.note import note

_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_LEFT_OUT = {
    "v_head.": "TRL's value head",
    "vision_tower.": "a vision tower",
    "vision_encoder.": "a vision tower",
    "multi_modal_projector.": "a projector of images",
}
_FUSED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)(\.weight)?")


def own_entries(path: Path, entries: Mapping[str, Entry], config: ModelConfig) -> dict[str, Entry]:
    """The tensors of a file by the names of the parameter schema.

    Raises:
        UserError: fused experts of another shape, or two tensors of one meaning.
    """
    own: dict[str, Entry] = {}
    left_out: dict[str, list[str]] = {}
    for name, entry in entries.items():
        kind = next(
            (kind for prefix, kind in _LEFT_OUT.items() if name.removeprefix("model.").startswith(prefix)), None
        )
        if kind is not None:
            left_out.setdefault(kind, []).append(name)
            continue
        found = _experts(path, name, entry, config) or {_renamed(name, config): entry}
        for key, part in found.items():
            if key in own:
                raise UserError(f"{path}: {name}: {key} is there a second time")
            own[key] = part
    for kind, names in left_out.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        note(f"{path}: left out {kind}: {', '.join(names[:3])}{more}")
    return own


def _renamed(name: str, config: ModelConfig) -> str:
    for prefix, own in _PREFIXES.items():
        if name.startswith(prefix):
            name = own + name.removeprefix(prefix)
    return FAMILIES[config.family].key_of(name)


def _experts(path: Path, name: str, entry: Entry, config: ModelConfig) -> dict[str, Entry]:
    """The experts' tensors in a fused one; empty where it is none."""
    match = _FUSED.fullmatch(name)
    if match is None or not config.experts:
        return {}
    gate, up, down = FAMILIES[config.family].experts
    width, hidden = config.expert_ffn, config.hidden
    leaves = [(down, (hidden, width))] if match[2] == "down_proj" else [(gate, (width, hidden)), (up, (width, hidden))]
    rows = sum(shape[0] for _, shape in leaves)
    expected = (config.experts, rows, leaves[0][1][1])
    if entry.shape != expected:
        raise UserError(f"{path}: expected {name} of shape {expected}, got {entry.shape}")
    parts: dict[str, Entry] = {}
    offset = entry.offset
    for expert in range(config.experts):
        for key, shape in leaves:
            own = f"model.layers.{match[1]}.{key.format(expert=expert)}.weight"
            parts[own] = Entry(entry.dtype, shape, offset)
            offset += bytes_of(entry.dtype, shape)
    assert offset - entry.offset == bytes_of(entry.dtype, entry.shape) or not math.prod(entry.shape)
    return parts
