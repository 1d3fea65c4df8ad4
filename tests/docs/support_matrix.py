"""docs/support-matrix.md, rendered from what pytest collects: a cell says which test shows it, and no test, no mark.

python -m tests.docs.support_matrix     writes the page anew
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from nemoe_jax.spec.families import FAMILIES as RECORDS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "support-matrix.md"
FAMILIES = tuple(RECORDS)

# What the ids of parametrized tests say of families, where it is not their name.
_IDS = {"dense": "mistral", "tied": "mistral", "moe": "mixtral", "fused": "mixtral"}
_IDS |= {"bias": "llama", "yarn": "llama", "attention and MLP": "mistral", "router and experts": "mixtral"}

# Columns, and the tests that show each. A test that is not parametrized by family is for the one that it names.
COLUMNS: dict[str, dict[str, str]] = {
    "load, logits as transformers'": {
        "tests/model/test_parity.py::test_logits_equal_those_of_transformers_in_one_pass_and_with_a_cache": "",
        "tests/convert/test_torch_parity.py::test_nekomind_opens_with_the_code_beside_its_weights": "nekomind",
    },
    "save": {
        "tests/convert/test_torch_parity.py::test_what_we_save_opens_in_transformers": "",
        "tests/convert/test_torch_parity.py::test_nekomind_opens_with_the_code_beside_its_weights": "nekomind",
    },
    "cache, decode": {
        "tests/model/test_parity.py::test_logits_equal_those_of_transformers_in_one_pass_and_with_a_cache": "",
        "tests/model/test_transformer.py::test_prefill_and_decode_equal_the_full_pass": "",
    },
    "carve": {
        "tests/convert/test_carve.py::test_transformers_opens_the_result": "mistral",
        "tests/convert/test_carve_families.py::test_a_carve_opens_in_transformers": "",
    },
    "upcycle": {
        "tests/convert/test_upcycle.py::test_transformers_opens_the_result_and_agrees": "mixtral",
        "tests/convert/test_upcycle.py::test_copies_of_a_chain_give_the_same_logits": "",
    },
    "prune experts": {"tests/convert/test_prune.py::test_transformers_opens_the_result": ""},
    "minitron": {"tests/convert/test_minitron.py::test_transformers_opens_the_result": ""},
    "LoRA": {"tests/adapters/test_lora.py::test_merged_weights_give_the_adapted_logits_for_every_weight": ""},
    "PEFT in": {
        "tests/adapters/test_peft.py::test_what_peft_saves_is_loaded": "",
        "tests/adapters/test_peft.py::test_nekomind_is_read_back": "nekomind",
    },
    "PEFT out": {"tests/adapters/test_peft.py::test_peft_loads_what_is_saved": ""},
    "train": {
        "tests/train/test_train.py::test_scratch_run_learns_and_its_output_is_a_model": "mistral",
        "tests/train/test_train.py::test_lora_repair_learns_and_merges": "mixtral",
    },
    "FP8 in, out": {
        "tests/checkpoints/test_fp8.py::test_transformers_opens_blocks_with_the_same_logits": "",
        "tests/checkpoints/test_fp8.py::test_mistrals_own_layout_there_and_back": "mistral",
    },
    "GGUF out": {
        "tests/convert/test_gguf.py::test_llama_cpp_continues_as_we_do": "",
        "tests/convert/test_gguf_families.py::test_there_and_back": "",
    },
    "GGUF in": {
        "tests/convert/test_gguf_families.py::test_there_and_back": "",
        "tests/convert/test_gguf_import.py::test_there_and_back_is_the_same_bit_for_bit": "",
        "tests/convert/test_gguf_import.py::test_logits_are_those_of_llama_cpp": "llama",
    },
    "serve": {
        "tests/serving/test_server.py::test_a_chat_is_the_rendered_prompt_continued": "mistral",
        "tests/serving/test_engine.py::test_over_a_mesh": "mixtral",
    },
}
REFUSED = {
    ("GGUF out", "nekomind"): "tests/convert/test_gguf.py::test_what_llama_cpp_could_not_read_is_refused[nekomind]"
}
FILES = sorted({test.partition("::")[0] for tests in COLUMNS.values() for test in tests})

HEAD = """# Support matrix

Generated from the tests by `python -m tests.docs.support_matrix`; a test fails while this page is out of date. Every
mark stands for tests that pass on small models with random weights, whose right values come from transformers, PEFT,
llama.cpp or the mathematics.

✓ tested · ✗ refused by name, tested · a blank: no test shows it
"""


def family_of(test_id: str) -> str:
    """The family that the id of a parametrized test names, or nothing."""
    for name in (test_id, test_id.split("-")[0], test_id.split(",")[0], test_id.split(" ")[0]):
        if name in FAMILIES or name in _IDS:
            return _IDS.get(name, name)
    return ""


def shown_by(collected: Iterable[str]) -> Mapping[str, set[str]]:
    """The families of each column. Raises ValueError where a named test does not exist."""
    collected = list(collected)
    families: dict[str, set[str]] = {column: set() for column in COLUMNS}
    for column, tests in COLUMNS.items():
        for test, family in tests.items():
            ids = [node.removeprefix(test) for node in collected if node.partition("[")[0] == test]
            if not ids:
                raise ValueError(f"{column}: no test {test}")
            families[column] |= {family} if family else {family_of(name[1:-1]) for name in ids} - {""}
    for node in REFUSED.values():
        if node not in collected:
            raise ValueError(f"no test {node}")
    return families


def render(collected: Iterable[str]) -> str:
    """The page."""
    families = shown_by(collected)
    return "\n".join([HEAD, *_table(families), "", "## The tests", "", *_tests()]) + "\n"


def _table(families: Mapping[str, set[str]]) -> Iterator[str]:
    yield f"| family | {' | '.join(COLUMNS)} |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for family in FAMILIES:
        marks = (
            "✓" if family in families[column] else "✗" if (column, family) in REFUSED else " " for column in COLUMNS
        )
        yield f"| {family} | {' | '.join(marks)} |"


def _tests() -> Iterator[str]:
    for column, tests in COLUMNS.items():
        yield f"- {column}: {', '.join(f'`{test}`' for test in tests)}"


def collect() -> list[str]:
    """The ids of all tests in `FILES`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "--import-mode=importlib",
        "--collect-only",
        "-q",
        *FILES,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if "::" in line]


if __name__ == "__main__":
    PAGE.write_text(render(collect()), encoding="utf-8")
