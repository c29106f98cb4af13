"""Whole models, built from a recipe and sizes."""

from magneto_jax.models.language import CausalLM, DecodingState
from magneto_jax.models.transformer import Block, Context, Stack, init_caches

__all__ = ["Block", "CausalLM", "Context", "DecodingState", "Stack", "init_caches"]
