"""adapter_model.safetensors of Hugging Face PEFT: what each tensor means for a checkpoint's weights.

Keys name PEFT's modules, not files:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    (r, in)
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight    (out, r)
    base_model.model.model.embed_tokens.lora_embedding_A              (r, rows), and …_B (columns, r): W += (B A)^T
    base_model.model.model.norm.weight                                a whole tensor: modules_to_save
    base_model.model.lm_head.base_layer.weight                        the same, under a low-rank update
    base_model.model.….q_proj.lora_magnitude_vector                   DoRA: the norm of each row of W + B A
    base_model.model.….q_proj.lora_B.bias, ….q_proj.bias              added to a bias, or in its place
    base_model.model.….embed_tokens.token_adapter.trainable_tokens_delta   rows of the table, whole

With `save_embedding_layers` a module of modules_to_save is there under three names, of which one is the base's.

Since transformers 5 a layer's experts are two fused tensors, `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F), and
PEFT wraps the module once for each (`experts` and `experts.base_layer`). A is expert-major: (E r, in), row e r + i is
rank i of expert e. B is rank-major: (out, r E), column i E + e. The older form, a module for each expert, is read too.

r rank, E experts, F expert_ffn, D embed.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from nemoe_jax.adapters.peft_config import CONFIG, read_config
from nemoe_jax.checkpoints.layout import PARAMS
from nemoe_jax.checkpoints.mistral_format import from_mistral_key, from_mistral_rows
from nemoe_jax.checkpoints.reader import TensorRef, units
from nemoe_jax.checkpoints.safetensors_file import SafetensorsFile, is_finite
from nemoe_jax.errors import UserError, listed
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.families import FAMILIES
from nemoe_jax.spec.schema import ParamSpec
from nemoe_jax.utils.note import note
from nemoe_jax.utils.progress import progress_bar

WEIGHTS = "adapter_model.safetensors"
MISTRAL_WEIGHTS = "lora.safetensors"  # of mistral-finetune
_MISTRAL_SCALING = 2.0  # what it trains with unless told otherwise
_PICKLE = "adapter_model.bin"
_ROWS = 1024  # of a weight that are in float32 at once
_ALL = slice(None)

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)(?P<inner>\.base_layer)?\."
    r"(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|lora_B\.bias|lora_magnitude_vector|bias|weight"
    r"|modules_to_save\.weight|original_module\.weight|token_adapter\.trainable_tokens_delta)"
)
_SAVED, _ORIGINAL = "modules_to_save.weight", "original_module.weight"
_ROWS_TRAINED, _MAGNITUDE, _LORA_BIAS = "token_adapter.trainable_tokens_delta", "lora_magnitude_vector", "lora_B.bias"
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


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
    magnitude: str | None = None  # DoRA (Liu et al., 2024): the norms that the rows of the sum are brought to
    head_dim: int = 0  # of rows in the order of Mistral's layout

    def read_a(self, file: SafetensorsFile) -> np.ndarray:
        """A, float32 (r, inputs)."""
        return np.asarray(file.view(self.a)[self.ranks_of_a], np.float32)

    def read_b(self, file: SafetensorsFile) -> np.ndarray:
        """B, float32 (outputs, r)."""
        b = np.asarray(file.view(self.b)[self.outputs, self.ranks_of_b], np.float32)
        return from_mistral_rows(".q_proj.weight", b, self.head_dim) if self.head_dim else b

    def factors(self, file: SafetensorsFile) -> tuple[np.ndarray, np.ndarray]:
        """Float32 (rows, r) and (r, columns), whose product times `scale` is added to the weight."""
        a, b = self.read_a(file), self.read_b(file)
        return (a.T, b.T) if self.embedding else (b, a)


class PeftAdapter:
    """An adapter directory, matched against a model.

    model: the config of what it makes of the model: with a head of its own or a larger vocabulary where it has them.
    """

    def __init__(self, directory: str | Path, model: ModelConfig, merging: bool = False, resize_vocab: bool = False):
        """Reads the config and the header, and finds each tensor's place.

        Args:
            merging: it may change more than a low-rank sum does, and part the head from the embedding.
            resize_vocab: its embedding decides about the vocabulary.

        Raises:
            UserError: not a LoRA adapter that can be merged, or tensors that do not fit the model; all are listed.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        path = self.directory / WEIGHTS
        self.of_mistral = not (self.directory / CONFIG).exists() and (self.directory / MISTRAL_WEIGHTS).exists()
        if self.of_mistral:
            path = self.directory / MISTRAL_WEIGHTS
        else:
            self.config = read_config(self.directory)
        if not path.exists() and (self.directory / _PICKLE).exists():
            raise UserError(
                f"{self.directory / _PICKLE}: a pickle file, which can run code when it is opened; "
                f"load it with PEFT and save it as {WEIGHTS} first"
            )
        self.file = SafetensorsFile(path)
        config_file = self.directory / (PARAMS if self.of_mistral else CONFIG)
        self.paths = [path for path in (config_file, path) if path.exists()]
        self.dropout = 0.0 if self.of_mistral else self.config.dropout
        self.dtype = jnp.dtype(model.dtype)
        self.low_rank: dict[str, LowRank] = {}  # {checkpoint key: update}
        self.whole: dict[str, str] = {}  # {checkpoint key: tensor that replaces it}
        self.biases: dict[str, tuple[str, float]] = {}  # {checkpoint key: what is added to it, and times what}
        self.rows: dict[str, tuple[str, np.ndarray]] = {}  # {checkpoint key: rows that replace some, and which}
        self._problems: list[str] = []
        self.model = model
        if self.of_mistral:
            self._match_mistral(model)
        else:
            groups = self._groups()
            self._settle_vocabulary(groups, resize_vocab)
            self._settle_head(groups, merging)
            self._match(self.model, groups)
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
        if key in self.rows:
            name, trained = self.rows[key]
            weight = np.array(weight)
            weight[trained] = self.file.view(name)
        if key in self.biases:
            name, scale = self.biases[key]
            return (weight.astype(np.float32) + np.float32(scale) * self.file.view(name)).astype(self.dtype)
        if key not in self.low_rank:
            return weight
        update = self.low_rank[key]
        if update.magnitude is not None:
            return self._with_magnitude(update, weight)
        left, right = update.factors(self.file)
        result = np.empty(weight.shape, self.dtype)
        for start in range(0, len(weight), _ROWS):
            rows = slice(start, start + _ROWS)
            result[rows] = weight[rows].astype(np.float32) + np.float32(update.scale) * (left[rows] @ right)
        return result

    def _with_magnitude(self, update: LowRank, weight: np.ndarray) -> np.ndarray:
        """DoRA: the sum, each output's row (of a table each column) scaled to its norm."""
        assert update.magnitude is not None
        left, right = update.factors(self.file)
        total = weight.astype(np.float32) + np.float32(update.scale) * (left @ right)
        norms = np.linalg.norm(total, axis=0 if update.embedding else 1)
        factors = self.file.view(update.magnitude).astype(np.float32).reshape(-1) / norms
        return (total * (factors if update.embedding else factors[:, None])).astype(self.dtype)

    def _settle_vocabulary(self, groups: "Groups", resize: bool) -> None:
        """Takes the vocabulary of a whole embedding in the adapter, or says that it could."""
        found = [groups[key]["weight"] for key in groups if key[0] == _EMBEDDING and "weight" in groups[key]]
        rows = self.file.entries[found[0]].shape[0] if found else self.model.vocab
        if rows == self.model.vocab:
            return
        if not resize:
            self._problems.append(
                f"{found[0]}: a vocabulary of {rows} tokens, the model's has {self.model.vocab}; "
                "nemoe-convert merge --resize-vocab takes the adapter's"
            )
            return
        self.model = self.model.replace(vocab=rows)
        if not self.model.tied and not any(key[0] == _HEAD and "weight" in parts for key, parts in groups.items()):
            self._problems.append(f"{found[0]}: {rows} tokens, and no {_HEAD} of that size in the adapter")

    def _settle_head(self, groups: "Groups", merging: bool) -> None:
        """Parts the head of a tied model from its embedding where the adapter does not treat them as one."""
        if not self.model.tied:
            return
        parts: dict[str, dict[str, str]] = {_EMBEDDING: {}, _HEAD: {}}
        for (module, _), names in groups.items():
            parts.get(module, {}).update(names)
        embedding, head = parts[_EMBEDDING], parts[_HEAD]
        if not embedding and not head:
            return
        twins = [("weight", "weight", False), (_ROWS_TRAINED, _ROWS_TRAINED, False)]
        twins += [("lora_embedding_A", "lora_B.weight", True), ("lora_embedding_B", "lora_A.weight", True)]
        same = {
            a for a, b, turned in twins if a in embedding and b in head and self._equal(embedding[a], head[b], turned)
        }
        rows_alone = embedding.keys() == {_ROWS_TRAINED} and not head  # PEFT ties those itself
        if rows_alone or (len(same) == len(embedding) == len(head)):
            for key in [key for key in groups if key[0] == _HEAD]:
                del groups[key]
        elif self.config.ties:
            self._problems.append(f"{', '.join(head.values())}: not what the embedding's update is, though it is tied")
        elif not merging:
            module = _EMBEDDING if embedding else _HEAD
            other = "head, which the model ties to it" if embedding else "embedding, which the model ties to it"
            self._problems.append(f"{module}: adapted apart from the {other}")
        else:
            note(f"{self.directory}: adapts embedding and head apart; the head of the merged model is its own")
            self.model = self.model.replace(tied=False)

    def _equal(self, one: str, other: str, turned: bool) -> bool:
        a, b = self.file.view(one), self.file.view(other)
        return np.array_equal(a.T if turned else a, b)

    def _match_mistral(self, model: ModelConfig) -> None:
        """The adapters of mistral-finetune: Mistral's names, and rows in Mistral's order."""
        path = self.directory / PARAMS
        try:
            lora = json.loads(path.read_text(encoding="utf-8")).get("lora") or {} if path.exists() else {}
            scale = float(lora.get("scaling", _MISTRAL_SCALING))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: lora: scaling: expected a number ({error})") from error
        specs = {ref.key: ref.spec for unit in units(model) for ref in unit}
        for name in self.file.entries:
            base, found, part = name.rpartition(".lora_")
            key = from_mistral_key(f"{base}.weight") if found else None
            if key not in specs or part not in ("A.weight", "B.weight"):
                self._problems.append(f"{name}: matches nothing in a {model.family} model")
                continue
            names = f"{base}.lora_A.weight", f"{base}.lora_B.weight"
            if not all(other in self.file.entries for other in names):
                self._problems.append(f"{name}: expected a pair of A and B")
                continue
            rows, columns = specs[key].torch_shape
            rank = self.file.entries[names[0]].shape[0]
            if part == "A.weight" and self._fits(names[0], (rank, columns)) and self._fits(names[1], (rows, rank)):
                turned = model.head_dim if key.endswith((".q_proj.weight", ".k_proj.weight")) else 0
                self.low_rank[key] = LowRank(*names, rank, scale, head_dim=turned)

    def _match(self, model: ModelConfig, groups: "Groups") -> None:
        refs = [ref for unit in units(model) for ref in unit]
        modules = {ref.key.removesuffix(".weight"): ref.spec for ref in refs}
        biases = {ref.key: ref.spec for ref in refs if ref.key.endswith(".bias")}
        experts: dict[str, list[TensorRef]] = {}  # {module that holds a layer's experts: their tensors}
        for ref in refs:
            if "experts" in ref.spec.stacked:
                experts.setdefault(ref.key.partition(".experts.")[0] + ".experts", []).append(ref)
        for (module, _), parts in groups.items():
            own = FAMILIES[model.family].key_of(module)
            if own in modules:
                self._match_bias(module, biases, parts)
                self._match_module(module, f"{own}.weight", modules[own], parts)
            elif own in experts and "weight" not in parts:
                self._match_experts(module, experts[own], parts)
            else:
                self._problems.extend(f"{name}: matches nothing in a {model.family} model" for name in parts.values())

    def _groups(self) -> "Groups":
        """{(PEFT's module, ".base_layer" or ""): {part: tensor name}}."""
        groups: dict[tuple[str, str], dict[str, str]] = {}
        for name in self.file.entries:
            match = _KEY.fullmatch(name)
            if match:
                groups.setdefault((match["module"], match["inner"] or ""), {})[match["part"]] = name
            else:
                self._problems.append(f"{name}: not a tensor of a LoRA adapter")
        for parts in groups.values():
            parts.pop(_ORIGINAL, None)  # the base's
            saved = parts.pop(_SAVED, None)
            if saved and not self._equal(parts.setdefault("weight", saved), saved, False):
                self._problems.append(f"{saved}: expected what {parts['weight']} holds")
        return groups

    def _match_bias(self, module: str, biases: dict[str, ParamSpec], parts: dict[str, str]) -> None:
        """What is added to a module's bias, or replaces it; both leave `parts`."""
        key = f"{module}.bias"
        for part in ("bias", _LORA_BIAS):
            name = parts.pop(part, None)
            if name is None:
                continue
            if key not in biases:
                self._problems.append(f"{name}: {module} has no bias that it could be merged into")
            elif self._fits(name, biases[key].torch_shape):
                if part == "bias":
                    self.whole[key] = name
                else:
                    self.biases[key] = name, self.config.scale_of(self.config.name_of(module))

    def _match_module(self, module: str, key: str, spec: ParamSpec, parts: dict[str, str]) -> None:
        """A module that holds one checkpoint tensor."""
        if not parts:
            return
        if trained := parts.pop(_ROWS_TRAINED, None):
            self._match_rows(module, key, spec, trained)
            if not parts:
                return
        magnitude = parts.pop(_MAGNITUDE, None)
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
        fits = self._fits(pair[0], (rank, inputs)) and self._fits(pair[1], (outputs, rank))
        if fits and (magnitude is None or self._fits(magnitude, (columns if embedding else rows,))):
            self.low_rank[key] = LowRank(*pair, rank, scale, embedding, magnitude=magnitude)

    def _match_rows(self, module: str, key: str, spec: ParamSpec, name: str) -> None:
        """Rows of a table or of the head that replace the model's."""
        end = next((end for end in self.config.tokens if f".{module}".endswith(f".{end}")), None)
        rows = np.array(self.config.tokens.get(end or "", ()), np.int64)
        if end is None or (len(rows) and rows.max() >= spec.torch_shape[0]):
            self._problems.append(f"{name}: trainable_token_indices: expected rows of {key}, got {rows.tolist()}")
        elif self._fits(name, (len(rows), spec.torch_shape[1])):
            self.rows[key] = name, rows

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


Groups = dict[tuple[str, str], dict[str, str]]  # see `_groups`


def _leaf(ref: TensorRef) -> str:
    return ref.spec.path.rpartition("/")[2]
