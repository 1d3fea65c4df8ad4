"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: adapters at run time, with vLLM's fields.

Only where the server was started with a folder of adapters, from which alone they are loaded: links are followed, and
what they lead to must be in the folder as well.
"""

from pathlib import Path

from pydantic import Field

from nemoe_jax.adapters import peft_load
from nemoe_jax.serving.api.api_keys import Caller
from nemoe_jax.serving.api.errors import ApiError
from nemoe_jax.serving.api.requests import StrictModel
from nemoe_jax.serving.api.served_model import ServedModel


class LoadLoraAdapter(StrictModel):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1, max_length=256, description="what requests will give as model")
    lora_path: str = Field(min_length=1, description="a directory in the server's folder of adapters")
    load_inplace: bool | None = Field(None, description="an adapter of that name is replaced")


class UnloadLoraAdapter(StrictModel):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = Field(None, description="no effect")


def load(served: ServedModel, asked: LoadLoraAdapter, caller: Caller) -> str:
    """Says what was done.

    Raises:
        ApiError: adapters are not loaded here, or not by this caller, or not from there, or the name is taken.
        UserError: no adapter, one that does not fit, or no room for it.
    """
    folder = _allowed(served, caller)
    if asked.lora_name == served.name or (asked.lora_name in served.adapters and not asked.load_inplace):
        raise ApiError(400, f"lora_name: the name {asked.lora_name!r:.80} is taken", "lora_name", "invalid_value")
    path = inside(folder, asked.lora_path)
    _, tree = peft_load.load_adapters(path, served.config, served.engine.mesh)
    served.engine.load_adapter(asked.lora_name, tree, replace=bool(asked.load_inplace))
    return f"Success: LoRA adapter '{asked.lora_name}' added successfully."


def unload(served: ServedModel, asked: UnloadLoraAdapter, caller: Caller) -> str:
    """Says what was done; requests that use the adapter are finished. Raises ApiError."""
    _allowed(served, caller)
    if asked.lora_name not in served.adapters:
        message = f"lora_name: no adapter {asked.lora_name!r:.80} is loaded"
        raise ApiError(404, message, "lora_name", "model_not_found")
    served.engine.unload_adapter(asked.lora_name)
    return f"Success: LoRA adapter '{asked.lora_name}' removed successfully."


def inside(folder: Path, name: str) -> Path:
    """The directory of that name in the folder, links followed; nothing in it may lead out of the folder.

    Raises:
        ApiError: it does; the message does not tell whether there is something.
    """
    root = folder.resolve()
    outside = ApiError(400, "lora_path: expected a directory in the server's adapter folder", "lora_path")
    try:
        path = (root / name).resolve()
        if path == root or not path.is_relative_to(root) or not path.is_dir():
            raise outside
        wrong = [one.name for one in path.iterdir() if not one.resolve().is_relative_to(root)]
    except (OSError, ValueError, RuntimeError):  # too long, a null character, links in a circle
        raise outside from None
    if wrong:
        raise ApiError(400, f"lora_path: {wrong[0]} leads out of the server's adapter folder", "lora_path")
    return path


def _allowed(served: ServedModel, caller: Caller) -> Path:
    if served.adapter_folder is None:
        message = "adapters cannot be loaded here: the server was started without --adapter-folder"
        raise ApiError(404, message, code="not_enabled")
    if not caller.account.key.adapters:
        raise ApiError(403, "this API key may not load or unload adapters", code="permission_denied")
    return served.adapter_folder
