"""Schedules and the decay mask."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magneto_jax import optimizers


@pytest.mark.parametrize("kind", optimizers.SCHEDULES)
def test_schedule_follows_its_formula(kind):
  peak, warmup, end, e, power = 2e-3, 10, 110, 0.1, 2.0
  schedule = optimizers.schedule(
    kind, peak=peak, warmup_steps=warmup, decay_steps=end, power=power, end_factor=e
  )
  for step in (0, 4, 9, 10, 11, 60, 109, 110, 500):
    p = min(max((step - warmup) / (end - warmup), 0), 1)
    tail = {
      "cosine": e + (1 - e) * (1 + np.cos(np.pi * p)) / 2,
      "linear": e + (1 - e) * (1 - p),
      "polynomial": e + (1 - e) * (1 - p) ** power,
      "inverse_sqrt": np.sqrt(warmup / (step + 1)),
      "constant": 1.0,
    }[kind]
    want = peak * ((step + 1) / warmup if step < warmup else tail)
    np.testing.assert_allclose(float(schedule(step)), want, rtol=1e-5)  # float32


def test_the_inverse_square_root_is_fairseqs():
  """At update n, from 1: its values for a peak of 5e-4 after 4,000 updates, from a rate of 0."""
  schedule = optimizers.schedule("inverse_sqrt", peak=5e-4, warmup_steps=4000, decay_steps=7)
  for n, rate in (
    *((1, 1.25e-7), (2000, 2.5e-4), (4000, 5e-4)),
    *((8000, 3.5355339e-4), (16_000, 2.5e-4), (100_000, 1e-4)),
  ):
    assert float(schedule(n - 1)) == pytest.approx(rate, rel=1e-6, abs=1e-10)  # float32
  without = optimizers.schedule("inverse_sqrt", peak=2.0, warmup_steps=0, decay_steps=7)
  assert [float(without(step)) for step in (0, 3, 24)] == pytest.approx([2.0, 1.0, 0.4])


def test_only_matrices_decay():
  params = {
    "token_embedding": {"embedding": jnp.ones((4, 2))},
    "segment_0": {
      "wi": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))},
      "mid_norm": {"scale": jnp.ones((3, 2)), "bias": jnp.ones((3, 2))},
      "self_attention": {"head_scale": jnp.ones((3, 2))},
    },
  }
  transform = optimizers.adamw(optax.constant_schedule(0.1), weight_decay=0.5)
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = transform.update(zero, transform.init(params), params)
  moved = {
    name: float(jnp.abs(leaf).max())
    for name, leaf in (
      ("embedding", updates["token_embedding"]["embedding"]),
      ("kernel", updates["segment_0"]["wi"]["kernel"]),
      ("bias", updates["segment_0"]["wi"]["bias"]),
      ("gain", updates["segment_0"]["mid_norm"]["scale"]),
      ("head_scale", updates["segment_0"]["self_attention"]["head_scale"]),
    )
  }
  assert moved["embedding"] == moved["kernel"] == pytest.approx(0.05)  # rate x decay x 1
  assert moved["bias"] == moved["gain"] == moved["head_scale"] == 0.0


def test_clipping_bounds_the_global_norm():
  transform = optimizers.adamw(optax.constant_schedule(1.0), clip_norm=1.0, b1=0.0, eps=1.0)
  params = {"kernel": jnp.zeros((2, 2))}
  state = transform.init(params)
  large, _ = transform.update({"kernel": jnp.full((2, 2), 50.0)}, state, params)
  unit, _ = transform.update({"kernel": jnp.full((2, 2), 0.5)}, state, params)
  np.testing.assert_allclose(large["kernel"], unit["kernel"], rtol=1e-5)  # float32


# ---------------------------------------------------------------------------------------------
# Rates by layer
# ---------------------------------------------------------------------------------------------


def stack_of(segments, **others):
  """Parameters of a stack: (repeats, blocks) of each segment, a scalar and a matrix a block."""
  blocks = {
    f"segment_{i}": {
      f"block_{j}": {"wi": {"kernel": jnp.ones((repeats, 2, 3))}, "skip": jnp.ones((repeats,))}
      for j in range(count)
    }
    for i, (repeats, count) in enumerate(segments)
  }
  return {"stack": {**blocks, "final_norm": {"scale": jnp.ones(2)}}, **others}


def test_layer_decay_is_beits():
  """.65 over 12 layers: .003697 at the embeddings, .65 at layer 12, 1 at the head."""
  inner = stack_of([(12, 1)], position_embedding={"embedding": jnp.ones((5, 2))})
  inner["embedding_norm"] = {"scale": jnp.ones(2)}
  params = {
    "encoder": {
      "encoder": inner,
      "patch_embedding": {"projection": {"bias": jnp.ones(2)}, "mask_token": jnp.ones(2)},
      "patch_relative_bias": jnp.ones((12, 2)),
    },
    "head_out": {"kernel": jnp.ones((2, 3))},
    "scalar": jnp.ones(()),
  }
  scales = optimizers.layer_scales(params, 0.65)
  jax.tree.map(lambda scale, leaf: np.broadcast_to(scale, leaf.shape), scales, params)
  encoder = scales["encoder"]
  for lowest in (
    encoder["patch_embedding"]["projection"]["bias"],
    encoder["patch_embedding"]["mask_token"],
    encoder["encoder"]["position_embedding"]["embedding"],
    encoder["encoder"]["embedding_norm"]["scale"],
  ):
    np.testing.assert_allclose(np.ravel(lowest), 0.003697, atol=5e-7)
  for highest in (
    encoder["patch_relative_bias"],
    encoder["encoder"]["stack"]["final_norm"]["scale"],
    scales["head_out"]["kernel"],
    scales["scalar"],
  ):
    np.testing.assert_array_equal(np.ravel(highest), 1)
  block = encoder["encoder"]["stack"]["segment_0"]["block_0"]
  layers = 0.65 ** np.arange(12, 0, -1)
  np.testing.assert_allclose(block["wi"]["kernel"][:, 0, 0], layers, rtol=1e-6)  # float32
  np.testing.assert_allclose(block["skip"], layers, rtol=1e-6)


def test_layers_are_counted_over_segments_and_patterns():
  """Two layers a repeat, three times, then one: 7 layers, in the order in which they run."""
  scales = optimizers.layer_scales(stack_of([(3, 2), (1, 1)]), 0.5)["stack"]
  of = lambda segment, block: scales[f"segment_{segment}"][f"block_{block}"]["skip"]
  np.testing.assert_allclose(of(0, 0), 0.5 ** np.array([7, 5, 3]))
  np.testing.assert_allclose(of(0, 1), 0.5 ** np.array([6, 4, 2]))
  np.testing.assert_allclose(of(1, 0), [0.5])


def test_layer_decay_is_of_the_whole_update():
  """Of weight decay too, behind the clip; 1 changes neither updates nor the state's structure."""
  params = stack_of([(2, 1)])
  gradient = jax.tree.map(lambda x: 0.1 * x, params)

  def update(**options):
    transform = optimizers.adamw(
      optax.constant_schedule(0.1), weight_decay=0.5, clip_norm=1.0, **options
    )
    state = transform.init(params)
    return transform.update(gradient, state, params)[0], jax.tree.structure(state)

  plain, structure = update()
  same, as_before = update(layer_decay=1.0)
  assert structure == as_before
  jax.tree.map(np.testing.assert_array_equal, plain, same)
  scaled, _ = update(layer_decay=0.5)
  scales = optimizers.layer_scales(params, 0.5)
  wanted = jax.tree.map(lambda u, s: u * s, plain, scales)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), scaled, wanted)
  zero = jax.tree.map(jnp.zeros_like, params)
  transform = optimizers.adamw(optax.constant_schedule(0.1), weight_decay=0.5, layer_decay=0.5)
  decayed, _ = transform.update(zero, transform.init(params), params)
  kernel = decayed["stack"]["segment_0"]["block_0"]["wi"]["kernel"]
  np.testing.assert_allclose(kernel[:, 0, 0], -0.05 * np.array([0.25, 0.5]), rtol=1e-6)


