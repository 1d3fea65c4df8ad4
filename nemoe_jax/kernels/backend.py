"""Which platform a program is written for."""

import jax


def target_platform() -> str:
    """That of the ambient mesh, so that a program for a TPU slice can be compiled on a host that has none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
