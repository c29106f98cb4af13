"""Parity with the reference systems: their weights in, their numbers out.

`pytest tests/parity_test.py --reference=DIR` holds the package against every `.npz` file in DIR and
its subfolders (by default those in tests/testdata; where they come from is said there). A file has
a small random model's weights, inputs, outputs, hidden states, loss and gradients, as torchscale
or fairseq computed them in float32. Whatever such a file holds is compared: an array that no test
looks at is a failure.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magneto_jax import convert
from magneto_jax.convert import fairseq, layout, torchscale
from magneto_jax.layers.attention import Attention
from magneto_jax.layers.feed_forward import FeedForward
from magneto_jax.layers.norms import norm_factory
from magneto_jax.layers.positions import xpos
from magneto_jax.models.backbone import positions_of
from magneto_jax.models.beit3 import BEiT3
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.language import CausalLM, MaskedLM
from magneto_jax.models.transformer import Block, Context, Stack
from magneto_jax.theory import recipes, records

# Of outputs: torch's float32 is itself up to 1.3e-5 away from float64.
ATOL = 5e-5
# Of a gradient: relative to its tensor's largest entry, and to the model's largest gradient, for
# those that are zero by mathematics (a key's bias).
OF_TENSOR, OF_MODEL = 1e-4, 1e-6


# Of the vendored files, one of a kind; `pytest -m slow` compares the rest.
QUICK = (
  "beit3_vl_captioning_mask",
  "decoder_incremental_prefix_xpos",
  "encdec_subln_relpos",
  "encoder_postln",
  "layer_cross_all",
  "lm_legacy_interleaved",
  "lm_normformer_untied",
  "mlm_normformer_resids",
  "multiway_encoder_deepnorm",
  "train_normformer_all",
)


def files(config) -> list[pathlib.Path]:
  return sorted(pathlib.Path(config.getoption("--reference")).rglob("*.npz"))


def pytest_generate_tests(metafunc):
  if "file" in metafunc.fixturenames:
    found = files(metafunc.config)
    # Of the module, so that all tests of one file follow each other and share what it computes.
    cases = [
      pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK))
      for path in found
    ]
    metafunc.parametrize("file", cases, scope="module")


def test_there_are_files(pytestconfig):
  """An empty or misspelt folder must not pass."""
  assert files(pytestconfig), f"no .npz file in {pytestconfig.getoption('--reference')}"


# ---------------------------------------------------------------------------------------------
# What a file holds
# ---------------------------------------------------------------------------------------------


class Case:
  """One file: the converted model, and what it computes beside what the file says.

  Attributes:
    model, variables: after the conversion.
    places: which tensor is which parameter.
    write: from parameters (or gradients) to a state dict.
    forward: `params -> (loss or None, {key: array})`, each array by its key in the file.
  """

  def __init__(self, path: pathlib.Path):
    with np.load(path, allow_pickle=False) as archive:
      self.arrays = dict(archive)
    name = "config" if "config" in self.arrays else "meta"
    self.config = json.loads(str(self.arrays.pop(name)))
    if self.config.get("resolved", {}).get("moe_freq", 0) > 0:
      pytest.skip("moe_freq > 0: mixture of experts is not part of the package")
    self.prefix = "param/" if name == "config" else "sd/"
    self.state_dict = self.under(self.prefix)
    (_torchscale if name == "config" else _fairseq)(self)

  def under(self, prefix: str) -> dict[str, np.ndarray]:
    return {k[len(prefix) :]: v for k, v in self.arrays.items() if k.startswith(prefix)}

  @functools.cached_property
  def computed(self):
    """(outputs and loss by key, gradients by the reference's names)."""
    params = self.variables["params"]
    if not self.under("grad/"):
      outputs = jax.jit(self.forward)(params)[1]
      after = self.write(outputs.pop("after")) if "after" in outputs else {}
      return outputs | {f"sd_after/{name}": tensor for name, tensor in after.items()}, {}
    run = jax.jit(jax.value_and_grad(self.forward, has_aux=True))
    (_, outputs), gradients = run(params)
    return outputs, self.write(gradients)


@functools.cache
def case_of(path: pathlib.Path) -> Case:
  return Case(path)


@pytest.fixture
def case(file) -> Case:
  return case_of(file)


def cross_entropy(logits, targets, weights):
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return jnp.sum(nats * weights) / jnp.sum(weights)


# ---------------------------------------------------------------------------------------------
# torchscale's files
# ---------------------------------------------------------------------------------------------


def _torchscale(case: Case):
  config = case.config["resolved"]
  case.model, case.variables = convert.from_torchscale(case.state_dict, config)
  case.write = lambda params: convert.to_torchscale(case.model, {"params": params})
  case.places = torchscale.places(case.model)
  case.inputs = case.under("input/")
  case.fed = {f"input/{name}" for name in case.inputs}
  forward = {
    Encoder: _encoder,
    MaskedLM: _encoder,
    CausalLM: _decoder,
    BEiT3: _beit3,
  }.get(type(case.model), _encoder_decoder)
  case.forward = functools.partial(forward, case)


def _streams(hidden, name="hidden"):
  return {f"{name}/{i}": stream for i, stream in enumerate(hidden)}


def _mask(case, name):
  """Our mask (True: token) from theirs (True: padding), and positions, which ignore padding."""
  mask = case.inputs.get(name)
  return None if mask is None else ~mask.astype(bool)


def _allowed(case):
  mask = case.inputs.get("attn_mask")
  return None if mask is None else (mask == 0).reshape(-1, *mask.shape[-2:])


def _normed(model, params, hidden):
  """The features: the last of the stream through the final norm, if there is one."""
  if not model.recipe.final_norm:
    return hidden[-1]
  norm = norm_factory("layer_norm", epsilon=model.norm_epsilon)()
  return norm.apply({"params": params["stack"]["final_norm"]}, hidden[-1])


def _encoder(case, params):
  inputs, apply = case.inputs, functools.partial(case.model.apply, {"params": params})
  source = inputs["src_tokens"] if "src_tokens" in inputs else inputs["token_embeddings"]
  batch, length = source.shape[:2]
  options = {
    "mask_BT": _mask(case, "encoder_padding_mask"),
    "positions_BT": jnp.arange(length)[None] * jnp.ones((batch, 1), jnp.int32),
    "visible_BTT": _allowed(case),
    "return_hidden_states": True,
  }
  if isinstance(case.model, MaskedLM):
    logits, hidden = apply(inputs["src_tokens"], **options)
    features = _normed(case.model.encoder, params["encoder"], hidden)
    outputs = {"output/logits": logits, "output/features": features} | _streams(hidden)
    return _with_loss(case, outputs)
  split = case.config.get("multiway_split_position")
  if split is not None:
    split = length if split == -1 else split
    options["lengths"] = (split, length - split)
  if "src_tokens" in inputs:
    out, hidden = apply(inputs["src_tokens"], **options)
  else:
    scale = case.model.recipe.embedding.scale
    out, hidden = apply(embeddings_BTD=jnp.asarray(source) * scale, **options)
  outputs = {"output/encoder_out": out, "output/features": out} | _streams(hidden)
  return _with_loss(case, outputs)


def _with_loss(case, outputs):
  """Adds the loss that the file's configuration names."""
  if "targets" in case.inputs:
    is_decoder = "prev_output_tokens" in case.inputs
    padding = case.inputs.get(f"{'self_attn' if is_decoder else 'encoder'}_padding_mask")
    targets = case.inputs["targets"]
    weights = jnp.ones(targets.shape) if padding is None else 1.0 - padding
    outputs["loss"] = cross_entropy(outputs["output/logits"], targets, weights)
  elif "loss_weight" in case.inputs:
    outputs["loss"] = jnp.sum(outputs["output/encoder_out"] * case.inputs["loss_weight"])
  return outputs.get("loss", jnp.zeros(())), outputs


def _decoder(case, params):
  model, variables = case.model, {"params": params}
  tokens = case.inputs["prev_output_tokens"]
  batch, length = tokens.shape
  options = {
    "mask_BT": _mask(case, "self_attn_padding_mask"),
    "positions_BT": jnp.arange(length)[None] * jnp.ones((batch, 1), jnp.int32),
  }
  logits, hidden = model.apply(variables, tokens, return_hidden_states=True, **options)
  outputs = {
    "output/logits": logits,
    "output/logits_full": logits,
    "output/features": _normed(model, params, hidden),
  } | _streams(hidden)
  if "prefix" in case.config:
    # torchscale's first call takes the prefix, each further one a token; prefix 0 begins with one.
    starts = [0, *range(max(case.config["prefix"], 1), length)]
    incremental, state = _decoded(model.apply, variables, tokens, starts, model.init_state)
    outputs["output/logits_incremental"] = incremental
    block = state.caches[0][0].self_attention
    for layer, (keys, values) in enumerate(zip(block.k_LBKSH, block.v_LBKSH, strict=True)):
      if "xpos" in model.positions:
        # torchscale caches keys before xPos, whose inverse is the one of the opposite position.
        keys = keys.swapaxes(1, 2)
        keys = xpos(keys, keys, -options["positions_BT"], scale_base=model.xpos_scale_base)[1]
        keys = keys.swapaxes(1, 2)
      outputs[f"output/cache_key/{layer}"] = keys
      outputs[f"output/cache_value/{layer}"] = values
  return _with_loss(case, outputs)


def _decoded(apply, variables, tokens, starts, init_state, **first):
  """Logits and state of decoding a sequence in pieces that begin at `starts`."""
  state, pieces = init_state(*tokens.shape), []
  for start, end in zip(starts, [*starts[1:], tokens.shape[1]], strict=True):
    logits, state = apply(variables, tokens[:, start:end], state=state, **first)
    first, pieces = {}, [*pieces, logits]
  return jnp.concatenate(pieces, axis=1), state


def _encoder_decoder(case, params):
  model, variables, inputs = case.model, {"params": params}, case.inputs
  tokens, source = inputs["prev_output_tokens"], inputs["src_tokens"]
  at = lambda array: jnp.arange(array.shape[1])[None] * jnp.ones((array.shape[0], 1), jnp.int32)
  apply = functools.partial(model.apply, variables)
  source_mask, mask = _mask(case, "encoder_padding_mask"), _mask(case, "self_attn_padding_mask")
  memory, encoder_hidden = apply(
    source, mask_BT=source_mask, positions_BT=at(source), return_hidden_states=True, method="encode"
  )
  cross = {"memory_BSD": memory, "memory_mask_BS": source_mask}
  decode = functools.partial(model.apply, method="decode")
  logits, hidden = decode(
    variables, tokens, mask_BT=mask, positions_BT=at(tokens), return_hidden_states=True, **cross
  )
  outputs = {
    "output/encoder_out": memory,
    "output/logits": logits,
    # torchscale's own forward passes no masks on; its full and stepwise calls none of the target.
    "output/logits_module_forward_without_masks": apply(source, tokens),
    "output/logits_full_no_target_mask": decode(variables, tokens, **cross),
  }
  init_state = lambda b, t: apply(b, t, source.shape[1], method="init_state")
  steps = range(tokens.shape[1])
  stepwise, _ = _decoded(decode, variables, tokens, [*steps], init_state, **cross)
  outputs["output/logits_incremental_no_target_mask"] = stepwise
  outputs |= _streams(encoder_hidden, "enc_hidden") | _streams(hidden, "dec_hidden")
  return _with_loss(case, outputs)


def _beit3(case, params):
  inputs, images = case.inputs, case.inputs.get("visual_tokens")
  parts = {
    "images_BHWC": None if images is None else jnp.asarray(images).transpose(0, 2, 3, 1),
    "tokens_BT": inputs.get("textual_tokens"),
    "masked_BP": inputs.get("vision_masked_position"),
  }
  apply = functools.partial(case.model.apply, {"params": params}, **parts)
  embedded = jnp.concatenate([*apply(method="embed").values()], axis=1)
  tokens = parts["tokens_BT"]
  out, hidden = apply(
    mask_BT=_mask(case, "text_padding_position"),
    positions_BT=None if tokens is None else jnp.arange(tokens.shape[1])[None],
    visible_BTT=_allowed(case),
    return_hidden_states=True,
  )
  outputs = {"output/encoder_out": out, "output/encoder_embedding": embedded} | _streams(hidden)
  return _with_loss(case, outputs)


# ---------------------------------------------------------------------------------------------
# fairseq's files
# ---------------------------------------------------------------------------------------------


def _fairseq(case: Case):
  case.inputs = case.under("in/")
  case.fed = {f"in/{name}" for name in case.inputs}
  if case.config["kind"] == "decoder_layer":
    _fairseq_layer(case)
    return
  meta = case.config
  kind = "encoder" if meta["kind"] == "masked_lm" else "decoder"
  arguments = {
    f"{kind}_attention_heads": meta["heads"],
    f"{kind}_embed_dim": meta["embed_dim"],
    f"{kind}_ffn_embed_dim": meta["ffn_dim"],
    f"{kind}_layers": meta["layers"],
    f"{kind}_normalize_before": meta["normalize_before"],
    "activation_fn": meta["activation"],
    "no_scale_embedding": meta["embed_scale"] == 1.0,
  }
  if "head_scale_position" in meta and "heads" in meta["flags"]:
    arguments["head_scale"] = meta["head_scale_position"]
  case.model, case.variables, case.rest = fairseq.read(case.state_dict, arguments)
  legacy = any(name.endswith("alpha2") for name in case.state_dict)
  case.places = fairseq.places(case.model, legacy)
  case.write = lambda params: (
    case.rest | convert.to_fairseq(case.model, {"params": params}, legacy=legacy)
  )
  forward = {"decoder_lm": _lm, "masked_lm": _mlm, "train": _train}[meta["kind"]]
  case.forward = functools.partial(forward, case)


def _time_major(hidden):
  return {f"hidden/{i}": stream.swapaxes(0, 1) for i, stream in enumerate(hidden)}


def _lm(case, params):
  tokens, targets = case.inputs["prev_output_tokens"], case.inputs["target"]
  pad = case.config["pad"]
  logits, hidden = case.model.apply(
    {"params": params}, tokens, mask_BT=tokens != pad, return_hidden_states=True
  )
  real = targets != pad
  loss = cross_entropy(logits, targets, real)
  outputs = {
    "out/logits": logits,
    "out/loss_sum": loss * real.sum(),
    "out/ntokens": real.sum(),
  }
  return loss, outputs | _time_major(hidden)


def _mlm(case, params):
  tokens, masked = case.inputs["src_tokens"], case.inputs["masked"]
  mask = tokens != case.config["pad"]
  logits, hidden = case.model.apply(
    {"params": params}, tokens, mask_BT=mask, return_hidden_states=True
  )
  loss = cross_entropy(logits, case.inputs["target"], masked)
  outputs = {
    "out/logits": logits,
    "out/logits_masked": logits[np.nonzero(masked)],
    "out/features": _normed(case.model.encoder, params["encoder"], hidden),
    "out/loss_sum": loss * masked.sum(),
    "out/nmasked": masked.sum(),
  }
  return loss, outputs | _time_major(hidden)


def _fairseq_layer(case: Case):
  """One layer: a stack of one, without embeddings."""
  meta, tensors = case.config, case.state_dict
  placement = meta["head_scale_position"] if "heads" in meta["flags"] else None
  scale_of = lambda name: "vector" if name in tensors else None
  attention, ffn = fairseq.sublayers(
    tensors.__contains__, placement, scale_of, is_pre=meta["normalize_before"]
  )
  cross = None
  if meta["cross_attention"]:
    plain = records.Attention(frozenset({"in" if meta["normalize_before"] else "post"}))
    cross = plain
  architecture = records.Architecture("decoder", 0, 1, meta["embed_dim"])
  stack = recipes.normformer(architecture).decoder
  segment = records.Segment((records.Layer(attention, ffn, cross),), 1)
  record = dataclasses.replace(stack, segments=(segment,), final_norm=False)
  attention = functools.partial(Attention, meta["heads"])
  block = functools.partial(
    Block,
    attention=functools.partial(attention, is_causal=True),
    cross_attention=functools.partial(attention, is_cross=True),
    feed_forward=functools.partial(
      FeedForward, meta["ffn_dim"], activation=fairseq.ACTIVATIONS[meta["activation"]]
    ),
  )
  case.model = Stack(block)
  inputs = {name: jnp.asarray(array) for name, array in case.inputs.items()}
  x_BTD = inputs["x"].swapaxes(0, 1)
  ids = jnp.ones(x_BTD.shape[:2], jnp.int32)
  own = jnp.where(inputs["self_attn_padding_mask"], -1, ids)
  context = Context(positions_of(ids.shape, None), (ids, own))
  # Gradients of what a layer reads are in the file too, under names of their own.
  reads = {"__x__": inputs["x"]}
  if cross:
    reads["__encoder_out__"] = inputs["encoder_out"]
    seen = jnp.where(inputs["encoder_padding_mask"], 0, 1)
    memory = inputs["encoder_out"].swapaxes(0, 1)
    context = context._replace(memory_BSD=memory, memory_segment_ids=(ids, seen))
  shapes = layout.shapes_of(case.model, x_BTD, record, context)
  case.places = layout.places(shapes, lambda path, _: fairseq.layer_name(path, legacy=False))
  params, rest = layout.read(case.places, tensors)
  assert not rest
  case.variables = {"params": {"layer": params, "reads": reads}}
  case.state_dict = tensors | {name: np.asarray(array) for name, array in reads.items()}
  case.write = lambda tree: layout.write(case.places, tree["layer"]) | tree["reads"]

  def forward(tree):
    reads = {name: array.swapaxes(0, 1) for name, array in tree["reads"].items()}
    given = context._replace(memory_BSD=reads.get("__encoder_out__"))
    out = case.model.apply({"params": tree["layer"]}, reads["__x__"], record, given)
    y_TBD = out.x_BTD.swapaxes(0, 1)
    return jnp.sum(y_TBD * inputs["w"]), {"out/y": y_TBD}

  case.forward = forward


def _train(case, params):
  """fairseq's Adam with its decoupled decay of every parameter, a step a batch; then batch 0 again.

  Its epsilon is added before the second moment's bias is corrected, so that at step t it is
  eps / sqrt(1 - b2^t) of optax's: after 5 steps the logits are 4e-4 apart.
  """
  meta = case.config
  adam = meta["optimizer"]
  assert (adam["name"], adam["schedule"]) == ("adam", "constant")
  (b1, b2), lr, decay = adam["betas"], adam["lr"], adam["weight_decay"]
  tokens, targets = case.inputs["prev_output_tokens"], case.inputs["target"]

  def score(params, batch):
    logits = case.model.apply(
      {"params": params}, tokens[batch], mask_BT=tokens[batch] != meta["pad"]
    )
    return cross_entropy(logits, targets[batch], targets[batch] != meta["pad"]), logits

  losses, norms = [], []
  first = second = jax.tree.map(jnp.zeros_like, params)
  for batch in range(len(tokens)):
    (loss, _), gradients = jax.value_and_grad(score, has_aux=True)(params, batch)
    first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, gradients)
    second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, second, gradients)
    step = lr * np.sqrt(1 - b2 ** (batch + 1)) / (1 - b1 ** (batch + 1))
    params = jax.tree.map(
      lambda p, m, v, step=step: p - lr * decay * p - step * m / (jnp.sqrt(v) + adam["eps"]),
      params,
      first,
      second,
    )
    losses.append(loss)
    norms.append(optax.tree.norm(gradients))
  final_loss, final_logits = score(params, 0)
  outputs = {
    "out/losses": jnp.stack(losses),
    "out/grad_norm": jnp.stack(norms),
    "out/final_loss": final_loss,
    "out/final_logits": final_logits,
  }
  return final_loss, outputs | {"after": params}


