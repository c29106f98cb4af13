"""What the library offers to other people's projects, each in a module that never heard of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from magneto_jax import initializers, layers
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture, Init, Scale, Sublayer

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
SUBLAYER = Sublayer(frozenset({"in", "out", "post"}), skip=Scale(1.0, "vector"))
STACK = RECIPES["normformer"](Architecture("decoder", 0, 4, 8, 16, 2)).decoder
WO = STACK.layers[2].ffn.wo


class ResidualBlock(nn.Module):
  """Somebody's layer under the residual rule."""

  @nn.compact
  def __call__(self, x):
    ffn = nn.Dense(x.shape[-1], name="ffn")
    return layers.Residual(name="rule")(x, lambda h: (ffn(h), None), SUBLAYER)[0]


class Patches(nn.Module):
  """Somebody's image model: X as images of 2 x 4 pixels becomes as many embeddings."""

  @nn.compact
  def __call__(self, x):
    embed = layers.PatchEmbedding(x.shape[-1], 2, mask_token=True, name="embed")
    return embed(x.reshape(x.shape[0], 2, 4, 3), np.array([[True, False], [False, True]]))


class FrontEnd(nn.Module):
  """Somebody's speech model: X as spectrograms, each number four times along time and bins."""

  kind: type

  @nn.compact
  def __call__(self, x):
    many = x.repeat(4, axis=1).repeat(2, axis=2)
    y, _ = self.kind(x.shape[-1], name="made")(many, jnp.array([12, 9]))
    return jnp.pad(y, ((0, 0), (0, x.shape[1] - y.shape[1]), (0, 0)))


# Every public module, with all it has that makes parameters ...
LAYERS = {
  "Attention": functools.partial(
    layers.Attention,
    num_heads=2,
    num_kv_heads=1,
    is_causal=True,
    head_scale="pre_out_proj",
    mid_norm=layers.norm_factory("layer_norm"),
    qk_norm=layers.norm_factory("rms_norm"),
    rotation=layers.ROTATIONS["xpos"],
  ),
  "Conv2dSubsampling": functools.partial(FrontEnd, layers.Conv2dSubsampling),
  "ConvSubsampling": functools.partial(
    FrontEnd, functools.partial(layers.ConvSubsampling, hidden=4)
  ),
  "FeedForward": functools.partial(
    layers.FeedForward, 16, "swiglu", mid_norm=layers.norm_factory("rms_norm")
  ),
  "Multiway": functools.partial(
    layers.Multiway, functools.partial(nn.Dense, 8), ("vision", "text"), (2, 1)
  ),
  "PatchEmbedding": Patches,
  "Residual": ResidualBlock,
  "VGGSubsampling": functools.partial(
    FrontEnd, functools.partial(layers.VGGSubsampling, channels=(2, 3))
  ),
  "VectorQuantizer": functools.partial(layers.VectorQuantizer, 5, 8),
  "norm_factory": layers.norm_factory("layer_norm"),
}
# ... and every public init function.
KERNELS = {
  "deepnet": initializers.deepnet(24),
  "dense_init": initializers.dense_init(WO).kernel,
  "kernel_init": initializers.kernel_init(Init("normal", 0.02)),
  "lecun_normal": initializers.lecun_normal(0.5),
  "magneto": initializers.magneto(24),
  "normal": initializers.normal(0.02),
  "torch_uniform": initializers.torch_uniform(0.5),
  "xavier_normal": initializers.xavier_normal(0.5),
  "xavier_uniform": initializers.xavier_uniform(0.5),
}
BIASES = {
  "bias_init": initializers.bias_init(WO)(8),
  "torch_bias": initializers.torch_bias(8),
  "zero_bias": initializers.zero_bias(8),
}


class Foreign(nn.Module):
  """Somebody's model: one of the layers, and a layer of its own."""

  layer: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = LAYERS[self.layer](name="layer")(x)
    return nn.Dense(x.shape[-1])(y[0] if isinstance(y, tuple) else y)
