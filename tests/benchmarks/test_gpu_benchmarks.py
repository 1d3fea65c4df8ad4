"""Dry runs on CPU of the benchmarks that need a GPU: every line of them but the kernels that no CPU has."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        importlib.import_module(f"benchmarks.hardware.{name}").main()
        return capsys.readouterr().out

    return run


def test_the_models_dry_run_prints_every_row(run):
    pytest.importorskip("transformers")
    printed = run("gpu", "--tiny")
    assert printed.count("(limit 2.0)") == 3 and printed.count("(limit 0.5)") == 2
    assert "ours: forward" in printed and "peer: forward" in printed


def test_the_kernels_dry_run_times_what_a_cpu_can_interpret(run):
    printed = run("gpu_kernels", "--tiny")
    kernels = [line for line in printed.splitlines() if line.startswith("  ")]
    assert sum("Triton" in line and " us" in line for line in kernels) == 2 * 5 + 2  # three kinds, two of one token
    assert sum("Pallas" in line and " us" in line for line in kernels) == 6
    reasons = [line for line in kernels if " us" not in line]
    assert all("Hopper" in line or "cuDNN" in line or "tokamax" in line for line in reasons), reasons


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpu", "JAX finds no GPU"),
        ("gpu_kernels", "JAX finds no GPU"),
        ("gpu_compile", "jax-cuda12-plugin is not installed"),
        ("fp8_decode --slice h200", "jax-cuda12-plugin is not installed"),
    ],
)
def test_what_is_missing_is_said(run, name, reason):
    assert run(*name.split()).startswith(f"skipped: {reason}")
