import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, PartitionSpec

from nemoe_jax.errors import UserError
from nemoe_jax.spec.config import preset
from nemoe_jax.spec.hf_config import to_hf
from tests.support.configs import DENSE, MIXTRAL
from train import cli
from train import recipe as recipes
from train.plan import absent_gpu, aot, hlo, hlo_flops, plan
from train.run.auto_mesh import auto_mesh

NEMOE = preset("nemoe-12b-16e")
SNIPPET = """\
HloModule step, is_scheduled=true

%started (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %call.1 = (bf16[4,8]{1,0}, u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%carried_on (p.2: bf16[4,8], x: f32[6,10], y: f32[10,3]) -> (bf16[16,8], f32[6,3]) {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  %x = f32[6,10]{1,0} parameter(1)
  %y = f32[10,3]{1,0} parameter(2)
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%p.2), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %convolution.1 = f32[6,3]{1,0} convolution(%x, %y), dim_labels=bf_io->bf
  ROOT %tuple.2 = (bf16[16,8]{1,0}, f32[6,3]{1,0}) tuple(%all-gather.2, %convolution.1)
}

%all-reduce-scatter.1 (g: f32[6,3]) -> f32[3,3] {
  %g = f32[6,3]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = f32[6,3]{1,0} all-reduce(%g), channel_id=8, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %own = f32[3,3]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={3,3}
}

%body (arg: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg = (s32[]{:T(128)}, /*index=1*/bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %a = bf16[4,8]{1,0} get-tuple-element(%arg), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %first = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%a), kind=kCustom, calls=%started
  %x.1 = f32[6,10]{1,0} constant({...})
  %y.1 = f32[10,3]{1,0} constant({...})
  %second = (bf16[16,8]{1,0}, f32[6,3]{1,0}) fusion(%a, %x.1, %y.1), kind=kOutput, calls=%carried_on
  %product = f32[6,3]{1,0} get-tuple-element(%second), index=1
  %scattered = f32[3,3]{1,0} fusion(%product), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel.1 = bf16[4,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={metadata={
"xprof_metadata":"{\\"block\\": 128}"
}}, backend_config={"custom_call_config":{"body":"TUzvUg==","cost_estimate":{"flops":"1000","bytes_accessed":"1"}}}
  %moved = bf16[4,8]{1,0} collective-permute(%kernel.1), channel_id=9, source_target_pairs={{0,1},{1,0}}
  ROOT %result = (s32[], bf16[4,8]{1,0}) tuple(%next, %moved)
}

%condition (arg.1: (s32[], bf16[4,8])) -> pred[] {
  %arg.1 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %end = s32[] constant(11)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %compare = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (q: bf16[4,8]) -> bf16[4,8] {
  %q = bf16[4,8]{1,0} parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], bf16[4,8]{1,0}) tuple(%one, %q)
  %while = (s32[], bf16[4,8]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %last = bf16[4,8]{1,0} get-tuple-element(%while), index=1
}
"""


