"""A step of the 12B-16E beside MaxText's, both compiled ahead of time by one TPU compiler: no TPU is needed.

    python -m benchmarks.hardware.maxtext_tpu --environment /tmp/maxtext    (LoRA of attention, v5e:4x4, 8192 × 32)
    python -m benchmarks.hardware.maxtext_tpu --environment /tmp/maxtext --step all          (v5e:8x8, 4096 × 64)
    python -m benchmarks.hardware.maxtext_tpu --environment /tmp/maxtext --step decode       (v5e:2x4, 32768 × 8)
    python -m benchmarks.hardware.maxtext_tpu --environment /tmp/maxtext --layers 2 --length 1024 --rows 16  (a trial)
    python -m benchmarks.hardware.maxtext_tpu --environment /tmp/maxtext --flags "full remat" remat_policy=minimal

Both get Mixtral's shape of the 12B-16E, the same topology, batch and trained weights. MaxText's LoRA reaches attention
alone in Mixtral, so ours trains no more here; its adapters have the dtype of its weights, bfloat16, ours float32.
In decoding both have bfloat16 weights and cache; half of MaxText's cache is for prompts. Ours samples as each row asks,
MaxText takes the likeliest token. Attention's products over the cache, a kernel in ours, are in no figure but the
bytes. There are no aims: both read the weights and the cache once, and wait for that.
MaxText is tried with each set of FLAGS, or MaxText's own key=value, and judged by its best, figure by figure.

The first run installs MaxText into --environment, with Python 3.12 (--python) and the releases of MaxText's own lock
file: 1.7 GB, no torch, no CUDA. libtpu is ours for both. Nothing is run, no weight is read. A compile takes two to four
CPU minutes, however many layers there are; what was compiled is in benchmarks/results/maxtext_tpu.json and stays.

Printed for one device: bytes as the compiler has them; FLOPs of matrix products and kernels, loops by their trip
counts, by one counter (train/plan/hlo_flops.py); bytes sent; and the compiler's `estimated_cycles`, summed over the
schedule. Attention and the experts' products are not in the cycles of either: kernels carry none, and what XLA's own
ragged dot carries counts tiles that it skips.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.lib import maxtext_side

MAXTEXT = "0.2.5"
MODEL = "nemoe-12b-16e"
RANK, ALPHA = 16, 32
STEPS = {"lora": ("v5e:4x4", 8192, 32), "all": ("v5e:8x8", 4096, 64), "decode": ("v5e:2x4", 32768, 8)}
OVER_CACHE = ("btkgd,bskd->bkgts", "bkgts,bskd->btkgd")  # MaxText's attention in decoding
AIMS = {"bytes": 0.85, "flops": 0.95, "cycles": 0.95}
# of what MaxText's list locks, tools and clouds that no compile imports; libtpu is ours
LEFT_OUT = (
    r"pylint|pytest|pytype|black|pyink|isort|pre-commit|virtualenv|nvidia|libtpu|keras|h5py|libclang|.*aiplatform|"
    r".*genai|hypothesis|scipy-stubs|coverage|ninja|pycnite|libcst|importlab|astroid|auditwheel|nodeenv|xprof|pynvml|"
    r"tensorboard-plugin|jaraco|identify|cfgv|execnet|pyelf"
)
BESIDE = "xprof==2.23.1"  # the list's 2.20.0 lacks a module that its own tokamax imports
# MaxText's flags in training. All have flash attention, scanned layers, sparse_matmul with megablox and fsdp over all
# devices.
_FULL = ("attention=flash", "remat_policy=full", "num_vocab_tiling=16", "vocab_tiling_ag_once=true")
_BLOCKS = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
FLAGS = {
    "full remat": _FULL,
    "fused backward": (*_FULL, "sa_use_fused_bwd_kernel=true"),
    "attention kept": ("attention=flash", "remat_policy=custom", "context=device", *_FULL[2:]),
    "blocks of 1024": (*_FULL, *(f"sa_block_{name}=1024" for name in _BLOCKS)),
    "ragged dot": (*_FULL, "megablox=false"),
    "expert=4": (*_FULL, "ici_expert_parallelism=4"),
    "tensor=4": (*_FULL, "ici_tensor_parallelism=4"),
}
_UNROLLED = ("attention=dot_product", "ici_fsdp_parallelism=1", "scan_layers=false")
_ALL_EXPERTS = ("megablox=false", "sparse_matmul=false")  # of each token, as in its own scripts for Mixtral
DECODE_FLAGS = {
    "tensor=-1": (*_UNROLLED, *_ALL_EXPERTS, "ici_tensor_parallelism=-1"),
    "autoregressive=-1": (*_UNROLLED, *_ALL_EXPERTS, "ici_autoregressive_parallelism=-1"),
    "megablox": (*_UNROLLED, "ici_tensor_parallelism=-1"),
    "expert=-1": (*_UNROLLED, *_ALL_EXPERTS, "ici_expert_parallelism=-1"),
    "scanned": (*_UNROLLED[:2], *_ALL_EXPERTS, "ici_tensor_parallelism=-1"),
}


def main() -> None:
    """Compiles both and prints them side by side; exit status 1 where an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="MaxText's own; made where there is none")
    parser.add_argument("--python", default="python3.12", help="to make it with (default python3.12)")
    parser.add_argument(
        "--step", choices=STEPS, default="lora", help="training: LoRA of rank 16 (default), all; decode"
    )
    parser.add_argument("--topology", help="default as above, for each step")
    parser.add_argument("--length", type=int, help="tokens of a row; in decoding, of its cache")
    parser.add_argument("--rows", type=int, help="rows of a batch")
    parser.add_argument("--layers", type=int, help="fewer than the model's 40, for a trial")
    parser.add_argument("--flags", nargs="+", help="names of FLAGS (decode: DECODE_FLAGS), or MaxText's key=value")
    parser.add_argument("--ours", action="store_true", help="compile ours alone")
    options = parser.parse_args()
    for name, usual in zip(("topology", "length", "rows"), STEPS[options.step], strict=True):
        setattr(options, name, getattr(options, name) or usual)
    if importlib.util.find_spec("libtpu") is None:
        print("skipped: libtpu, the TPU compiler, is not installed: pip install 'nemoe-jax[tpu]'")
        return
    from benchmarks.lib.results import RESULTS
    from train.plan.plan import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    if not options.ours:
        install(options.environment, options.python)
    file = RESULTS / "maxtext_tpu.json"
    results: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    case = f"{options.step} {options.topology} {options.length} x {options.rows} {options.layers or ''}".strip()
    figures: dict[str, Any] = results.setdefault(case, {})
    runs = {} if options.ours else peer_runs(options)
    for name, run in {"ours": None, **runs}.items():
        if name in figures:
            continue
        figures[name] = peer(options, run) if run else ours(options)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    sys.exit(not show(case, figures, {} if options.step == "decode" else AIMS))