# ---------------------------------------------------------------------------------------------
# The properties
# ---------------------------------------------------------------------------------------------


def test_outputs_match(case):
  """Outputs, hidden states and loss, at every position that the reference gives a meaning to."""
  computed, _ = case.computed
  gradients = {key for key in case.arrays if key.startswith(("grad/", case.prefix))}
  expected = {k: v for k, v in case.arrays.items() if k not in gradients | case.fed}
  assert expected, "the file holds nothing to compare"
  for key, value in expected.items():
    assert key in computed, f"{key} is in the file, and nothing computes it"
    ours = np.asarray(computed[key])
    assert ours.shape == value.shape, key
    if "compare_logits_only_where" in case.config and key == "out/logits":
      real = case.inputs["target"] != case.config["pad"]
      ours, value = ours[real], value[real]
    np.testing.assert_allclose(ours, value, rtol=1e-5, atol=ATOL, err_msg=key)


def test_gradients_match(case):
  """Every gradient; what the reference gives none has none here."""
  expected = case.under("grad/")
  if not expected:
    has_none = case.config.get("loss") is None or case.config["kind"] == "train"
    assert has_none, "gradients are missing"
    return
  _, gradients = case.computed
  largest = max(np.abs(value).max() for value in expected.values())
  for name, value in expected.items():
    tolerance = OF_TENSOR * np.abs(value).max() + OF_MODEL * largest
    np.testing.assert_allclose(gradients[name], value, rtol=0, atol=tolerance, err_msg=name)
  for name in {place.name for place in case.places} - set(expected):
    assert not np.any(gradients[name]), f"{name} has a gradient here, and none in the reference"


def test_round_trip_is_exact(case):
  """The state dict comes back, name for name and bit for bit."""
  written = case.write(case.variables["params"])
  assert written.keys() == case.state_dict.keys()
  for name, tensor in case.state_dict.items():
    assert written[name].dtype == tensor.dtype, name
    np.testing.assert_array_equal(written[name], tensor, err_msg=name)
