"""adapter_model.safetensors of Hugging Face PEFT: what each tensor means for a checkpoint's weights.

Keys name PEFT's modules, not files:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    (r, in)
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight    (out, r)
    base_model.model.model.embed_tokens.lora_embedding_A              (r, rows), and …_B (columns, r): W += (B A)^T
    base_model.model.model.norm.weight                                a whole tensor: modules_to_save
    base_model.model.lm_head.base_layer.weight                        the same, under a low-rank update

Since transformers 5 a layer's experts are two fused tensors, `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F), and
PEFT wraps the module once for each (`experts` and `experts.base_layer`). A is expert-major: (E r, in), row e r + i is
rank i of expert e. B is rank-major: (out, r E), column i E + e. The older form, a module for each expert, is read too.

r rank, E experts, F expert_ffn, D embed.
"""

import re
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from nemoe_jax.adapters.peft_config import read_config
from nemoe_jax.checkpoints.reader import TensorRef, units
from nemoe_jax.checkpoints.safetensors_file import SafetensorsFile, is_finite
from nemoe_jax.errors import UserError, listed
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.schema import ParamSpec
from nemoe_jax.utils.progress import progress_bar

WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_ROWS = 1024  # of a weight that are in float32 at once
_ALL = slice(None)

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)(?P<inner>\.base_layer)?\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|weight)"
)


class LowRank(NamedTuple):
    """A low-rank update of one checkpoint tensor: names of A and B in the file, and the parts of them that count."""

    a: str
    b: str
    rank: int
    scale: float
    embedding: bool = False  # W += (B A)^T
    ranks_of_a: slice = _ALL
    ranks_of_b: slice = _ALL
    outputs: slice = _ALL

    def read_a(self, file: SafetensorsFile) -> np.ndarray:
        """A, float32 (r, inputs)."""
        return np.asarray(file.view(self.a)[self.ranks_of_a], np.float32)

    def read_b(self, file: SafetensorsFile) -> np.ndarray:
        """B, float32 (outputs, r)."""
        return np.asarray(file.view(self.b)[self.outputs, self.ranks_of_b], np.float32)

    def factors(self, file: SafetensorsFile) -> tuple[np.ndarray, np.ndarray]:
        """Float32 (rows, r) and (r, columns), whose product times `scale` is added to the weight."""
        a, b = self.read_a(file), self.read_b(file)
        return (a.T, b.T) if self.embedding else (b, a)