def test_cycles_of_a_loop_count_each_time():
    def with_estimate(line, cycles, more=""):
        return line, f'{line}, backend_config={{"estimated_cycles":"{cycles}"{more}}}'

    text = SNIPPET
    for old, new in (
        with_estimate("%next = s32[] add(%i, %two)", 10),  # five times
        with_estimate("%q = bf16[4,8]{1,0} parameter(0)", 7),
        with_estimate("%end = s32[] constant(11)", 1000, ',"is_ragged_dot":true'),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    program = hlo.parse(text)
    assert hlo_flops.estimated_cycles(program) == 5 * 10 + 7
    assert hlo_flops.estimated_cycles(program, lambda one: one.opcode == "add") == 5 * 10


def test_snippet_of_a_tpu_program():
    """A loop from 1 to 11 by 2 runs 5 times; a gather that two fusions share is one; kernels bring their FLOPs."""
    program = hlo.parse(SNIPPET)
    assert program.entry == "main" and program.times["body"] == program.times["started"] == 5
    gather, permute, scatter = sorted(program.collectives, key=lambda one: one.kind)
    assert gather == hlo.Collective("all-gather", bytes=4 * 8 * 2 * 3, times=5, asynchronous=True)
    assert permute == hlo.Collective("collective-permute", bytes=4 * 8 * 2, times=5, asynchronous=False)
    assert scatter == hlo.Collective("reduce-scatter", bytes=6 * 3 * 4 // 2, times=5, asynchronous=False)
    assert hlo_flops.executed_flops(program) == 5 * (2 * 6 * 10 * 3 + 1000)


RAGGED = """
%product (x: bf16[6,5], w: bf16[4,5,3], mask: pred[4,6]) -> bf16[4,6,3] {
  %x = bf16[6,5]{1,0} parameter(0)
  %w = bf16[4,5,3]{2,1,0} parameter(1)
  %all = bf16[4,6,5]{2,1,0} broadcast(%x), dimensions={1,2}
  ROOT %convolution.2 = bf16[4,6,3]{2,1,0} convolution(%all, %w), window=WINDOW, dim_labels=0bf_0io->0bf
}

ENTRY %main (x.1: bf16[6,5], w.1: bf16[4,5,3], mask.1: pred[4,6]) -> bf16[4,6,3] {
  %x.1 = bf16[6,5]{1,0} parameter(0)
  %w.1 = bf16[4,5,3]{2,1,0} parameter(1)
  %mask.1 = pred[4,6]{1,0} parameter(2)
  ROOT %fusion.1 = bf16[4,6,3]{2,1,0} fusion(%x.1, %w.1, %mask.1), kind=kCustom, calls=%product, backend_config={CONFIG}
}
"""


@pytest.mark.parametrize(
    ("config", "products"), [('"is_ragged_dot":true,"num_groups_in_ragged_dot":"4"', 1), ("", 4)], ids=["ragged", "all"]
)
def test_a_ragged_dot_multiplies_a_row_once(config, products):
    text = RAGGED.replace("WINDOW", "{size=4 stride=3 lhs_dilate=4}").replace("CONFIG", config)
    assert hlo_flops.executed_flops(hlo.parse(text)) == products * 2 * 6 * 5 * 3


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['x'=2,'y'=8] {'y'}", 8),
        ("mesh['x'=2,'y'=8] {'x','y'}", 16),
        ("@mesh['x'=2,'y'=8] {'y':(1)4}", 4),
    ],
)
def test_group_sizes(groups, size):
    assert hlo.group_size(f"channel_id=1, replica_groups={groups}, dimensions={{0}}") == size


@pytest.fixture(scope="module")
def mesh8() -> Mesh:
    return Mesh(jax.devices()[:8], ("x",))


def test_transfers_of_a_real_program(mesh8, optimized):
    """Five layers whose weights are gathered, one sum over all devices: counted, and their bytes."""
    D, LAYERS = 64, 5

    def device(x, weights):
        def layer(x, w):
            return x @ jax.lax.all_gather(w, "x", axis=0, tiled=True), None

        x = jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)])
        x, _ = jax.lax.scan(layer, x * (1 + jax.lax.axis_index("x")), weights)
        return jax.lax.psum(x, "x")

    function = jax.shard_map(
        device,
        mesh=mesh8,
        in_specs=(PartitionSpec("x"), PartitionSpec(None, "x")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    x, weights = jnp.ones((16, D)), jnp.ones((LAYERS, D, D))
    program = hlo.parse(jax.jit(function).lower(x, weights).compile().as_text())
    found = {one.kind: (one.bytes, one.times) for one in program.collectives}
    assert found == {
        "all-gather": (D * D * 4 * 7 // 8, LAYERS),
        "collective-permute": (2 * D * 4, 1),
        "all-reduce": (2 * 2 * D * 4 * 7 // 8, 1),
    }
    assert hlo_flops.executed_flops(program) == LAYERS * 2 * 2 * D * D


def test_executed_flops_of_a_scan_are_those_unrolled(optimized):
    """Gradients of a scanned function, counted here, against XLA's count of the same function without a scan."""
    x, weights = jnp.ones((32, 48)), jnp.ones((4, 48, 48))

    def loss(arrays, unroll):
        x, weights = arrays
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights, unroll=unroll)[0].sum()

    scanned, unrolled = (
        jax.jit(jax.grad(loss), static_argnums=1).lower((x, weights), unroll).compile() for unroll in (1, True)
    )
    counted = unrolled.cost_analysis()["flops"]
    assert scanned.cost_analysis()["flops"] < 0.5 * counted
    assert hlo_flops.executed_flops(hlo.parse(scanned.as_text())) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1,), "padding": ((2, 1),)},
        {"window_strides": (2,), "padding": ((0, 3),), "lhs_dilation": (3,)},
        {"window_strides": (1,), "padding": ((4, 0),), "rhs_dilation": (2,)},
    ],
)
def test_convolutions_count_what_xla_counts(options, optimized):
    left, kernel = jnp.ones((3, 5, 17)), jnp.ones((7, 5, 4))
    compiled = jax.jit(lambda a, b: jax.lax.conv_general_dilated(a, b, **options)).lower(left, kernel).compile()
    assert hlo_flops.executed_flops(hlo.parse(compiled.as_text())) == compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("devices", "rows", "length", "sizes"),
    [
        (1, 4, 64, {"fsdp": 1}),
        (16, 32, 8192, {"fsdp": 16}),
        (16, 16, 4096, {"fsdp": 16}),
        (16, 4, 32768, {"fsdp": 4, "sequence": 4}),
        (64, 4, 131072, {"fsdp": 4, "sequence": 16}),
        (64, 64, 8192, {"fsdp": 64}),
        (16, 6, 8192, {"fsdp": 2, "sequence": 8}),
        (8, 3, 1001, {"tensor": 8}),
        (2048, 2048, 4096, {"data": 2, "fsdp": 1024}),
    ],
)
def test_auto_mesh(devices, rows, length, sizes):
    assert auto_mesh(NEMOE, devices, rows, length) == sizes


