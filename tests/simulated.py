"""Devices that are simulated on this host's CPU, for subprocesses of tests."""

import os


def devices(count: int) -> dict[str, str]:
  """The environment of a process that has this many."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