class PeftAdapter:
    """An adapter directory, matched against a model."""

    def __init__(self, directory: str | Path, model: ModelConfig):
        """Reads the config and the header, and finds each tensor's place.

        Raises:
            UserError: not a LoRA adapter that can be merged, or tensors that do not fit the model; all are listed.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        self.config = read_config(self.directory)
        path = self.directory / WEIGHTS
        if not path.exists() and (self.directory / _PICKLE).exists():
            raise UserError(
                f"{self.directory / _PICKLE}: a pickle file, which can run code when it is opened; "
                f"load it with PEFT and save it as {WEIGHTS} first"
            )
        self.file = SafetensorsFile(path)
        self.dtype = jnp.dtype(model.dtype)
        self.low_rank: dict[str, LowRank] = {}  # {checkpoint key: update}
        self.whole: dict[str, str] = {}  # {checkpoint key: tensor that replaces it}
        self._problems: list[str] = []
        self._match(model)
        if not self.file.entries:
            self._problems.append("no tensors")
        if self._problems:
            raise UserError(f"{path}: {listed(self._problems)}")

    def check_values(self, progress: bool = False) -> None:
        """Reads all tensors.

        Raises:
            UserError: NaN or infinite values.
        """
        with progress_bar(visible=progress) as bar:
            for name in bar.track(self.file.entries, description=f"checking {self.directory.name}"):
                if not is_finite(self.file.view(name)):
                    raise UserError(f"{self.file.path}: {name}: NaN or infinite values")

    def merged(self, key: str, weight: np.ndarray) -> np.ndarray:
        """The checkpoint tensor `key` with the adapter in it: W + scale B A in float32, cast to the model's dtype."""
        if key in self.whole:
            weight = self.file.view(self.whole[key])
        if key not in self.low_rank:
            return weight
        update = self.low_rank[key]
        left, right = update.factors(self.file)
        result = np.empty(weight.shape, self.dtype)
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            result[rows] = weight[rows].astype(np.float32) + np.float32(update.scale) * (left[rows] @ right)
        return result

    def _match(self, model: ModelConfig) -> None:
        refs = [ref for unit in units(model) for ref in unit]
        modules = {ref.key.removesuffix(".weight"): ref.spec for ref in refs}
        experts: dict[str, list[TensorRef]] = {}  # {module that holds a layer's experts: their tensors}
        for ref in refs:
            if "experts" in ref.spec.stacked:
                experts.setdefault(ref.key.partition(".experts.")[0] + ".experts", []).append(ref)
        for (module, _), parts in self._groups().items():
            own = FAMILIES[model.family].key_of(module)
            if model.tied and module == "lm_head" and self.config.ties:
                continue  # the embedding's update over again
            if model.tied and own == "model.embed_tokens" and not self.config.ties:
                self._problems.append(f"{module}: adapted apart from the head, which the model ties to it")
            elif own in modules:
                self._match_module(module, f"{own}.weight", modules[own], parts)
            elif own in experts and "weight" not in parts:
                self._match_experts(module, experts[own], parts)
            else:
                self._problems.extend(f"{name}: matches nothing in a {model.family} model" for name in parts.values())

    def _groups(self) -> dict[tuple[str, str], dict[str, str]]:
        """{(PEFT's module, ".base_layer" or ""): {part: tensor name}}."""
        groups: dict[tuple[str, str], dict[str, str]] = {}
        for name in self.file.entries:
            match = _KEY.fullmatch(name)
            if match:
                groups.setdefault((match["module"], match["inner"] or ""), {})[match["part"]] = name
            else:
                self._problems.append(f"{name}: no tensor of a LoRA adapter")
        return groups

    def _match_module(self, module: str, key: str, spec: ParamSpec, parts: dict[str, str]) -> None:
        """A module that holds one checkpoint tensor."""
        if parts.keys() == {"weight"}:
            if self._fits(parts["weight"], spec.torch_shape):
                self.whole[key] = parts["weight"]
            return
        pair = self._pair(parts)
        if not spec.contracted:
            self._problems.append(f"{', '.join(parts.values())}: {key} is no linear map")
        if pair is None or not spec.contracted:
            return
        name = self.config.name_of(module)
        rank, scale = self.config.rank_of(name), self.config.scale_of(name)
        rows, columns = spec.torch_shape
        embedding = "lora_embedding_A" in parts
        inputs, outputs = (rows, columns) if embedding else (columns, rows)
        if self._fits(pair[0], (rank, inputs)) and self._fits(pair[1], (outputs, rank)):
            self.low_rank[key] = LowRank(*pair, rank, scale, embedding)

    def _match_experts(self, module: str, refs: list[TensorRef], parts: dict[str, str]) -> None:
        """A layer's experts, fused: which of the two parameters it is shows in the shapes, which never coincide."""
        pair = self._pair(parts)
        if pair is None:
            return
        count = refs[-1].place[1] + 1
        width, hidden = next(ref.spec.torch_shape for ref in refs if _leaf(ref) == "gate")
        a, b = (self.file.entries[name].shape for name in pair)
        down = (a[1:], b[:1]) == ((width,), (hidden,))
        parameter = f"{module}.down_proj" if down else f"{module}.gate_up_proj"
        rank, scale = self.config.rank_of(parameter), self.config.scale_of(parameter)
        inputs, outputs = (width, hidden) if down else (hidden, 2 * width)
        if not (self._fits(pair[0], (count * rank, inputs)) and self._fits(pair[1], (outputs, count * rank))):
            return
        places = {"down": _ALL} if down else {"gate": slice(0, width), "up": slice(width, 2 * width)}
        for ref in refs:
            if _leaf(ref) in places:
                expert = ref.place[1]
                mask_ranks = slice(expert * rank, (expert + 1) * rank), slice(expert, None, count)
                self.low_rank[ref.key] = LowRank(*pair, rank, scale, False, *mask_ranks, places[_leaf(ref)])

    def _pair(self, parts: dict[str, str]) -> tuple[str, str] | None:
        """The names of A and B, or a problem."""
        for names in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if parts.keys() == set(names):
                return parts[names[0]], parts[names[1]]
        self._problems.append(f"{', '.join(parts.values())}: expected a pair of A and B")
        return None

    def _fits(self, name: str, wanted: tuple[int, ...]) -> bool:
        got = self.file.entries[name].shape
        if got != wanted:
            self._problems.append(f"{name}: expected shape {wanted}, got {got}")
        return got == wanted


def _leaf(ref: TensorRef) -> str:
    return ref.spec.path.rpartition("/")[2]
