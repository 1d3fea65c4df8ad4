"""A training step of the 12B-16E beside MaxText's, both compiled ahead of time by one TPU compiler: no TPU is needed.

    python -m benchmarks.hardware.maxtext_tpu --environment /tmp/maxtext    (LoRA of attention, v5e:4x4, 8192 × 32)
    python -m benchmarks.hardware.maxtext_tpu --environment /tmp/maxtext --trains all --length 4096 --rows 16
    python -m benchmarks.hardware.maxtext_tpu --environment /tmp/maxtext --layers 2 --length 1024 --rows 16  (a trial)
    python -m benchmarks.hardware.maxtext_tpu --environment /tmp/maxtext --flags "full remat" remat_policy=minimal

Both get Mixtral's shape of the 12B-16E, the same topology, batch and trained weights. MaxText's LoRA reaches attention
alone in Mixtral, so ours trains no more here; its adapters have the dtype of its weights, bfloat16, ours float32.
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

MAXTEXT = "0.2.5"
MODEL = "nemoe-12b-16e"
RANK, ALPHA = 16, 32
IN_MAXTEXT = "--in-maxtext"  # the first argument where this file runs in MaxText's environment
MEMORY = tuple(f"{part}_size_in_bytes" for part in ("argument", "temp", "generated_code", "output", "alias"))
AIMS = {"bytes": 0.85, "flops": 0.95, "cycles": 0.95}
# of what MaxText's list locks, tools and clouds that no compile imports; libtpu is ours
LEFT_OUT = (
    r"pylint|pytest|pytype|black|pyink|isort|pre-commit|virtualenv|nvidia|libtpu|keras|h5py|libclang|.*aiplatform|"
    r".*genai|hypothesis|scipy-stubs|coverage|ninja|pycnite|libcst|importlab|astroid|auditwheel|nodeenv|xprof|pynvml|"
    r"tensorboard-plugin|jaraco|identify|cfgv|execnet|pyelf"
)
BESIDE = "xprof==2.23.1"  # the list's 2.20.0 lacks a module that its own tokamax imports
# MaxText's flags. All have flash attention, scanned layers, sparse_matmul with megablox and fsdp over all devices.
_FULL = ("remat_policy=full", "num_vocab_tiling=16", "vocab_tiling_ag_once=true")
_BLOCKS = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
FLAGS = {
    "full remat": _FULL,
    "fused backward": (*_FULL, "sa_use_fused_bwd_kernel=true"),
    "attention kept": ("remat_policy=custom", "context=device", *_FULL[1:]),
    "blocks of 1024": (*_FULL, *(f"sa_block_{name}=1024" for name in _BLOCKS)),
    "ragged dot": (*_FULL, "megablox=false"),
    "expert=4": (*_FULL, "ici_expert_parallelism=4"),
    "tensor=4": (*_FULL, "ici_tensor_parallelism=4"),
}


def main() -> None:
    """Compiles both and prints them side by side; exit status 1 where an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="MaxText's own; made where there is none")
    parser.add_argument("--python", default="python3.12", help="to make it with (default python3.12)")
    parser.add_argument("--trains", choices=("lora", "all"), default="lora", help="default: LoRA of rank 16")
    parser.add_argument("--topology", default="v5e:4x4", help="default v5e:4x4")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a row (default 8192)")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch (default 32)")
    parser.add_argument("--layers", type=int, help="fewer than the model's 40, for a trial")
    parser.add_argument("--flags", nargs="+", default=list(FLAGS), help="names of FLAGS, or MaxText's key=value")
    parser.add_argument("--ours", action="store_true", help="compile ours alone")
    options = parser.parse_args()
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
    case = f"{options.trains} {options.topology} {options.length} x {options.rows} {options.layers or ''}".strip()
    figures: dict[str, Any] = results.setdefault(case, {})
    runs = {} if options.ours else peer_runs(options)
    for name, run in {"ours": None, **runs}.items():
        if name in figures:
            continue
        figures[name] = peer(options, run) if run else ours(options)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    sys.exit(not show(case, figures))


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
    named = {name: list(FLAGS[name]) for name in options.flags if name in FLAGS}
    own = [flag for flag in options.flags if flag not in FLAGS]
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

    from nemoe_jax.spec.hf_config import to_hf
    from train.plan import aot
    from train.recipe import read_recipe

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(to_hf(model(options))), "utf-8")
        recipe = Path(folder, "recipe.yaml")
        lora = [{"pattern": "blocks/*/attn/*", "rank": RANK, "alpha": ALPHA}]
        trains = {"trainable": "lora", "lora": lora, "train_router": False} if options.trains == "lora" else {}
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
    try:
        compiled, seconds = aot.compile_step(step)
    except aot.OutOfMemory as error:
        return {"bytes": error.expected, "fits": False}
    memory = compiled.memory_analysis()  # before the text, which libtpu may refuse
    versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
    mesh = ",".join(f"{name}={size}" for name, size in step.mesh.shape.items())
    return counted(compiled.as_text(), memory) | {
        "seconds": round(seconds, 1),
        "versions": versions,
        "flags": f"mesh {mesh}",
    }


