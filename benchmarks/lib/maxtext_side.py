"""MaxText's side of maxtext_tpu.py: run by MaxText's own Python, imports nothing of ours.

    python maxtext_side.py {train,decode} FOLDER key=value …      (MaxText's settings)

It compiles one program for the topology and leaves FOLDER/step.hlo and FOLDER/step.json.
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MEMORY = tuple(f"{part}_size_in_bytes" for part in ("argument", "temp", "generated_code", "output", "alias"))


def train_step(config: Any, mesh: Any) -> Any:
    """What its train_compile.py compiles, and the adapters that its SFT trainer adds."""
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils, sharding

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
    return train_compile.jit_and_compile(step[0], arguments, named, mesh, *step[1:], config, rules)


def decode_step(config: Any, mesh: Any) -> Any:
    """`MaxEngine.generate`, a greedy step of all slots. Its own compile wants weights; these are shapes."""
    import jax
    from flax import nnx
    from flax.core.spmd import logical_axis_rules
    from jax.sharding import NamedSharding, PartitionSpec
    from maxtext.inference.maxengine import maxengine
    from maxtext.utils import maxtext_utils, sharding

    engine = maxengine.MaxEngine(config, mesh.devices.flatten())
    everywhere = NamedSharding(engine.mesh, PartitionSpec())

    def shape(array: Any, place: Any = everywhere) -> Any:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)

    _, params, cache, rest = nnx.split(engine.model_ar, nnx.Param, nnx.Cache, ...)
    with logical_axis_rules(config.logical_axis_rules):
        params = jax.tree.map(shape, params, sharding.nnx_construct_named_sharding(params, engine.mesh))
    annotations = maxtext_utils.get_kv_cache_annotations_nnx(engine.model_ar, config, engine.mesh)
    engine.kv_cache_shardings = jax.tree.map(lambda axes: NamedSharding(engine.mesh, axes), annotations)
    slots = engine.max_concurrent_decodes
    of_slot = {"next_pos": "int32", "generated_tokens": "int32", "tokens": "int32", "token_logp": "float32"}
    state = {name: jax.ShapeDtypeStruct((slots, 1), dtype, sharding=everywhere) for name, dtype in of_slot.items()}
    state["logits"] = jax.ShapeDtypeStruct((slots, 1, config.vocab_size), "float32", sharding=everywhere)
    state["cache"] = jax.tree.map(shape, nnx.to_pure_dict(cache), engine.kv_cache_shardings)
    # without JetStream the result's class is a stand-in that JAX does not know
    result = maxengine.engine_api.ResultTokens
    jax.tree_util.register_pytree_node(result, lambda one: ((one.data,), None), lambda _, data: result(data=data[0]))

    def step(params: Any, rest: Any, state: Any, key: Any) -> Any:
        engine._nnx_rest_state = rest  # what load_params would have set
        after, tokens = engine.generate(params, state, rng=key)
        return after, tokens.data

    key = shape(jax.eval_shape(lambda: jax.random.PRNGKey(0)))
    return jax.jit(step, donate_argnums=2).lower(params, jax.tree.map(shape, rest), state, key).compile()


def main(step: str, folder: str, *flags: str) -> None:
    """Compiles and writes."""
    os.environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_spmd_rng_bit_generator_unsafe=true"  # as train_compile.py has it
    import jax
    import maxtext
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train_compile

    jax.config.update("jax_default_prng_impl", "unsafe_rbg")
    config = pyconfig.initialize(["", str(Path(maxtext.__file__).parent / "configs" / "base.yml"), *flags])
    mesh = train_compile.get_topology_mesh(config)
    started = time.monotonic()
    compiled = {"train": train_step, "decode": decode_step}[step](config, mesh)
    analysis = compiled.memory_analysis()
    found = {
        "memory": {name: getattr(analysis, name) for name in MEMORY},
        "seconds": round(time.monotonic() - started, 1),
        "versions": {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "qwix", "flax")},
    }
    Path(folder, "step.json").write_text(json.dumps(found), "utf-8")
    Path(folder, "step.hlo").write_text(compiled.as_text(), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