def install(environment: Path, python: str) -> None:
    """MaxText in a virtual environment of its own, with the releases of its own lock file."""
    interpreter = environment / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([python, "-m", "venv", environment], check=True)
    pip = [str(interpreter), "-m", "pip", "install", "--quiet", "--no-deps"]
    if list(environment.glob("lib/*/site-packages/maxtext/trainers")) and (environment / "installed").exists():
        return
    print(f"installing MaxText {MAXTEXT} into {environment}: some minutes", file=sys.stderr)
    subprocess.run([*pip, f"maxtext=={MAXTEXT}"], check=True)
    lock = next(environment.glob("lib/*/site-packages/dependencies/requirements/generated_requirements/tpu-req*.txt"))
    pins = [line.replace(">=", "==") for line in lock.read_text("utf-8").splitlines() if re.match(r"\w", line)]
    wanted = environment / "wanted.txt"
    wanted.write_text("\n".join([*(line for line in pins if not re.match(LEFT_OUT, line)), BESIDE]) + "\n", "utf-8")
    subprocess.run([*pip, "-r", wanted], check=True)
    (environment / "installed").touch()


def peer_runs(options: argparse.Namespace) -> dict[str, list[str]]:
    """{name: flags} of the ways to compile MaxText's step."""
    sets = DECODE_FLAGS if options.step == "decode" else FLAGS
    wanted = options.flags or sets
    named = {name: list(sets[name]) for name in wanted if name in sets}
    own = [flag for flag in wanted if flag not in sets]
    return named | ({" ".join(own): own} if own else {})


