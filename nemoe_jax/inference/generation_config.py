"""A model's `generation_config.json`: more end tokens, and how its makers advise to sample.

As vLLM does it: the end tokens of the file end a response as well as those of config.json and of the tokenizer (Llama 3
Instruct names `<|eot_id|>` here alone), and its sampling values hold where nothing else is said.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemoe_jax.errors import UserError
from nemoe_jax.inference.sampling import SamplingParams
from nemoe_jax.utils.json_file import read_json

if TYPE_CHECKING:
    from nemoe_jax.spec.config import ModelConfig

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What the file says.

    end_tokens: ids that end a response.
    sampling: fields of `SamplingParams`.
    """

    end_tokens: tuple[int, ...] = ()
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)

    def with_end_tokens(self, config: "ModelConfig") -> "ModelConfig":
        """The model's config with these end tokens besides its own."""
        own = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
        every = dict.fromkeys([*(token for token in own if token is not None), *self.end_tokens])
        return config.replace(eos_token_id=tuple(every)) if self.end_tokens else config

    def described(self, given: tuple[str, ...] = ()) -> str:
        """What is taken from the file, for people to read; `given` are fields that the user chose instead."""
        words = [f"{name} {value:g}" for name, value in self.sampling.items() if name not in given]
        if self.end_tokens:
            words.append(f"end tokens {', '.join(map(str, self.end_tokens))}")
        return f"{FILE}: {', '.join(words)}" if words else ""


def read_generation_config(directory: str | Path) -> GenerationConfig:
    """The file of a model directory; an empty one where there is none.

    Raises:
        UserError: a value of another kind, or out of its range.
    """
    from nemoe_jax.checkpoints.gguf.directory import model_directory  # NumPy, which no help needs

    path = model_directory(directory) / FILE
    if not path.is_file():
        return GenerationConfig()
    values = read_json(path)
    ends = values.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) and end >= 0 for end in ends):
        raise UserError(f"{path}: eos_token_id: expected a token id or a list of them, got {ends!r:.80}")
    sampling = {name: values[name] for name in SAMPLING if values.get(name) is not None}
    if sampling.get("top_k") == -1:  # vLLM's word for all
        sampling["top_k"] = 0
    if values.get("do_sample") is True:
        sampling = {"temperature": 1.0, **sampling}  # transformers' default
    try:
        SamplingParams(**sampling)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return GenerationConfig(tuple(ends), sampling)
