"""A LoRA training step against transformers + PEFT, on the same weights, adapters and tokens.

    python -m benchmarks.train.train_step                  (CPU, float32, a small Mixtral; three minutes)
    python -m benchmarks.train.train_step --device gpu     (the 12B with 16 experts, bfloat16, random weights)
    python -m benchmarks.train.train_step --model runs/demo/calibrated --text runs/demo/text/train.jsonl --counts 0.5
        (chats: half of the tokens carry loss; with --teacher runs/demo/dense, distillation by KL)

Named peer: transformers with PEFT (attention's modules, the fused experts as target_parameters), torch's AdamW and
torch's clipping. Each runs in a process of its own; on CPU they take steps in turn, on a GPU they have it one after the
other. Both get the same A and B = 0, so the losses of the first two steps must agree; then they part a little, since
PEFT has one A for gate and up, and we one each. Limits: tokens per second 1.5 times the peer's; executed over model
FLOPs at most 1.45 with every block recomputed. On a machine that does other work as well, give it one core of its own
(taskset -c 1) and go by the ratio of CPU time: with more cores the peer's threads wait for each other actively.

Executed FLOPs are read from the compiled program. The loops over the experts' tiles have trip counts that depend on the
routing: their products are counted as if every expert's last tile were half full. What adds an expert's adapters to its
weights is counted with them, which is a little too much.

The limit of speed is not reached on CPU. On one core a step takes 4.1 to 4.3 s of CPU time, against 2.6 for its model
FLOPs at the rate of a large product (108e9 a second): the head takes 1.5 (1.25 at that rate), the experts 1.0 (0.6),
attention's projections 0.5 (0.5), its core 0.55 (0.25); what is left is first touches of memory, residuals that are
stacked and taken apart, exponentials and the adapters of attention.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib.results import add_keep, keep, machine
from benchmarks.lib.sides import AGREEMENT, Step, Worker, batch_of, measure, serve, show

SPEED_LIMIT, FLOPS_LIMIT = 1.5, 1.45
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 1e-3
ADAPTED = ("attn/*", "ffn/gate", "ffn/up", "ffn/down")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")


def model_config(device: str, vocab: int) -> Any:
    """The small Mixtral, or the 12B."""
    from nemoe_jax.spec.config import ModelConfig, preset

    if device == "gpu":
        return preset("nemoe-12b-16e")
    return ModelConfig(
        family="mixtral",
        hidden=512,
        layers=8,
        heads=8,
        kv_heads=4,
        head_dim=64,
        vocab=vocab,
        experts=16,
        top_k=4,
        expert_ffn=128,
        context=2048,
        dtype="float32",
    )


def targets() -> list[Any]:
    """What is adapted."""
    from nemoe_jax.adapters.lora import Target

    return [Target(f"blocks/*/{pattern}", RANK, ALPHA) for pattern in ADAPTED]


def prepare(directory: Path, options: argparse.Namespace) -> None:
    """Writes a model, tokens and the adapters' A."""
    import jax
    import numpy as np

    from nemoe_jax.adapters import lora
    from nemoe_jax.checkpoints import pretrained, reader
    from nemoe_jax.spec import schema

    if options.model:
        config = reader.read_config(options.model)
        (directory / "model").symlink_to(options.model.absolute())
    else:
        config = model_config(options.device, options.vocab)
        params = schema.initialize(config, jax.random.key(0), config.dtype)
        pretrained.save_pretrained(directory / "model", config, params)
    adapters = schema.leaves(lora.initialize(config, targets(), jax.random.key(1)))
    first = {path: np.asarray(adapter.a) for path, adapter in adapters.items()}
    first["blocks/moe/ffn/up"] = first["blocks/moe/ffn/gate"]  # PEFT has one for both
    np.savez(directory / "adapters.npz", **first)
    rng = np.random.default_rng(0)
    count = options.rows * (options.length + 1)
    tokens = rng.integers(0, config.vocab, count) if options.text is None else text_tokens(options, count)
    np.save(directory / "tokens.npy", tokens.reshape(options.rows, -1).astype(np.int32))
    np.save(directory / "mask.npy", chat_mask(options.rows, options.length, options.counts, rng))


def text_tokens(options: argparse.Namespace, count: int) -> Any:
    """The first tokens of a .jsonl file of texts."""
    import numpy as np

    from nemoe_jax.text.tokenizers.load import load_tokenizer

    tokenizer, tokens = load_tokenizer(options.model), list[int]()
    for line in options.text.read_text("utf-8").splitlines():
        tokens += tokenizer.encode_document(json.loads(line)["text"])
        if len(tokens) >= count:
            return np.array(tokens[:count])
    raise SystemExit(f"{options.text}: expected {count} tokens, got {len(tokens)}")


