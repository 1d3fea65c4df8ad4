"""What the packages export, and the quickstart that uses it."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import convert
import nemoe_jax
import train
from tests.support.command_models import write_model

ROOT = Path(__file__).parents[2]
PROMISED = {
    nemoe_jax: {"load_pretrained", "save_pretrained", "forward", "generate", "Engine", "SamplingParams", "ModelConfig"},
    convert: {
        *("carve_model", "upcycle", "prune_experts", "distill_routers", "prune_width", "merge_adapter"),
        *("change_layout", "quantize_model", "to_gguf", "from_gguf", "compare_logits"),
    },
    train: {"train", "plan_step", "read_recipe"},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_former_module_of_the_same_name_hides_no_public_function():
    for name in ("nemoe_jax.generate", "convert.upcycle"):
        importlib.import_module(name)
    with pytest.raises(nemoe_jax.UserError, match="empty prompt"):
        next(nemoe_jax.generate(None, None, [[]], 1))
    with pytest.raises(nemoe_jax.UserError, match="nowhere"):
        convert.upcycle("nowhere", "result", convert.UpcycleOptions(experts=2))


@pytest.mark.parametrize("package", PROMISED, ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_documented(package):
    assert PROMISED[package] <= set(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        assert callable(value) and value.__doc__, name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="has no attribute 'lod_pretrained'"):
        _ = package.lod_pretrained


def test_importing_the_packages_imports_nothing_else():
    program = (
        "import sys, nemoe_jax, convert, train\n"
        "heavy = {'jax', 'numpy', 'flax', 'pydantic', 'torch', 'transformers', 'gguf'} & set(sys.modules)\n"
        "raise SystemExit(bool(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_a_conversion_function_is_not_hidden_by_its_modules():
    importlib.import_module("convert.carve.carve")
    importlib.import_module("train.plan.plan")
    assert callable(convert.carve_model) and callable(train.plan_step) and callable(train.train)


def test_the_quickstart_prints_the_likeliest_token_and_what_the_model_writes(tmp_path):
    model = write_model(tmp_path / "model")
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), str(model), "ab"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, check=True)
    config, params = nemoe_jax.load_pretrained(model)
    tokenizer = nemoe_jax.load_tokenizer(model)
    ids = tokenizer.encode("ab", bos=True)
    logits = jax.jit(lambda tokens_BT: nemoe_jax.forward(config, params, tokens_BT).logits)
    for end in range(len(ids), len(ids) + 16):  # the oracle: everything again for each token, zeros behind it
        ids.append(int(logits(jnp.array([ids + [0] * (32 - end)]))[0, end - 1].argmax()))
    written = ids[-16:]
    expected = f"most likely next token: {tokenizer.decode(written[:1])}\n"
    expected += "".join(tokenizer.decode([token]) for token in written) + "\n"
    assert run.stdout.decode().replace("\r\n", "\n") == expected
