"""Hugging Face model directories: config.json, safetensors shards with an index, tokenizer files.

Loading asks each leaf of the schema for its slices: every device's shard is filled straight from the mapped file, and
no sharded leaf is whole on the host. Writing goes unit by unit (the embedding, each layer, the final norm and head),
shard by shard, into a directory beside the target that takes the target's name when it is complete.
"""

import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from nemoe_jax import sharding
from nemoe_jax.command import progress_bar
from nemoe_jax.config import ModelConfig
from nemoe_jax.errors import UserError
from nemoe_jax.schema import ParamSpec, Tree, declare, leaves, unflatten
from nemoe_jax.tensor_file import TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 2_000_000_000
TOKENIZER_FILES = (
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
)
_PROBLEMS_SHOWN = 20


class TensorRef(NamedTuple):
    """One checkpoint tensor: a spec and the index into its stacked axes."""

    spec: ParamSpec
    place: tuple[int, ...]
    key: str


def read_config(directory: str | Path) -> ModelConfig:
    """The config.json of a model directory.

    Raises:
        UserError: not a model directory, or a model that this package does not know.
    """
    path = Path(directory) / "config.json"
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such directory")
    if not path.is_file():
        raise UserError(f"{directory}: not a model directory: no config.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    return ModelConfig.from_hf(content, str(path))


class Checkpoint:
    """The tensors of a model directory, checked against the schema of its config."""

    def __init__(self, directory: str | Path):
        """Reads config.json and every header.

        Raises:
            UserError: anything missing, unexpected, misshapen or damaged; tensors are listed together.
        """
        self.directory = Path(directory)
        self.config = read_config(directory)
        files = [TensorFile(path) for path in self._paths()]
        self.files = {name: file for file in files for name in file.entries}
        self._check()

    def _paths(self) -> list[Path]:
        index = self.directory / INDEX
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{index}: not an index of safetensors shards ({error!r})") from error
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise UserError(f"{self.directory}: missing shard {', '.join(missing)} (listed in {INDEX})")
            return [self.directory / name for name in names]
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.directory.glob(pattern))
        if pickles:
            raise UserError(
                f"{self.directory}: only pickle files ({pickles[0]}), which can run code when they are opened; "
                "save the model as safetensors first"
            )
        raise UserError(f"{self.directory}: no weights: neither {SINGLE} nor {INDEX}")

    def _check(self) -> None:
        wanted = {ref.key: ref.spec for ref in itertools.chain.from_iterable(units(self.config))}
        problems = [f"missing {key} {spec.torch_shape}" for key, spec in wanted.items() if key not in self.files]
        for key, file in self.files.items():
            shape = file.entries[key].shape
            if key not in wanted:
                # what transformers, too, ignores: a copy of tied embeddings, old RoPE buffers
                if not (key.endswith("rotary_emb.inv_freq") or (self.config.tied and key == "lm_head.weight")):
                    problems.append(f"unexpected {key} {shape} in {file.path.name}")
            elif shape != wanted[key].torch_shape:
                spec = wanted[key]
                problems.append(
                    f"{spec.path}: wanted {key} of shape {spec.torch_shape}, got {shape} from {file.path.name}"
                )
        if problems:
            more = f"; and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
            raise UserError(f"{self.directory}: " + "; ".join(problems[:_PROBLEMS_SHOWN]) + more)

    def view(self, key: str) -> np.ndarray:
        """A tensor as it stands on disk, mapped."""
        return self.files[key].view(key)

    def read(self, spec: ParamSpec, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """Part of a leaf in the schema's layout, copied from disk: `leaf[index]`."""
        spans = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
        block = np.empty([len(span) for span in spans], dtype)
        stacked = len(spec.stacked)
        inner = spec.shape[stacked:]
        inputs = len(spec.contracted)
        for place, key in _positions(spec, spans[:stacked]):
            tensor = self.view(key)
            if spec.transposed:  # (produced…, contracted…) on disk
                tensor = tensor.reshape(*inner[inputs:], *inner[:inputs])
                tensor = tensor.transpose(*range(len(inner) - inputs, len(inner)), *range(len(inner) - inputs))
            block[place] = tensor[index[stacked:]]
        return block


def _positions(spec: ParamSpec, spans: list[range]) -> Iterable[tuple[tuple[int, ...], str]]:
    """(place in a block, checkpoint key) of the tensors whose stacked indices lie within `spans`."""
    for numbers, key in spec.tensors():
        if all(number in span for number, span in zip(numbers, spans, strict=True)):
            yield tuple(number - span.start for number, span in zip(numbers, spans, strict=True)), key


def load(
    directory: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = None,
    rules: sharding.Rules = sharding.RULES,
    progress: bool = False,
) -> tuple[ModelConfig, Tree]:
    """Config and parameters of a model directory, each array on its devices (without a mesh: the first one).

    Args:
        dtype: dtype of the arrays; the config's own by default.
        progress: show a progress bar on a terminal.

    Raises:
        UserError: see `Checkpoint`; or the mesh does not fit the model.
    """
    checkpoint = Checkpoint(directory)
    placed = leaves(sharding.shardings(checkpoint.config, mesh, rules))
    dtype = jnp.dtype(dtype or checkpoint.config.dtype)
    params = {}
    with progress_bar(visible=progress) as bar:
        specs = leaves(declare(checkpoint.config))
        for path, spec in bar.track(specs.items(), description=f"loading {Path(directory).name}"):
            params[path] = _load_leaf(checkpoint, spec, placed[path], dtype)
    return checkpoint.config, unflatten(params)


def _load_leaf(checkpoint: Checkpoint, spec: ParamSpec, placed: jax.sharding.Sharding, dtype: Any) -> jax.Array:
    devices_of: dict[Any, list[jax.Device]] = {}  # replicas share one read
    indices = placed.addressable_devices_indices_map(spec.shape)
    for device, index in indices.items():
        assert index is not None  # every addressable device holds a part
        key = tuple(part.indices(size) for part, size in zip(index, spec.shape, strict=True))
        devices_of.setdefault(key, []).append(device)
    shards: dict[jax.Device, jax.Array] = {}
    for key, devices in devices_of.items():
        block = checkpoint.read(spec, tuple(slice(*part) for part in key), dtype)
        shards |= {device: jax.device_put(block, device) for device in devices}
    return jax.make_array_from_single_device_arrays(spec.shape, placed, [shards[device] for device in indices])


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


def save(
    directory: str | Path,
    config: ModelConfig,
    params: Tree,
    *,
    tokenizer_from: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model directory; complete or not at all.

    Args:
        tokenizer_from: a directory whose tokenizer files are carried along.
        dtype: dtype on disk; the config's own by default.
        shard_bytes: a shard takes whole layers up to about this size, and at least one.

    Raises:
        UserError: the directory exists already.
    """
    config = config.replace(dtype=dtype or config.dtype)
    flat = leaves(params)
    by_unit = units(config)

    def produce(unit: int) -> dict[str, np.ndarray]:
        tensors = {}
        for path, refs in itertools.groupby(by_unit[unit], lambda ref: ref.spec.path):
            group = list(refs)
            layered = "layers" in group[0].spec.stacked
            array = np.asarray(flat[path][group[0].place[0]] if layered else flat[path])
            for ref in group:
                tensors[ref.key] = ref.spec.to_torch(array[ref.place[1:]] if layered else array)
        return tensors

    with Writer(directory, config, shard_bytes) as writer:
        for shard in writer.pending:
            writer.write(shard, {key: tensor for unit in shard.units for key, tensor in produce(unit).items()})
        writer.finish(tokenizer_from)


def refuse_existing(directory: str | Path) -> None:
    """Raises UserError where something has that name: nothing is ever overwritten."""
    if Path(directory).exists():
        raise UserError(f"{directory}: exists already; choose another name or remove it")


class Shard(NamedTuple):
    """A file of the checkpoint and the units in it."""

    name: str
    units: tuple[int, ...]


class Writer:
    """Writes a model directory shard by shard, in `.NAME.partial` beside the target, renamed when finished.

    With `state` (all that the job depends on, `shard_bytes` too) the finished shards of an interrupted job are kept
    and found again by the next Writer with the same state; without it, or when the input is bad, nothing is left.
    """

    def __init__(
        self,
        directory: str | Path,
        config: ModelConfig,
        shard_bytes: int = SHARD_BYTES,
        state: dict[str, Any] | None = None,
    ):
        self.target = Path(directory)
        self.partial = self.target.parent / f".{self.target.name}.partial"
        self.config, self.state = config, state
        self.shards = _plan_shards(config, shard_bytes)
        refuse_existing(self.target)
        if state is None or self._found_state() != state:
            shutil.rmtree(self.partial, ignore_errors=True)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.partial}: {error.strerror}") from error
        if state is not None:
            (self.partial / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def _found_state(self) -> Any:
        try:
            return json.loads((self.partial / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def pending(self) -> list[Shard]:
        """The shards that are still to be written."""
        return [shard for shard in self.shards if not (self.partial / shard.name).exists()]

    def write(self, shard: Shard, tensors: dict[str, np.ndarray]) -> None:
        """Writes one shard; tensors are cast to the config's dtype."""
        dtype = jnp.dtype(self.config.dtype)
        unfinished = self.partial / (shard.name + ".unfinished")
        save_file(
            {key: np.ascontiguousarray(tensor, dtype) for key, tensor in tensors.items()}, unfinished, {"format": "pt"}
        )
        unfinished.chmod(self.partial.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
        unfinished.rename(self.partial / shard.name)

    def finish(self, tokenizer_from: str | Path | None = None) -> None:
        """Writes config.json and the index, carries the tokenizer along, and gives the directory its name."""
        if len(self.shards) > 1:
            by_unit = units(self.config)
            weight_map = {ref.key: shard.name for shard in self.shards for unit in shard.units for ref in by_unit[unit]}
            itemsize = jnp.dtype(self.config.dtype).itemsize
            total = sum(ref.spec.torch_size for refs in by_unit for ref in refs) * itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.partial / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        if tokenizer_from is not None:
            carry_tokenizer(tokenizer_from, self.partial)
        (self.partial / "config.json").write_text(json.dumps(self.config.to_hf(), indent=2) + "\n", encoding="utf-8")
        (self.partial / "state.json").unlink(missing_ok=True)
        self.partial.rename(self.target)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        keep = self.state is not None and kind is not None and not issubclass(kind, UserError)
        if kind is not None and not keep:
            shutil.rmtree(self.partial, ignore_errors=True)


def carry_tokenizer(source: str | Path, directory: Path) -> None:
    """Copies the tokenizer, chat template and generation settings of a model directory."""
    for pattern in TOKENIZER_FILES:
        for path in sorted(Path(source).glob(pattern)):
            shutil.copyfile(path, directory / path.name)


def _plan_shards(config: ModelConfig, shard_bytes: int) -> list[Shard]:
    itemsize = jnp.dtype(config.dtype).itemsize
    groups: list[list[int]] = []
    filled = 0
    for unit, refs in enumerate(units(config)):
        size = sum(ref.spec.torch_size for ref in refs) * itemsize
        if not groups or filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += size
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    count = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", tuple(group)) for number, group in enumerate(groups, 1)
    ]
