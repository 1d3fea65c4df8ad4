"""Reading model directories: the config, and the tensors of the weight files, checked against the schema.

A directory has one of two layouts, Hugging Face's or Mistral's own. Here a tensor's key is always Hugging Face's, and
so are its values; `Layout` says what they are on disk.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from nemoe_jax.checkpoints import fp8
from nemoe_jax.checkpoints.gguf.directory import gguf_files, model_directory
from nemoe_jax.checkpoints.hf_names import own_entries
from nemoe_jax.checkpoints.layout import CONFIG, HUGGING_FACE, MISTRAL, PARAMS, Layout, layout_of
from nemoe_jax.checkpoints.safetensors_file import SafetensorsFile, is_finite
from nemoe_jax.errors import UserError, listed
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.fp8_weight import is_quantized
from nemoe_jax.spec.schema import ParamSpec, declare, leaves
from nemoe_jax.utils.note import note

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # compared at once
_ALIGNMENT = 64  # bytes

if TYPE_CHECKING:
    from nemoe_jax.checkpoints.gguf.weights import GgufWeights

Weights: TypeAlias = "SafetensorsFile | GgufWeights"


class TensorRef(NamedTuple):
    """One checkpoint tensor: a spec and the index into its stacked axes."""

    spec: ParamSpec
    place: tuple[int, ...]
    key: str


def read_config(directory: str | Path) -> ModelConfig:
    """The config.json or params.json of a model directory, or the config of a GGUF file.

    Raises:
        UserError: not a model directory, or a model that this package does not know.
    """
    return _read_config(model_directory(directory))[0]


def _read_config(directory: Path) -> tuple[ModelConfig, fp8.Fp8Format | None]:
    layout = layout_of(directory)
    path = directory / layout.config_file
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    if not path.is_file():
        raise UserError(f"{directory}: not a model directory: no {CONFIG} (nor {PARAMS})")
    content = _read_json(path, "not JSON")
    config = layout.parse(content, str(path))
    quantized = fp8.format_of(directory, content, str(path))
    if layout is MISTRAL and layout.has_weights(directory):  # params.json does not say the dtype
        config = config.replace(dtype=SafetensorsFile(_weight_files(directory, layout)[0]).dtype or config.dtype)
    if config.tied and layout.has_weights(directory) and _has_own_head(directory, layout, config):
        note(f"{path} says that the head is the embedding; the weights hold another one, which is used")
        config = config.replace(tied=False)
    return config, quantized


def _open(path: Path, layout: Layout, config: ModelConfig) -> SafetensorsFile:
    """A weight file, its entries under the names of the layout."""
    file = SafetensorsFile(path)
    if layout is HUGGING_FACE:
        file.entries = own_entries(path, file.entries, config)
    return file


def _has_own_head(directory: Path, layout: Layout, config: ModelConfig) -> bool:
    """Whether the weight files hold a head that is no copy of the embedding."""
    names = {layout.name(key): key for key in (HEAD, EMBEDDING)}
    found: dict[str, tuple[SafetensorsFile, str]] = {}
    for path in _weight_files(directory, layout):
        file = _open(path, layout, config)
        found |= {key: (file, name) for name, key in names.items() if name in file.entries}
    if HEAD not in found or EMBEDDING not in found:
        return False
    entries = [file.entries[name] for file, name in found.values()]
    if entries[0].dtype != entries[1].dtype or entries[0].shape != entries[1].shape:
        return True
    head, embedding = (file.view(name).view(np.uint8) for file, name in found.values())
    rows = range(0, len(head), _ROWS)
    return not all(np.array_equal(head[row : row + _ROWS], embedding[row : row + _ROWS]) for row in rows)


def _read_json(path: Path, otherwise: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {otherwise} ({error})") from error


def _weight_map(directory: Path, layout: Layout) -> dict[str, str]:
    """{tensor's name: its file} of an index; empty where there is none."""
    path = directory / layout.index
    if not path.is_file():
        return {}
    what = "not an index of safetensors shards"
    content = _read_json(path, what)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not weight_map or not isinstance(weight_map, dict):
        raise UserError(f"{path}: {what} (no weight_map)")
    bad = [file for file in weight_map.values() if not isinstance(file, str) or Path(file).name != file]
    bad += [name for name in (*weight_map, *weight_map.values()) if not str(name).isprintable()]
    if bad:
        raise UserError(f"{path}: {what} (expected names of files beside it, got {bad[0]!r})")
    return weight_map


def _weight_files(directory: Path, layout: Layout) -> list[Path]:
    if weight_map := _weight_map(directory, layout):
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise UserError(f"{directory}: missing shard {', '.join(missing)} (listed in {layout.index})")
        return [directory / name for name in names]
    if (directory / layout.single).is_file():
        return [directory / layout.single]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        raise UserError(
            f"{directory}: only pickle files ({pickles[0]}), which can run code when they are opened; "
            "save the model as safetensors first"
        )
    raise UserError(f"{directory}: no weights: neither {layout.single} nor {layout.index}")


def _open_weights(directory: Path, layout: Layout, config: ModelConfig) -> list[Weights]:
    if not layout.has_weights(directory) and (links := gguf_files(directory)):
        from nemoe_jax.checkpoints.gguf.header import read_header  # the gguf package loads here
        from nemoe_jax.checkpoints.gguf.weights import GgufWeights

        header = read_header(links[0])
        return [GgufWeights(path, header, config) for path in header.paths]
    return [_open(path, layout, config) for path in _weight_files(directory, layout)]


class Checkpoint:
    """The tensors of a model directory of either layout or of a GGUF file, checked against the schema of its config.

    path, directory: what was opened, and the model directory; for a GGUF file the one that stands for it.
    files: {key: the file that holds the tensor}, with the tensors' names on disk in the file's entries.
    """

    def __init__(self, directory: str | Path):
        """Reads the config and every header.

        Raises:
            UserError: anything missing, unexpected, misshapen or damaged; tensors are listed together.
        """
        self.path, self.directory = Path(directory), model_directory(directory)
        self.layout = layout_of(self.directory)
        self.config_file = self.layout.config_file
        self.config, self.fp8 = _read_config(self.directory)
        self.files: dict[str, Weights] = {}
        self._scales: dict[str, tuple[Weights, str]] = {}  # {key of an FP8 weight: its scales' file and name}
        self._cache_scales: dict[str, tuple[Weights, str]] = {}  # {key of a projection: the same of keys or values}
        problems = []
        for file in _open_weights(self.directory, self.layout, self.config):
            for name, entry in file.entries.items():
                weight = fp8.scaled_weight(name) if self.fp8 else None
                key = self.layout.key(weight or name)
                if self.fp8 and fp8.is_activation_scale(name):
                    problem = file.dtype_problem(name) or fp8.activation_scale_problem(name, file.view(name))
                    problems += [f"{problem} ({file.path.name})"] if problem else []
                    if projection := fp8.scaled_projection(name):
                        self._cache_scales[str(self.layout.key(projection))] = file, name
                    continue
                if weight is not None and key is not None:
                    self._scales[key] = file, name
                elif key is None:
                    problems.append(f"unexpected {name} {entry.shape} in {file.path.name}")
                elif key in self.files:
                    problems.append(f"{name} is in both {self.files[key].path.name} and {file.path.name}")
                else:
                    self.files[key] = file
        if self.config.tied and HEAD in self.files and EMBEDDING not in self.files:  # one name of two was saved
            file = self.files[EMBEDDING] = self.files.pop(HEAD)
            file.entries[self.layout.name(EMBEDDING)] = file.entries.pop(self.layout.name(HEAD))
        self._refuse_another_size()
        problems += self._differences()
        if problems:
            raise UserError(f"{self.path}: {listed(problems)}")

    def _refuse_another_size(self) -> None:
        """Raises where the config speaks of many times the tensors: too many, perhaps, to list."""
        specs = leaves(declare(self.config)).values()
        count = sum(math.prod(spec.shape[: len(spec.stacked)]) for spec in specs)
        if count > 10 * len(self.files) + 100:
            raise UserError(
                f"{self.directory / self.config_file}: a model of {self.config.layers} layers has {count} tensors, "
                f"the weight files hold {len(self.files)}"
            )

    def _differences(self) -> list[str]:
        """What is wrong with the tensors, by what the config and the index say."""
        wanted = {ref.key: ref.spec for ref in itertools.chain.from_iterable(units(self.config))}
        listed = _weight_map(self.directory, self.layout)
        problems = [
            f"missing {self.layout.name(key)} {spec.torch_shape}"
            for key, spec in wanted.items()
            if key not in self.files
        ]
        for key, file in self.files.items():
            name = self.layout.name(key)
            shape = file.entries[name].shape
            if key not in wanted:
                # a copy of tied embeddings (see `_has_own_head`), and constants that old versions saved
                if not (key.endswith("rotary_emb.inv_freq") or (self.config.tied and key == HEAD)):
                    problems.append(f"unexpected {name} {shape} in {file.path.name}")
                continue
            spec = wanted[key]
            if shape != spec.torch_shape:
                problems.append(
                    f"{spec.path}: expected {name} of shape {spec.torch_shape}, got {shape} from {file.path.name}"
                )
            if problem := file.dtype_problem(name) or self._scale_problem(key, shape):
                problems.append(f"{problem} ({file.path.name})")
            if listed.get(name, file.path.name) != file.path.name:
                problems.append(f"{name} is in {file.path.name}; {self.layout.index} has it in {listed[name]}")
        return problems

    def _scale_problem(self, key: str, shape: tuple[int, ...]) -> str | None:
        """What is wrong with the scales of a weight, if anything: FP8 weights have them, others do not."""
        name = self.layout.name(key)
        if self.files[key].entries[name].dtype != fp8.ON_DISK:
            unwanted = self._scales.get(key)
            return unwanted and f"{unwanted[1]}: scales of {name}, which is not {fp8.ON_DISK}"
        if self.fp8 is None:
            return f"{name} is {fp8.ON_DISK}, and {self.config_file} announces no quantization"
        if key not in self._scales:
            return f"missing the scales of {name}"
        file, scales = self._scales[key]
        if problem := file.dtype_problem(scales):
            return problem
        return fp8.scale_problem(scales, name, shape, file.view(scales), self.fp8)

    def view(self, key: str, dtype: Any = None) -> np.ndarray:
        """A tensor as Hugging Face's layout has it: mapped from disk, or copied where the rows' order is another.

        FP8 weights come as float32, multiplied by their scales; quantized GGUF tensors in `dtype`, or in float32.
        """
        file, name = self.files[key], self.layout.name(key)
        tensor = file.view(name) if isinstance(file, SafetensorsFile) else file.view(name, dtype)
        if key in self._scales:
            file, scales = self._scales[key]
            assert self.fp8 is not None
            tensor = fp8.dequantize(tensor, file.view(scales), self.fp8.block)
        return self.layout.from_disk(key, tensor, self.config.head_dim)

    def keeps_fp8(self, spec: ParamSpec) -> bool:
        """Whether all tensors of an array are in FP8 on disk."""
        return is_quantized(spec) and all(key in self._scales for _, key in spec.tensors())

    def read_fp8(self, spec: ParamSpec, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a leaf in float8_e4m3fn, to be multiplied by its scales; rounded here where it is not so on disk."""
        return self._read(spec, index, fp8.E4M3, self._fp8_values)

    def read_scales(self, spec: ParamSpec, index: tuple[slice, ...], most: int) -> np.ndarray:
        """Part of the scales (stacked…, blocks of inputs, outputs…) of a leaf, as `fp8.by_output` gives them."""
        stacked = len(spec.stacked)
        spans = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=False)]
        of_tensors = []
        for _, key in _positions(spec, spans[:stacked]):
            scale = self._by_output(key, spec.torch_shape, most).T
            of_tensors.append(scale.reshape(len(scale), *spec.shape[stacked + len(spec.contracted) :]))
        return np.stack(of_tensors).reshape(*map(len, spans[:stacked]), *of_tensors[0].shape)[
            (slice(None),) * stacked + index[stacked:]
        ]

    def read_cache_scales(self, spec: ParamSpec) -> np.ndarray | None:
        """What keys or values are divided by in an FP8 cache, for each layer; None where the checkpoint does not say.

        Raises:
            UserError: some layers have a scale, others have none, or several.
        """
        found = {key: self._cache_scales.get(key) for _, key in spec.tensors()}
        if not any(found.values()):
            return None
        scales = []
        for key, place in found.items():
            scale = None if place is None else place[0].view(place[1]).astype(np.float32).reshape(-1)
            if scale is None or scale.size != 1:
                got = "none" if scale is None else f"{scale.size}"
                raise UserError(f"{self.path}: {self.layout.name(key)}: expected one scale for an FP8 cache, got {got}")
            scales.append(scale[0])
        return np.array(scales)

    def _by_output(self, key: str, shape: tuple[int, ...], most: int) -> np.ndarray:
        if key not in self._scales:
            return fp8.row_scales(self.view(key))
        file, name = self._scales[key]
        assert self.fp8 is not None and len(shape) == 2
        scale = fp8.by_output(file.view(name), shape, self.fp8.block, most)
        return self.layout.from_disk(key, scale, self.config.head_dim)

    def _fp8_values(self, key: str) -> np.ndarray:
        if key not in self._scales:
            weight = self.view(key)
            return fp8.rounded(weight, fp8.row_scales(weight))
        return self.layout.from_disk(key, self.files[key].view(self.layout.name(key)), self.config.head_dim)

    def finite(self, key: str) -> np.ndarray:
        """`view` of a tensor that is going to be computed with.

        Raises:
            UserError: it holds NaN or infinity.
        """
        tensor = self.view(key)
        if not is_finite(tensor):
            raise UserError(f"{self.path}: {self.layout.name(key)}: not finite")
        return tensor

    def read(self, spec: ParamSpec, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """Part of a leaf in the schema's layout, copied from disk: `leaf[index]`."""
        return self._read(spec, index, dtype, lambda key: self.view(key, dtype))

    def _read(
        self, spec: ParamSpec, index: tuple[slice, ...], dtype: Any, view: Callable[[str], np.ndarray]
    ) -> np.ndarray:
        spans = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
        block = _aligned([len(span) for span in spans], dtype)
        stacked = len(spec.stacked)
        inner = spec.shape[stacked:]
        inputs = len(spec.contracted)
        for place, key in _positions(spec, spans[:stacked]):
            tensor = view(key)
            if spec.transposed:  # (produced…, contracted…) on disk
                tensor = tensor.reshape(*inner[inputs:], *inner[:inputs])
                tensor = tensor.transpose(*range(len(inner) - inputs, len(inner)), *range(len(inner) - inputs))
            else:
                tensor = tensor.reshape(inner)
            block[place] = tensor[index[stacked:]]
        return block


def _aligned(shape: list[int], dtype: Any) -> np.ndarray:
    """An array that begins where a device that is the host itself can use it as it is."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    return memory[first : first + size].view(dtype).reshape(shape)


def _positions(spec: ParamSpec, spans: list[range]) -> Iterable[tuple[tuple[int, ...], str]]:
    """(place in a block, checkpoint key) of the tensors whose stacked indices are within `spans`."""
    for numbers, key in spec.tensors():
        if all(number in span for number, span in zip(numbers, spans, strict=True)):
            yield tuple(number - span.start for number, span in zip(numbers, spans, strict=True)), key


@functools.lru_cache(maxsize=32)
def units(config: ModelConfig) -> list[list[TensorRef]]:
    """A checkpoint's tensors in order, as the units that are written together: embedding, each layer, norm and head."""
    by_unit: list[list[TensorRef]] = [[] for _ in range(config.layers + 2)]
    for spec in leaves(declare(config)).values():
        for index, key in spec.tensors():
            if "layers" in spec.stacked:
                unit = 1 + spec.first_layer + index[0]
            else:
                unit = 0 if spec.lookup else config.layers + 1
            by_unit[unit].append(TensorRef(spec, index, key))
    return by_unit
