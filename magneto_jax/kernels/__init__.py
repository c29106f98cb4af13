"""Attention kernels: one function, one reference, any number of implementations."""

from magneto_jax.kernels.attention import dot_product_attention
from magneto_jax.kernels.attention_xla import RelativeBias, relative_buckets

__all__ = ["RelativeBias", "dot_product_attention", "relative_buckets"]