def test_auto_mesh_of_nothing_that_fits():
    with pytest.raises(UserError, match="mesh: auto: no division of 11 devices fits 3 rows of 100 tokens"):
        auto_mesh(NEMOE, 11, 3, 100)


@pytest.mark.parametrize(
    ("message", "expected", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (130.56G) exceeds available HBM (15.75G). HLO module: jit_update.",
            130.56,
            15.75,
        ),
        ("Ran out of memory in memory space hbm. Used 512.00M of 0.25G hbm. Exceeded", 0.5, 0.25),
    ],
)
def test_out_of_memory_is_read(message, expected, available):
    error = aot.read_out_of_memory(message)
    assert error is not None
    assert (error.expected, error.available) == (int(expected * 2**30), int(available * 2**30))
    assert aot.read_out_of_memory("INTERNAL: something else (3 of 5)") is None


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    """A recipe in two phases for a small mixture on disk, of which there is no more than config.json."""
    directory = tmp_path_factory.mktemp("plan")
    (directory / "model").mkdir()
    config = MIXTRAL.replace(hidden=256, heads=8, kv_heads=2, head_dim=128, vocab=512, expert_ffn=128, context=2048)
    (directory / "model" / "config.json").write_text(json.dumps(to_hf(config)))
    path = directory / "recipe.yaml"
    path.write_text(
        f"""
output: {directory}/out
model: {directory}/model
dtype: bfloat16
remat: true
mesh: auto
logits_chunk: 256
data: {{train: nowhere.txt, sequence_length: 256, batch_size: 8}}
optimizer: {{learning_rate: 1e-4}}
steps: 4
phases:
  - {{name: small, lora: [{{pattern: "blocks/*/attn/*", rank: 4}}]}}
  - {{name: large, lora: [{{pattern: "blocks/*/attn/*", rank: 8}}, {{pattern: "blocks/moe/ffn/[gud]*", rank: 8}}]}}
"""
    )
    return path


def test_step_on_virtual_devices(recipe_file):
    """The larger phase, on a mesh of this machine's devices: its arguments are of the size that XLA says."""
    step = aot.build_step(recipes.read_recipe(recipe_file), jax.devices()[:8])
    assert step.phase.name == "large" and dict(step.mesh.shape) == {"fsdp": 8}
    compiled, _ = aot.compile_step(step)
    figures = aot.measure(step, compiled)
    memory = figures["memory"]
    assert memory["trained weights"] == pytest.approx(memory["optimizer state"] / 2, rel=0.01)
    assert memory["batch"] == 5 * 256 * 4
    assert 0 <= memory["padding"] < 4096
    assert memory["total"] == sum(memory.values()) - memory["total"]
    assert figures["collectives"]["all-gather"]["count"] >= 3 * step.config.layers
    assert figures["flops"]["executed_over_model"] > 1
    assert figures["flops"]["seconds_at_peak"] is None  # nobody knows a CPU's peak


