"""The adapters that an engine serves, by name: all from the start, or loaded and unloaded while it runs.

Where adapters come and go, the stack (multi_lora.py) has a fixed number of places of a fixed rank, so that its shapes,
and with them the compiled programs, stay the same. An adapter that is unloaded cannot be asked for any more; its place
is free when nobody uses it.
"""

import dataclasses
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nemoe_jax.adapters import lora
from nemoe_jax.adapters.multi_lora import empty_stack, put_adapter, stack_adapters
from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import ModelConfig
from nemoe_jax.spec.schema import Tree, leaves


class AdapterPlaces(NamedTuple):
    """Room for adapters that are loaded while the engine runs."""

    number: int = 4
    rank: int = 16
    targets: Sequence[str] = ("blocks/*",)  # patterns of the weights that they may change


@dataclasses.dataclass(eq=False)
class LoadedAdapter:
    """An adapter in the stack.

    number: its place there; key: a hash of its content; users: what uses it, until their `finished` says so.
    """

    name: str
    number: int
    key: bytes
    users: list[Any] = dataclasses.field(default_factory=list)

    @property
    def in_use(self) -> bool:
        """Whether somebody uses it."""
        return any(not one.finished for one in self.users)


class LoadedAdapters:
    """Adapters by name, and the stack of them all.

    Args:
        adapters: those from the start.
        places: for those that come later; None: there are none.
        dtype: of the stack.

    stacked: what `multi_lora.select_adapters` takes; None where there can be no adapter. Another one after each change.

    Raises:
        UserError: an adapter that does not fit the model, or the places.
    """

    def __init__(
        self,
        config: ModelConfig,
        adapters: Mapping[str, Tree],
        places: AdapterPlaces | None,
        dtype: jax.typing.DTypeLike,
        mesh: Mesh | None = None,
    ):
        self.config, self.places = config, places
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._by_name: dict[str, LoadedAdapter] = {}
        self._leaving: list[LoadedAdapter] = []
        self.stacked: Tree | None = None
        if places is None:
            self.stacked = stack_adapters(config, adapters, dtype) if adapters else None
            for number, (name, tree) in enumerate(adapters.items()):
                self._by_name[name] = LoadedAdapter(name, number, content_key(tree))
            return
        for what, value in {"adapters at a time": places.number, "adapter rank": places.rank}.items():
            if value < 1:
                raise UserError(f"{what}: expected a positive number, got {value}")
        specs = lora.match(config, [lora.Target(pattern, 1, 1) for pattern in places.targets])
        self.stacked = empty_stack(config, list(specs), places.number, places.rank, dtype, mesh)
        for name, tree in adapters.items():
            self.load(name, tree)

    @property
    def names(self) -> tuple[str, ...]:
        """Those that can be asked for."""
        return tuple(self._by_name)

    def find(self, name: str) -> LoadedAdapter:
        """The adapter of that name. Raises UserError."""
        found = self._by_name.get(name)
        if found is None:
            raise UserError(f"no adapter {name!r}; there are: {', '.join(self._by_name) or 'none'}")
        return found

    def load(self, name: str, tree: Tree, replace: bool = False) -> None:
        """Puts an adapter into a free place.

        Args:
            replace: one of that name is unloaded.

        Raises:
            UserError: the name is taken, there is no place, or the adapter does not fit.
        """
        if self.places is None:
            raise UserError("adapters cannot be loaded while this engine runs")
        with self._loading:
            with self._lock:
                if name in self._by_name and not replace:
                    raise UserError(f"the adapter {name!r} is loaded already")
                self._leaving = [one for one in self._leaving if one.in_use]
                taken = {one.number for one in (*self._by_name.values(), *self._leaving)}
            free = next((number for number in range(self.places.number) if number not in taken), None)
            if free is None:
                busy = f", {len(self._leaving)} of them by adapters that are unloaded and still used"
                raise UserError(f"all {self.places.number} places for adapters are taken" + busy * bool(self._leaving))
            assert self.stacked is not None
            self.stacked = put_adapter(self.config, self.stacked, free, tree)
            loaded = LoadedAdapter(name, free, content_key(tree))
            with self._lock:
                if name in self._by_name:
                    self._leaving.append(self._by_name[name])
                self._by_name[name] = loaded

    def unload(self, name: str) -> None:
        """Nobody can ask for it any more; those who did go on. Raises UserError."""
        if self.places is None:
            raise UserError("adapters cannot be unloaded while this engine runs")
        with self._lock:
            self._leaving.append(self.find(name))
            del self._by_name[name]

    def use(self, name: str, user: Any) -> LoadedAdapter:
        """The adapter of that name, for a user. Raises UserError."""
        with self._lock:
            found = self.find(name)
            found.users = [*(one for one in found.users if not one.finished), user]
        return found


def content_key(tree: Tree) -> bytes:
    """A hash of an adapter's values; no two are the same where another process has some of them."""
    digest = hashlib.blake2b(digest_size=16)
    for path, adapter in leaves(tree).items():
        digest.update(f"{path} {adapter.scale!r}".encode())
        for array in (adapter.a, adapter.b):
            if not getattr(array, "is_fully_addressable", True):
                return os.urandom(16)
            values = np.asarray(array)
            digest.update(f"{values.shape} {values.dtype}".encode() + values.tobytes())
    return digest.digest()