def counted(text: str, memory: Any) -> dict[str, Any]:
    """Figures of a compiled program, by the one counter for both."""
    from train.plan import hlo, hlo_flops

    program = hlo.parse(text)
    cycles = 0
    for name, one in program:
        found = re.search(r'"estimated_cycles":"(\d+)"', one.attributes)
        if found and '"is_ragged_dot":true' not in one.attributes and name not in program.ragged_groups:
            cycles += program.times[name] * int(found[1])
    sizes = [memory[part] if isinstance(memory, dict) else getattr(memory, part) for part in MEMORY]
    return {
        "bytes": sum(sizes[:4]) - sizes[4],
        "temporaries": sizes[1],
        "fits": True,
        "flops": hlo_flops.executed_flops(program, hlo_flops.attention_kernel_flops),
        "sent": sum(one.bytes * one.times for one in program.collectives),
        "cycles": cycles,
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
        "enable_checkpointing": False, "dataset_type": "synthetic", "attention": "flash", "log_config": False,
        "compile_topology": f"{options.topology.partition(':')[0]}-{devices}", "compile_topology_num_slices": 1,
        "skip_jax_distributed_system": True, "max_target_length": options.length,
        "per_device_batch_size": int(per_device) if per_device.is_integer() else per_device,
    }  # fmt: skip
    if options.trains == "lora":
        settings |= {"lora.enable_lora": True, "lora.lora_rank": RANK, "lora.lora_alpha": ALPHA}
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
        command = [options.environment / "bin" / "python", "-P", __file__, IN_MAXTEXT, folder]
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


def show(case: str, figures: dict[str, Any]) -> bool:
    """Prints a line for each way, and whether ours keeps the aims against the best of each row."""
    print(f"{case}, for one device\n{'':34}{'GB':>8}{'TFLOPs':>9}{'GB sent':>9}", end="")
    print(f"{'10^9 cycles':>13}{'compiled s':>12}  flags")
    for name, one in figures.items():
        if not one["fits"]:
            print(f"{name:34}{one.get('bytes', 0) / 1e9:8.2f}  does not compile {one.get('error', '')}")
            continue
        print(f"{name:34}{one['bytes'] / 1e9:8.2f}{one['flops'] / 1e12:9.1f}", end="")
        print(f"{one['sent'] / 1e9:9.1f}{one['cycles'] / 1e9:13.3f}{one['seconds']:12.0f}  {one['flags']}")
    kept = bool(figures["ours"]["fits"])
    peers = [one for name, one in figures.items() if name != "ours" and one["fits"]]
    for key, aim in AIMS.items() if peers and figures["ours"]["fits"] else ():
        ratio = figures["ours"][key] / min(one[key] for one in peers)
        kept &= ratio <= aim
        print(f"{key}: {ratio:.3f} of MaxText's best, aim {aim}: {'kept' if ratio <= aim else 'MISSED'}")
    return kept


def in_maxtext(folder: str, *flags: str) -> None:
    """In MaxText's environment: what its train_compile.py does, and the adapters that its SFT trainer adds."""
    os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"  # as train_compile.py has it
    import jax
    import maxtext
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils, sharding

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    config = pyconfig.initialize(["", str(Path(maxtext.__file__).parent / "configs" / "base.yml"), *flags])
    mesh = train_compile.get_topology_mesh(config)
    if config.lora.enable_lora:  # train_compile.py asks for adapters and never makes them
        create, dummy = model_creation_utils.create_nnx_abstract_model, lora_utils._prepare_dummy_inputs
        lora_utils._prepare_dummy_inputs = lambda _: dummy(mesh, seq_len=128)  # flash attention: 128 tokens at least

        def with_adapters(*arguments: Any, **named: Any) -> Any:
            make, _ = create(*arguments, **named)

            def adapted() -> Any:
                adapted_model = lora_utils.apply_lora_to_model(make(), None, config)
                nnx.pop(adapted_model, nnx.Intermediate)  # as the SFT trainer does
                return adapted_model

            with logical_axis_rules(config.logical_axis_rules):
                return adapted, nnx.eval_shape(adapted)

        model_creation_utils.create_nnx_abstract_model = with_adapters
    arguments, named, shardings, _, model = train_compile.get_shaped_inputs(mesh, config)
    of_params, shardings = sharding.maybe_update_params_sharding_with_opt(config, shardings)
    inputs = sharding.build_zero1_input_state_mesh_shardings(config, shardings, of_params)
    data = sharding.get_input_data_sharding(config, mesh)
    step = maxtext_utils.get_functional_train_with_signature(train.train_step, data, inputs, model, config, of_params)
    rules = logical_axis_rules(config.logical_axis_rules)
    started = time.monotonic()
    compiled = train_compile.jit_and_compile(step[0], arguments, named, mesh, *step[1:], config, rules)
    analysis = compiled.memory_analysis()
    found = {
        "memory": {name: getattr(analysis, name) for name in MEMORY},
        "seconds": round(time.monotonic() - started, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "qwix", "flax")},
    }
    Path(folder, "step.json").write_text(json.dumps(found), "utf-8")
    Path(folder, "step.hlo").write_text(compiled.as_text(), "utf-8")


if __name__ == "__main__":
    in_maxtext(*sys.argv[2:]) if sys.argv[1:2] == [IN_MAXTEXT] else main()