def model(options: argparse.Namespace) -> Any:
    """Our config, with as many layers as are wanted."""
    import dataclasses

    from nemoe_jax.spec.config import preset

    config = preset(MODEL)
    return dataclasses.replace(config, layers=options.layers) if options.layers else config


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of our step."""
    import jax

    from train.plan import aot

    started = time.monotonic()
    try:
        compiled, mesh = (our_decoding if options.step == "decode" else our_training)(options)
    except aot.OutOfMemory as error:
        return {"bytes": error.expected, "fits": False}
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()  # before the text, which libtpu may refuse
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    return counted(compiled.as_text(), memory) | {
        "seconds": round(seconds, 1),
        "versions": versions,
        "flags": f"mesh {sizes}",
    }


def our_decoding(options: argparse.Namespace) -> tuple[Any, Any]:
    """A token for each row, compiled, and its mesh."""
    import jax

    from benchmarks.hardware.tpu import Work, lower
    from nemoe_jax.spec.mesh import make_mesh
    from train.plan import aot

    devices = aot.topology_devices(options.topology)
    mesh = make_mesh({"tensor": len(devices)}, devices)
    with jax.set_mesh(mesh):
        return lower(model(options), mesh, Work(options.rows, options.length, "bfloat16"))[0].compile(), mesh


def our_training(options: argparse.Namespace) -> tuple[Any, Any]:
    """The training step, compiled, and its mesh."""
    from nemoe_jax.spec.hf_config import to_hf
    from train.plan import aot
    from train.recipe import read_recipe

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(to_hf(model(options))), "utf-8")
        recipe = Path(folder, "recipe.yaml")
        lora = [{"pattern": "blocks/*/attn/*", "rank": RANK, "alpha": ALPHA}]
        trains = {"trainable": "lora", "lora": lora, "train_router": False} if options.step == "lora" else {}
        data = {"train": "none", "sequence_length": options.length, "batch_size": options.rows}
        settings = {"dtype": "bfloat16", "remat": True, "mesh": "auto", "balance_loss_weight": 0, "steps": 100}
        recipe.write_text(
            json.dumps(
                {"output": "none", "model": folder, "data": data, "optimizer": {"learning_rate": 1e-4}}
                | settings
                | (trains or {"trainable": "all"})
            ),
            "utf-8",
        )
        step = aot.build_step(read_recipe(recipe), aot.topology_devices(options.topology))
    return aot.compile_step(step)[0], step.mesh


def counted(text: str, memory: Any) -> dict[str, Any]:
    """Figures of a compiled program, by the one counter for both."""
    from train.plan import hlo, hlo_flops

    def counts(one: hlo.Instruction) -> bool:
        return not any(einsum in one.attributes for einsum in OVER_CACHE)

    program = hlo.parse(text)
    sizes = [memory[part] if isinstance(memory, dict) else getattr(memory, part) for part in maxtext_side.MEMORY]
    return {
        "bytes": sum(sizes[:4]) - sizes[4],
        "temporaries": sizes[1],
        "fits": True,
        "flops": hlo_flops.executed_flops(program, hlo_flops.attention_kernel_flops, counts),
        "sent": sum(one.bytes * one.times for one in program.collectives),
        "cycles": hlo_flops.estimated_cycles(program, counts),
    }


def peer(options: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """The figures of MaxText's step, compiled in its own environment."""
    config = model(options)
    devices = math.prod(map(int, options.topology.partition(":")[2].split("x")))
    per_device = options.rows / devices
    settings = {
        "run_name": "step", "model_name": "mixtral-8x7b", "override_model_config": True,
        "base_emb_dim": config.hidden, "base_num_query_heads": config.heads, "base_num_kv_heads": config.kv_heads,
        "head_dim": config.head_dim, "base_mlp_dim": config.expert_ffn, "base_moe_mlp_dim": config.expert_ffn,
        "num_experts": config.experts, "num_experts_per_tok": config.top_k, "vocab_size": config.vocab,
        "base_num_decoder_layers": config.layers, "rope_max_timescale": int(config.rope_theta),
        "enable_checkpointing": False, "dataset_type": "synthetic", "log_config": False,
        "compile_topology": f"{options.topology.partition(':')[0]}-{devices}", "compile_topology_num_slices": 1,
        "skip_jax_distributed_system": True, "max_target_length": options.length,
        "per_device_batch_size": int(per_device) if per_device.is_integer() else per_device,
    }  # fmt: skip
    if options.step == "lora":
        settings |= {"lora.enable_lora": True, "lora.lora_rank": RANK, "lora.lora_alpha": ALPHA}
    if options.step == "decode":
        settings |= {"max_prefill_predict_length": options.length // 2}
    if options.step != "all":
        settings |= {"weight_dtype": "bfloat16"}  # of the frozen weights, as ours
    libtpu = importlib.util.find_spec("libtpu")
    assert libtpu is not None
    assert libtpu.origin is not None
    environment = os.environ | {
        "TPU_LIBRARY_PATH": str(Path(libtpu.origin).with_name("libtpu.so")),
        "DECOUPLE_GCLOUD": "TRUE",  # MaxText without Google Cloud's libraries
        "PYTHONPATH": "",
    }
    with tempfile.TemporaryDirectory() as folder:
        side, kind = Path(maxtext_side.__file__), "decode" if options.step == "decode" else "train"
        command = [options.environment / "bin" / "python", "-P", side, kind, folder]
        command += [f"{key}={value}" for key, value in settings.items()]
        command += [f"base_output_directory={folder}", *flags]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if run.returncode:
            too_large = out_of_memory(run.stderr)
            said = {} if too_large else {"error": run.stderr.strip().splitlines()[-1][-200:]}
            return {"fits": False, "flags": " ".join(flags)} | said | too_large
        found = json.loads(Path(folder, "step.json").read_text("utf-8"))
        return counted(Path(folder, "step.hlo").read_text("utf-8"), found["memory"]) | {
            "seconds": found["seconds"], "versions": found["versions"], "flags": " ".join(flags)
        }  # fmt: skip


def out_of_memory(message: str) -> dict[str, Any]:
    """What the compiler says that the program needs, if it complains of that."""
    from train.plan import aot

    found = aot.read_out_of_memory(message)
    return {"bytes": found.expected} if found else {}


def show(case: str, figures: dict[str, Any], aims: dict[str, float]) -> bool:
    """Prints a line for each way, and whether ours keeps the aims against the best of each row."""
    print(f"{case}, for one device\n{'':34}{'GB':>8}{'TFLOPs':>9}{'GB sent':>9}", end="")
    print(f"{'10^9 cycles':>13}{'compiled s':>12}  flags")
    for name, one in figures.items():
        if not one["fits"]:
            print(f"{name:34}{one.get('bytes', 0) / 1e9:8.2f}  does not compile {one.get('error', '')}")
            continue
        print(f"{name:34}{one['bytes'] / 1e9:8.2f}{one['flops'] / 1e12:9.4g}", end="")
        print(f"{one['sent'] / 1e9:9.3g}{one['cycles'] / 1e9:13.4g}{one['seconds']:12.0f}  {one['flags']}")
    kept = bool(figures["ours"]["fits"])
    peers = [one for name, one in figures.items() if name != "ours" and one["fits"]]
    for key in AIMS if peers and figures["ours"]["fits"] else ():
        ratio, aim = figures["ours"][key] / min(one[key] for one in peers), aims.get(key)
        kept &= aim is None or ratio <= aim
        verdict = "" if aim is None else f", aim {aim}: {'kept' if ratio <= aim else 'MISSED'}"
        print(f"{key}: {ratio:.3f} of MaxText's best{verdict}")
    return kept


if __name__ == "__main__":
    main()
