"""Recipes from YAML: overrides, what stands at the top for all phases, and errors that name the key.

The fields of the sections are the only list of keys: `nemoe-train keys` prints their descriptions, and the nearest of
them is what an unknown key is answered with.
"""

import difflib
import importlib.resources
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from nemoe_jax.errors import UserError
from train.recipe.run import Phase, Recipe
from train.recipe.sections import Section

Tree = dict[str, Any]
FORMER_KEYS = {"accumulation": "gradient_accumulation_steps"}  # which go on working for this release


def shipped_recipes() -> dict[str, str]:
    """Name → text of the recipes that come with the package."""
    files = {file.name: file for file in importlib.resources.files("train").joinpath("recipes").iterdir()}
    return {name.removesuffix(".yaml"): files[name].read_text("utf-8") for name in sorted(files)}


def read_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, overrides and validates a recipe.

    Args:
        name: a YAML file, or the name of a shipped recipe with or without `.yaml`.
        overrides: `dotted.key=value`, the value in YAML; `lora.0.rank=8` reaches into lists.
    Raises:
        UserError: no such file, not a mapping, unknown key (with the nearest known one), bad or missing value.
    """
    path, shipped = Path(name), shipped_recipes()
    text = shipped.get(str(name).removesuffix(".yaml"))
    if not path.is_file() and text is None:
        raise UserError(f"{name}: no such recipe file, and the shipped recipes are {', '.join(shipped)}")
    try:
        tree = _apart(yaml.safe_load(path.read_bytes() if path.is_file() else text or "") or {})
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        raise UserError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{name}: expected a mapping of keys, got {type(tree).__name__}")
    tree = _renamed(tree, str(name))
    overridden = [_override(tree, override) for override in overrides]
    try:
        return Recipe.model_validate(_spread(tree))
    except ValidationError as error:
        complaints = dict.fromkeys(_explain(detail, tree, overridden) for detail in error.errors())
        raise UserError(f"{name}: " + "; ".join(complaints)) from error


def _apart(node: Any) -> Any:
    """The same tree without aliases (`*name`): what is set in one place stays as it is in the others."""
    if isinstance(node, dict):
        return {key: _apart(value) for key, value in node.items()}
    return [_apart(value) for value in node] if isinstance(node, list) else node


def _renamed(node: Any, origin: str) -> Any:
    """The same tree with keys by their present names; a former one is said on standard error."""
    if isinstance(node, list):
        return [_renamed(item, origin) for item in node]
    if not isinstance(node, dict):
        return node
    for former in FORMER_KEYS.keys() & node.keys():
        print(f"note: {origin}: {former} is now called {FORMER_KEYS[former]}", file=sys.stderr)
    return {FORMER_KEYS.get(key, key): _renamed(value, origin) for key, value in node.items()}


def _spread(tree: Tree) -> Tree:
    """The tree with every phase complete: what stands at the top holds for each phase that does not say otherwise."""
    shared = {key: value for key, value in tree.items() if key in Phase.model_fields}
    phases = tree.get("phases", [{}])
    if isinstance(phases, list):
        phases = [_merged(shared, phase) if isinstance(phase, dict) else phase for phase in phases]
    return {key: value for key, value in tree.items() if key not in shared} | {"phases": phases}


def _merged(under: Tree, over: Tree) -> Tree:
    """Both mappings, nested ones merged likewise; `over` wins."""
    both = {key: _merged(under[key], value) for key, value in over.items() if _both_mappings(under.get(key), value)}
    return under | over | both


def _both_mappings(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def list_keys() -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field; the items of a list are written `lora.N.rank`. A phase's keys as at the top."""
    for key, field in _keys_of(Recipe):
        if not key.startswith("phases."):
            yield key, field
    yield from _keys_of(Phase)


def _keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if inner := _inner_section(field):
            yield from _keys_of(inner, f"{prefix}{name}.{'N.' if typing.get_origin(field.annotation) is list else ''}")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, defaults included, as YAML that `read_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _inner_section(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds: `Section`, `Section | None` or `list[Section]`."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _override(tree: Tree, override: str) -> str:
    """Sets one `dotted.key=value` in the tree and returns the key; what it sets at the top holds for every phase."""
    key, equals, text = override.partition("=")
    if not (equals and key):
        raise UserError(f"expected key=value after the recipe, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{key}: not a YAML value: {text!r}") from error
    names = key.split(".")
    if names[-1] in FORMER_KEYS:
        print(f"note: {key}: {names[-1]} is now called {FORMER_KEYS[names[-1]]}", file=sys.stderr)
        names[-1] = FORMER_KEYS[names[-1]]
        key = ".".join(names)
    value = _renamed(value, key)
    _assign(tree, names, value, key)
    phases = tree.get("phases")
    for phase in phases if isinstance(phases, list) else []:
        if names[0] != "phases" and _said(phase, names):
            _assign(phase, names, value, key)
    return key


def _said(node: Any, names: Sequence[str | int]) -> bool:
    """Whether the tree has a value at `node[names[0]][names[1]]…`."""
    for name in names:
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and str(name).isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            return False
    return True


def _assign(node: Any, names: Sequence[str], value: Any, key: str) -> None:
    """`node[names[0]][names[1]]… = value`, through mappings (made where missing) and lists."""
    name, *rest = names
    place: Any = name
    if isinstance(node, list):
        if not (name.isdecimal() and int(name) < len(node)):
            raise UserError(f"{key}: expected an index below {len(node)}, got {name!r}")
        place = int(name)
    elif not isinstance(node, dict):
        raise UserError(f"{key}: expected a mapping that holds {name}, got the value {node!r}")
    elif rest and node.get(name) is None:
        node[name] = {}
    if rest:
        _assign(node[place], rest, value, key)
    else:
        node[place] = value


def _explain(detail: Any, tree: Tree, overridden: Sequence[str]) -> str:
    """One of pydantic's errors as `key: expected …, got …`, the key as the file has it."""
    place = list(detail["loc"])
    inner = place[2:] if place[:1] == ["phases"] and len(place) > 1 else place
    if inner is not place and ("phases" not in tree or (inner and not _said(tree, place) and _said(tree, inner[:1]))):
        place = inner
    key = ".".join(map(str, place))
    origin = " (from the command line)" if any(f"{key}.".startswith(f"{name}.") for name in overridden) else ""
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{origin}; the nearest known key is {_nearest(key)}"
    if detail["type"] == "missing":
        known = ".".join("N" if isinstance(part, int) else str(part) for part in inner)
        return f"{key}: missing; expected {dict(list_keys())[known].description}"
    message = detail["msg"].removeprefix("Value error, ")
    if message != detail["msg"]:  # one of the checks above, which name keys and values themselves
        return f"{key}.{message}" if key and re.match(r"[\w.]+: ", message) else f"{key}: {message}".removeprefix(": ")
    wanted = message.replace("Input should be", "expected").replace(", unable to parse string as a number", "")
    wanted = wanted.replace(", unable to parse string as an integer", "")
    return f"{key}: {wanted}, got {detail['input']!r}{origin}"


def _nearest(key: str) -> str:
    """The known key most like this one: by its last name, and then by its place."""
    parent, _, name = key.rpartition(".")

    def likeness(known: str) -> float:
        known_parent, _, known_name = known.rpartition(".")
        same_place = known_parent.replace(".N", "") == "".join(c for c in parent if not c.isdigit()).rstrip(".")
        return difflib.SequenceMatcher(None, name, known_name).ratio() + 0.1 * same_place

    return max((known for known, _ in list_keys()), key=likeness)