def chat_mask(rows: int, length: int, share: float, rng: Any) -> Any:
    """Which targets count: turns of 20 to 200 tokens of who asks and who answers, the latter's in that share."""
    import numpy as np

    mask = np.zeros((rows, length), np.float32)
    for row in mask:
        at = 0
        while at < length:
            turn = int(rng.integers(20, 200))
            asked = round(turn * (1 - share))
            row[at + asked : at + turn] = 1
            at += turn
    return mask


def our_side(directory: Path, options: argparse.Namespace, **keys: Any) -> tuple[Any, Any, Any, Any, Callable]:
    """(recipe, config, state, frozen, objective → update before it is compiled); `keys`: more of the recipe's phase."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nemoe_jax.adapters import lora
    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.spec import schema
    from train.recipe import Recipe
    from train.step.optimizer import learning_rate_schedule, make_optimizer
    from train.step.step import initial_state, make_update, split

    config, params = pretrained.load_pretrained(directory / "model")
    recipe = Recipe.model_validate(
        {
            "output": directory / "out",
            "model": directory / "model",
            "dtype": config.dtype,
            "remat": options.remat,
            "phases": [
                {
                    "lora": [{"pattern": one.pattern, "rank": one.rank, "alpha": one.alpha} for one in targets()],
                    "data": {"train": "-", "sequence_length": options.length, "batch_size": options.rows},
                    "optimizer": {"learning_rate": LEARNING_RATE, "schedule": "constant"},
                    "steps": 1,
                    **keys,
                }
            ],
        }
    )
    phase = recipe.phases[0]
    saved = np.load(directory / "adapters.npz")
    adapters = schema.map_with_path(
        lambda path, adapter: lora.Adapter(jnp.asarray(saved[path]), adapter.b, adapter.scale),
        lora.initialize(config, targets(), jax.random.key(1)),
    )
    trained, frozen = split(params, lambda path: False, config.dtype)
    optimizer = make_optimizer(phase.optimizer, phase.steps)
    schedule = learning_rate_schedule(phase.optimizer, phase.steps)
    state = initial_state({"params": trained, "adapters": adapters}, optimizer, 0)
    return recipe, config, state, frozen, lambda objective: make_update(objective, optimizer, schedule, state)


def ours(directory: Path, options: argparse.Namespace) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """Our step; and what is to be said of it."""
    import jax
    import numpy as np

    from nemoe_jax.checkpoints import pretrained
    from train.plan import hlo
    from train.step import model_flops
    from train.step.step import Objective

    distill = {"teacher": options.teacher} if options.teacher else None
    recipe, config, state, frozen, make_update = our_side(directory, options, distill=distill)
    phase = recipe.phases[0]
    tokens = np.load(directory / "tokens.npy")
    batch = batch_of(tokens, np.load(directory / "mask.npy"))

    teacher_config, teacher = pretrained.load_pretrained(options.teacher) if options.teacher else (None, None)

    def compiled(remat: bool, all_count: bool = False) -> Any:
        as_told = recipe.model_copy(update={"remat": remat})
        objective = Objective(as_told, phase, config, teacher_config, all_count=all_count)
        return make_update(objective).lower(state, frozen, teacher, batch).compile()

    update = compiled(options.remat)

    def step() -> float:
        nonlocal state
        state, figures = update(state, frozen, teacher, batch)
        return float(figures["loss"])

    def facts() -> dict[str, Any]:
        model = (
            model_flops.model_flops_per_token(config, options.length, "lora", targets=targets()) * tokens[:, 1:].size
        )
        figures: dict[str, Any] = {"model_flops_per_step": model}
        if options.model:
            return figures
        if options.device == "cpu":
            for name, remat in (("executed_over_model", options.remat), ("executed_over_model_with_remat", True)):
                program = hlo.parse(compiled(remat, all_count=True).as_text())
                figures[name] = executed_flops(program, config, tokens[:, 1:].size) / model
            return figures
        figures["matmul_flops_per_second"] = matmul_rate()
        figures["device_bytes"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        return figures

    return step, facts


def executed_flops(program: Any, config: Any, tokens: int, filled: float | None = None) -> float:
    """FLOPs of the products of a program compiled for CPU; see the module's docstring.

    Args:
        filled: rows of all tiles; by default as if every expert's last one were half full.
    """
    from nemoe_jax.kernels.grouped_matmul.cpu import tile_rows
    from train.plan.hlo_flops import executed_flops

    # Each loop over an expert's tiles is there twice, for large and for small ones. Their bodies are counted once each,
    # and are proportional to their rows.
    in_tiles: set[str] = set()
    for name, instruction in program:
        if name in in_tiles or (instruction.opcode == "while" and program.trip_count(name, instruction) == 1):
            in_tiles.update(instruction.called)
    whole = executed_flops(program)
    for name in in_tiles:
        program.times[name] = 0
    rest = executed_flops(program)
    rows = tokens * config.top_k
    small = tile_rows(rows, config.experts)
    filled = rows + config.experts * small / 2 if filled is None else filled
    return rest + (whole - rest) * filled / (min(4 * small, rows) + small)


def matmul_rate() -> float:
    """FLOPs per second of a large product in bfloat16."""
    import jax
    import jax.numpy as jnp

    size = 8192
    x = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def peer_side(directory: Path, options: argparse.Namespace) -> tuple[Any, Any, list[Any]]:
    """(PEFT's model, its optimizer, the weights that it trains), with our adapters."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    place = "cuda" if options.device == "gpu" else "cpu"
    base = AutoModelForCausalLM.from_pretrained(directory / "model", dtype="auto").to(place)
    base.config.use_cache = False
    if options.remat:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    model = get_peft_model(
        base,
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    )
    model.train()
    saved = np.load(directory / "adapters.npz")
    for name, weight in model.named_parameters():
        if ".lora_A." in name:
            layer = int(name.partition(".layers.")[2].partition(".")[0])
            if ".experts." in name:
                path = "ffn/gate" if weight.shape[1] == base.config.hidden_size else "ffn/down"
                first = saved[f"blocks/moe/{path}"][layer].swapaxes(1, 2)  # expert-major
            else:
                first = saved[f"blocks/moe/attn/{name.partition('self_attn.')[2][0]}"][layer]
                first = first.reshape(-1, RANK).T
            weight.data.copy_(torch.from_numpy(np.ascontiguousarray(first.reshape(weight.shape))))
        elif ".lora_B." in name:
            assert not weight.data.any()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    return model, optimizer, trained


def peer(directory: Path, options: argparse.Namespace) -> tuple[Step, Callable[[], dict[str, Any]]]:
    """The step of transformers + PEFT; and what is to be said of it."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    place = "cuda" if options.device == "gpu" else "cpu"
    model, optimizer, trained = peer_side(directory, options)
    tokens = torch.from_numpy(np.load(directory / "tokens.npy")).long().to(place)
    mask = torch.from_numpy(np.load(directory / "mask.npy")).to(place)
    labels = torch.where(mask > 0, tokens[:, 1:], -100).flatten()
    teacher = None
    if options.teacher:
        teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="auto").to(place).eval()
        teacher.config.use_cache = False

    def loss_of(logits: Any) -> Any:
        if teacher is None:
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels)
        with torch.no_grad():
            expected = torch.log_softmax(teacher(input_ids=tokens[:, :-1]).logits.float(), -1)
        own = torch.log_softmax(logits.float(), -1)
        kl = torch.nn.functional.kl_div(own, expected, log_target=True, reduction="none").sum(-1)
        return (kl * mask).sum() / mask.sum()

    def step() -> float:
        loss = loss_of(model(input_ids=tokens[:, :-1]).logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def facts() -> dict[str, Any]:
        return {"device_bytes": torch.cuda.max_memory_allocated()} if place == "cuda" else {}

    return step, facts


def main() -> None:
    """Prepares, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="default: cpu")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each, after two to warm up; default: 5")
    parser.add_argument("--rows", type=int, default=4, help="rows of tokens; default: 4")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row; default: 512")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary of the small model; default: 32000")
    parser.add_argument("--model", type=Path, help="an MoE model's directory, instead of random weights")
    parser.add_argument("--text", type=Path, help="with --model: .jsonl of texts, instead of random tokens")
    parser.add_argument("--teacher", type=Path, help="with --model: a dense model's directory, to distill from by KL")
    parser.add_argument("--counts", type=float, default=1.0, help="share of the tokens that carry loss; default: 1")
    parser.add_argument("--remat", action="store_true", help="both recompute each block in the backward pass")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    add_keep(parser)
    parser.add_argument("--role", choices=("prepare", "ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "prepare":
        return prepare(options.directory, options)
    if options.role:
        return serve(*{"ours": ours, "peer": peer}[options.role](options.directory, options))
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            return print(f"skipped: {name} is not installed")
    if options.device == "gpu":
        import torch

        if not torch.cuda.is_available():
            return print("skipped: no GPU that torch can use")
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if Worker("prepare", directory, arguments, __spec__.name).process.wait():
            raise SystemExit("the model could not be written")
        figures = {**measure(directory, options, arguments, __spec__.name), **machine(PACKAGES)}
    figures["options"] = {
        key: getattr(options, key) for key in ("device", "rows", "length", "vocab", "counts", "remat", "steps")
    }
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        show(figures, SPEED_LIMIT)
        for key in ("executed_over_model", "executed_over_model_with_remat"):
            if key in figures["ours"]:
                limit = f" (limit {FLOPS_LIMIT})" if key.endswith("remat") else ""
                print(f"{key.replace('_', ' ')} FLOPs {figures['ours'][key]:.3f}{limit}")
    if options.keep:
        keep(f"train_step-{options.device}", figures)
    slow = figures["ratio"] < SPEED_LIMIT or figures["ours"].get("executed_over_model_with_remat", 0) > FLOPS_LIMIT
    sys.exit(slow or (options.device == "cpu" and figures["first_losses_differ_by"] > AGREEMENT))


if __name__ == "__main__":
    main()