def test_layer_decay_is_of_one_stack():
  params = {"encoder": stack_of([(2, 1)]), "decoder": stack_of([(2, 1)])}
  with pytest.raises(ValueError, match="this model has several: set optimizer.layer_decay=1"):
    optimizers.layer_scales(params, 0.9)


def test_a_head_has_a_rate_of_its_own():
  """Its modules and its parameters, whole updates; a model without one is told."""
  leaf = jnp.full((2, 2), 0.5)
  params = {
    "encoder": {
      "final_norm": {"scale": leaf},
      "overhead": leaf,
      "segment_0": {"block_0": {"self_attention": {"head_scale": leaf}}},
    },
    "head_out": {"kernel": leaf},
    "head_bias": leaf,
  }
  transform = lambda **options: optimizers.adamw(optax.constant_schedule(0.1), **options)
  update = lambda t: t.update(params, t.init(params), params)[0]
  plain, scaled = update(transform()), update(transform(head_rate=20.0))
  ratios = jax.tree.map(lambda a, b: float(np.mean(a / b)), scaled, plain)
  assert ratios["head_out"]["kernel"] == pytest.approx(20) == ratios["head_bias"]
  assert {*jax.tree.leaves(ratios["encoder"])} == {1.0}
  del params["head_out"], params["head_bias"]
  with pytest.raises(ValueError, match="head_rate=20 is of a head, and this model has none"):
    optimizers.head_scales(params, 20.0)


def test_beits_decay_leaves_positions_and_the_class_token_alone():
  leaf = jnp.ones((2, 2))
  params = {
    "patch_embedding": {
      "projection": {"kernel": leaf, "bias": leaf},
      "class_token": leaf,
      "mask_token": leaf,
    },
    "patch_relative_bias": leaf,
    "position_embedding": {"embedding": leaf},
    "token_embedding": {"embedding": leaf},
    "final_norm": {"scale": leaf},
  }
  mask = optimizers.beit_decay_mask(params)
  leaves = jax.tree_util.tree_leaves_with_path(mask)
  assert {"/".join(key.key for key in path) for path, decays in leaves if decays} == {
    "patch_embedding/projection/kernel",
    "patch_embedding/mask_token",
    "patch_relative_bias",
    "token_embedding/embedding",
  }
