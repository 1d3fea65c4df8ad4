"""A tiny workplace for training runs: byte-level tokenizer, dense and mixture models, text; and recipes over it."""

import base64
import json
from pathlib import Path

import jax
import numpy as np
import yaml

from nemoe_jax.checkpoints import pretrained
from nemoe_jax.spec import schema
from nemoe_jax.spec.config import ModelConfig

CONTROL = 20
SHAPE = {"hidden": 24, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 10, "context": 64}
DENSE = ModelConfig(family="mistral", vocab=CONTROL + 256, ffn=40, dtype="float32", **SHAPE)
MIXTURE = DENSE.replace(family="mixtral", ffn=0, experts=4, top_k=2, expert_ffn=12)
TEXT = [f"{number} and {number} are {2 * number}; all sums are even.\n" * 3 for number in range(30)]


def random_params(config: ModelConfig, seed: int = 0):
    """Parameters from NumPy's generator, which has nothing to compile."""
    rng = np.random.default_rng(seed)

    def make(spec):
        return np.ones(spec.shape, "f4") if spec.std is None else np.float32(rng.normal(size=spec.shape) * spec.std)

    return jax.tree.map(make, schema.declare(config))


def make_workplace(place: Path) -> None:
    """Writes tokenizer, models and text into a directory."""
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"] + [f"<SPECIAL_{number}>" for number in range(5, CONTROL)]
    vocab = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    config = {
        "pattern": r"[^\s]+|\s+",
        "num_vocab_tokens": 256,
        "default_vocab_size": CONTROL + 256,
        "default_num_special_tokens": CONTROL,
        "version": "v3",
    }
    special = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)]
    (place / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": special}))
    for name, model in (("dense", DENSE), ("mixture", MIXTURE), ("other", DENSE.replace(vocab=300))):
        params = random_params(model)
        if model.experts:  # as small as carving leaves it
            params["blocks"]["moe"]["ffn"]["router"] *= 1e-3
        pretrained.save_pretrained(place / name, model, params)
        (place / name / "tekken.json").write_bytes((place / "tekken.json").read_bytes())
    (place / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT[3:]))
    (place / "held_out.txt").write_text("".join(TEXT[:3]))


def write_recipe(path: Path, workplace: Path, name: str, **keys) -> Path:
    """A recipe over the workplace: "scratch", or "repair" of the mixture; further keys replace its own."""
    recipe = {
        "output": "out",
        "steps": 8,
        "eval_batches": 2,
        "data": {
            "cache": str(workplace / "cache"),
            "train": str(workplace / "train.jsonl"),
            "held_out": str(workplace / "held_out.txt"),
            "sequence_length": 32,
            "batch_size": 4,
        },
        "optimizer": {"learning_rate": "1e-2", "warmup_steps": 2, "schedule": "linear"},
    }
    if name == "scratch":
        recipe |= {"trainable": "all", "scratch": SHAPE | {"ffn": 40}, "tokenizer": str(workplace / "tekken.json")}
    else:
        recipe |= {
            "model": str(workplace / "mixture"),
            "train_router": True,
            "lora": [{"pattern": "blocks/*/attn/*", "rank": 3}, {"pattern": "blocks/moe/ffn/[gud]*", "rank": 2}],
            "distill": {"teacher": str(workplace / "dense")},
        }
    path.write_text(yaml.safe_dump(recipe | keys))
    return path


def log_of(output: Path) -> list[dict]:
    """The lines of a run's log, without what depends on the clock."""
    clocks = ("seconds", "tokens_per_second", "memory_gb", "mfu")
    lines = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]
