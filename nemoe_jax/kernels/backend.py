"""Which device a program is written for."""

import jax


def target_platform() -> str:
    """That of the ambient mesh, so that a program for a TPU slice can be compiled on a host that has none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def target_device_kind() -> str:
    """The kind of device, as `jax.Device.device_kind`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0].device_kind if device is None else device.device_kind