def test_advice_is_compiled_change_after_change_until_one_fits(recipe_file):
    devices = jax.devices()[:8]
    dense = recipe_file.parent / "dense"  # whose steps compile faster
    dense.mkdir()
    config = DENSE.replace(hidden=64, heads=8, kv_heads=2, head_dim=8, vocab=256, ffn=64, context=2048)
    (dense / "config.json").write_text(json.dumps(to_hf(config)))
    words = [f"model={dense}", 'phases=[{name: train, lora: [{pattern: "blocks/*/attn/*", rank: 4}]}]']
    words += ["data.sequence_length=64"]
    step = aot.build_step(recipes.read_recipe(recipe_file, [*words, "remat=false"]), devices)
    (first,) = plan.advise(step, devices, 10**15)
    assert first.change == "remat=true" and first.fits
    changes = plan.advise(step, devices, 0)
    assert [change.change for change in changes] == [
        "remat=true",
        "remat=true data.gradient_accumulation_steps=2 mesh=auto",
        "remat=true data.gradient_accumulation_steps=8 mesh=auto",
    ]
    assert not any(change.fits for change in changes) and changes[0].total == first.total
    same = aot.build_step(recipes.read_recipe(recipe_file, [*words, *changes[-1].change.split()]), devices)
    assert changes[-1].total == aot.measure(same, aot.compile_step(same)[0])["memory"]["total"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nano-repair"], "libtpu"),
        (["nano-repair", "--topology", "h100"], "h100: jax-cuda12-plugin is not installed: pip install"),
        (["nano-repair", "--topology", "h100:x"], "h100:x: expected a number of cards behind the colon, got x"),
        (["nano-repair", "--phase", "second"], "--phase: expected one of train, got second"),
        (["nano-repairs"], "no such recipe file"),
    ],
)
def test_errors_of_the_command(words, message, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["plan", "--topology", "v5e:4x4", *words]) == 2
    assert message in capsys.readouterr().err


def test_of_a_card_jax_takes_a_share(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert absent_gpu.usable_bytes("NVIDIA GeForce RTX 4090") == 24564 * 2**20 * 3 // 4
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert absent_gpu.usable_bytes("NVIDIA GeForce RTX 4090") == 24564 * 2**19
    assert absent_gpu.usable_bytes("another") is None


@pytest.mark.skipif(absent_gpu.missing() is not None, reason="JAX's plugin for CUDA is not installed")
def test_a_card_that_is_not_there(recipe_file):
    command = [sys.executable, "-m", "train.cli", "plan", str(recipe_file), "--topology", "h100:2", "--json"]
    figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert figures["device_kind"] == "NVIDIA H100 80GB HBM3" and figures["devices"] == 2 and figures["fits"]
    assert figures["memory"]["total"] < figures["limit"] == 84929347584 * 3 // 4


def test_a_model_is_a_directory_or_a_preset(tmp_path):
    assert aot.model_config("minitron-8b", "model") == preset("minitron-8b")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(DENSE)))
    assert aot.model_config(tmp_path, "model") == DENSE
    with pytest.raises(UserError, match="nemo: neither a directory nor a preset"):
        aot.model_config("nemo", "distill.teacher")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
class TestTheTpuCompiler:
    """The command itself, which compiles for chips that are not there."""

    def _run(self, recipe_file, *words):
        environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
        command = [sys.executable, "-m", "train.cli", "plan", str(recipe_file), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    def test_a_small_step_fits(self, recipe_file, tmp_path):
        done = self._run(recipe_file, "--topology", "v5e:2x4", "--json", "--hlo", str(tmp_path / "step.hlo"))
        assert done.returncode == 0 and done.stderr == ""
        figures = json.loads(done.stdout)
        assert figures["fits"] and figures["limit"] == int(15.75 * 2**30) and figures["devices"] == 8
        assert 1 < figures["flops"]["executed_over_model"] < 2
        assert figures["flops"]["seconds_at_peak"] > 0 and figures["collectives"]["all-gather"]["count"] > 0
        assert "splash_mha_fwd" in (tmp_path / "step.hlo").read_text()

    def test_one_that_does_not_fit(self, recipe_file):
        done = self._run(recipe_file, "data.batch_size=1048576", "--topology", "v5e:2x4")
        assert done.returncode == 3 and done.stderr == ""
        assert "DOES NOT FIT" in done.stdout and "data.gradient_accumulation_steps=" in done.stdout

    def test_an_unknown_topology(self, recipe_file):
        done = self._run(recipe_file, "--topology", "v5e:3x5")
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert "expected one such as v5e:4x4" in done.stderr
