"""All metadata is in setup.cfg; only what it cannot say is here."""

import setuptools

# `configs/` lies at the top level, where it is read and edited, and is shipped as
# `magneto_jax.configs`, so that `--config=configs/gpt.py:tiny` works without a clone too. setup.cfg
# can find packages or list them, not both.
setuptools.setup(
  packages=[
    *setuptools.find_packages(include=["magneto_jax", "magneto_jax.*"]),
    "magneto_jax.configs",
  ],
  package_dir={"magneto_jax.configs": "configs"},
)
