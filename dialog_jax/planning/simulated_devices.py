"""Devices that are not present: JAX's simulated ones, on the CPU."""

import os

import jax


def simulate_devices(count: int) -> list[jax.Device]:
    """Returns `count` simulated devices. JAX must not have looked for devices before, or have found that many CPUs."""
    # JAX reads this variable when it first looks for devices, not when it is imported.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    jax.config.update("jax_platforms", "cpu")
    devices = jax.devices()[:count]
    assert len(devices) == count, f"JAX was initialized before: it has {jax.device_count()} devices."
    return devices
