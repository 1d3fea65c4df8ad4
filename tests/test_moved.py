"""The former names of modules."""

import importlib
import subprocess
import sys

import pytest

from nemoe_jax.moved import MOVED, RENAMED


@pytest.mark.parametrize("old", MOVED)
def test_a_former_name_gives_the_new_module(old):
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning, match=MOVED[old]):
        module = importlib.import_module(old)
    new = importlib.import_module(MOVED[old])
    for former, name in RENAMED.get(old, {}).items():
        assert getattr(module, former) is getattr(new, name)
    with pytest.raises(AttributeError):
        _ = module.never_there


def test_a_former_name_works_in_a_program_of_its_own():
    program = (
        "from nemoe_jax.config import ModelConfig; from train.formats import to_document; print(ModelConfig.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "nemoe_jax.spec.config" and "nemoe_jax.config has become" in done.stderr
