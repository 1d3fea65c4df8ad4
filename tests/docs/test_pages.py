"""What the pages say of the repository is so."""

import itertools
import json
import re

import pytest

from tests.docs.pages import PAGES, ROOT

PACKAGES = (
    "nemoe_jax|convert|train|benchmarks|examples|tests|docs|kernels|model|serving|checkpoints|text|inference|spec"
)
_PATH = re.compile(rf"`((?:{PACKAGES})/[\w./{{}},-]*)`")
_BRACES = re.compile(r"\{([^}]*)\}")


def spelled_out(path: str) -> list[str]:
    """`a/{b,c}.py` as `a/b.py` and `a/c.py`."""
    choices = [part.split(",") for part in _BRACES.findall(path)]
    template = _BRACES.sub("{}", path)
    return [template.format(*chosen) for chosen in itertools.product(*choices)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    missing = [
        path
        for named in _PATH.findall(page.read_text(encoding="utf-8"))
        for path in spelled_out(named)
        if not any((base / path).exists() for base in (ROOT, ROOT / "nemoe_jax", ROOT / "convert", ROOT / "benchmarks"))
    ]
    assert not missing


def test_the_readme_stays_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert len(links) > 20 and [link for link in links if not (ROOT / link).exists()] == []


def test_every_benchmark_is_on_the_page_of_figures():
    page = (ROOT / "docs/performance/benchmarks.md").read_text(encoding="utf-8")
    folders = [folder for folder in (ROOT / "benchmarks").iterdir() if folder.is_dir() and folder.name != "lib"]
    scripts = [path.relative_to(ROOT / "benchmarks").as_posix() for folder in folders for path in folder.glob("*.py")]
    assert [script for script in scripts if not script.endswith("__init__.py") and f"`{script}`" not in page] == []


PEERS = {
    "moe, batch 1, transformers": "transformers",
    "moe, batch 8, transformers": "transformers",
    "dense, batch 1, llama.cpp": "llama.cpp",
    "moe, batch 1, llama.cpp": "llama.cpp",
}


def test_the_speeds_on_the_page_of_the_cpu_are_those_that_the_benchmarks_wrote():
    page = (ROOT / "docs/performance/cpu.md").read_text(encoding="utf-8")

    def result(name: str) -> dict:
        return json.loads((ROOT / f"benchmarks/results/{name}-cpu.json").read_text())

    forward, step, decode = result("forward"), result("train_step"), result("decode")["rows"]
    pairs = [(forward["ours"], forward[forward["peer"]]), (step["ours"], step["peer"])]
    pairs += [(decode[row]["ours"], decode[row][peer]) for row, peer in PEERS.items()]
    for ours, peer in pairs:
        ours_text, peer_text = (f"{figures['tokens_per_second']:,.0f}" for figures in (ours, peer))
        assert re.search(rf"\| {ours_text} tokens/s \| [^|]*: {peer_text} \|", page), (ours_text, peer_text)
