"""Whether two builds of the project write the same model directories: three conversions, file by file.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.convert.same_bytes --before /tmp/before      (a minute on 2 cores)

Named peer: the other build, run by the same Python with its own packages. Compared are weights, config, index and
tokenizer; conversion.json and conversion.html name versions and options. A calibrated carve is compared by the largest
difference of its weights: its sums over neurons may be taken in another order. Exit status 1 where anything differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

REPORTS = ("conversion.json", "conversion.html")
MOST_APART = 1e-3  # of the largest weight of a tensor, for what is calibrated

# a dense model with text, made once with this build: deterministic weights of a small Llama
MAKE = """
import sys
import jax, numpy as np
from nemoe_jax.checkpoints.pretrained import save_pretrained
from nemoe_jax.spec.schema import initialize
from tests.support.configs import DENSE, write_tokenizer
save_pretrained(sys.argv[1], DENSE, initialize(DENSE, jax.random.key(0)))
write_tokenizer(__import__("pathlib").Path(sys.argv[1]))
"""


def main() -> None:
    """Converts with both builds and prints what is the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the other build")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        here = Path(__file__).parents[2]
        run(here, "-c", MAKE, str(work / "dense"))
        words = np.random.default_rng(0).integers(0, 69, 4000)
        (work / "text.txt").write_text(" ".join(f"word{number}" for number in words), encoding="utf-8")
        builds = {"before": arguments.before.resolve(), "after": here}
        good = [compare(work, name, builds) for name in conversions(work)]
    sys.exit(not all(good))


def conversions(work: Path) -> dict[str, tuple[str, list[str]]]:
    """{name: (source, flags behind SRC DST)}; a source may be the result of an earlier one."""
    text = ["--calibration", str(work / "text.txt"), "--calibration-tokens", "3000"]
    return {
        "carve": ("dense", ["--experts", "4", "--top-k", "2"]),
        "upcycle": ("carve", ["--experts", "8"]),
        "prune-experts": ("upcycle", ["--experts", "6", *text]),
        "minitron": ("dense", ["--ffn", "32", *text]),
        "carve calibrated": ("dense", ["--experts", "4", "--top-k", "2", *text]),
    }


def compare(work: Path, name: str, builds: dict[str, Path]) -> bool:
    """Runs one conversion with both builds; whether the results are the same."""
    source, flags = conversions(work)[name]
    results = {build: work / build / name.replace(" ", "-") for build in builds}
    for build, root in builds.items():
        (work / build).mkdir(exist_ok=True)
        path = work / source if source == "dense" else work / "before" / source  # one source for both
        run(root, "-m", "convert.cli", name.split()[0], str(path), str(results[build]), *flags)
    files = {build: {path.name for path in directory.iterdir()} - {*REPORTS} for build, directory in results.items()}
    differ = sorted(files["before"] ^ files["after"]) + [
        file
        for file in sorted(files["before"] & files["after"])
        if (results["before"] / file).read_bytes() != (results["after"] / file).read_bytes()
    ]
    if not differ:
        print(f"{name:20} {len(files['after'])} files, all bytes equal")
        return True
    apart = largest_difference(*(directory / "model.safetensors" for directory in results.values()))
    print(f"{name:20} differs in {', '.join(differ)}; weights by {apart:.1e} of a tensor's largest at most")
    return name.endswith("calibrated") and differ == ["model.safetensors"] and apart <= MOST_APART


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference of two files' weights, relative to the largest of each tensor."""
    from safetensors.numpy import load_file

    first, second = load_file(one), load_file(other)
    return max(
        float(np.abs(np.float32(first[key]) - np.float32(second[key])).max() / np.abs(np.float32(first[key])).max())
        for key in first
    )


def run(root: Path, *command: str) -> None:
    """Runs Python with the packages of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu", "NEMOE_COMPILATION_CACHE": "0"}
    subprocess.run([sys.executable, *command], cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
