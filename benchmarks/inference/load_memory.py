"""Peak host memory of loading a sharded model, against the model's own size.

    python -m benchmarks.inference.load_memory            (about 1 GB of weights; a minute)

A child process loads a model directory over 8 virtual CPU devices, whose memory is the host's. Named limit: the model's
bytes + 10 %. The peak is the resident set's growth over what the process held before loading (VmHWM, Linux), mapped
pages of the files included.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from nemoe_jax.spec.config import ModelConfig

LIMIT = 1.10
MESHES = ("fsdp=8", "fsdp=2,expert=4", "expert=4,tensor=2")
CONFIG = ModelConfig(
    family="mixtral",
    hidden=1024,
    layers=12,
    heads=16,
    kv_heads=8,
    head_dim=128,
    vocab=16384,
    experts=16,
    top_k=4,
    expert_ffn=768,
)
CHILD = """
import sys
from pathlib import Path
import jax
from nemoe_jax.checkpoints.pretrained import load_pretrained
from nemoe_jax.spec.mesh import make_mesh, parse_mesh

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

mesh = make_mesh(parse_mesh(sys.argv[2]))
jax.block_until_ready(jax.device_put(jax.numpy.ones(8)))
before = peak()
config, params = load_pretrained(sys.argv[1], mesh=mesh)
jax.block_until_ready(params)
print(peak() - before)
"""


def main() -> None:
    """Writes a model of random weights, loads it on each mesh, prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    import jax

    from nemoe_jax.checkpoints import pretrained
    from nemoe_jax.spec import schema

    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        pretrained.save_pretrained(model, CONFIG, schema.initialize(CONFIG, jax.random.key(0), CONFIG.dtype))
        size = 2 * schema.count(CONFIG)[0]
        print(f"model: {size / 1e9:.3f} GB; limit: {LIMIT:.2f} × the model")
        worst = 0.0
        for mesh in MESHES:
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            }
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(model), mesh], env=environment, stdout=subprocess.PIPE, check=True
            )
            ratio = int(done.stdout) / size
            worst = max(worst, ratio)
            print(f"{mesh:20} peak {int(done.stdout) / 1e9:.3f} GB   ratio {ratio:.3f}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
