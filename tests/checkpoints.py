"""Small models with random weights, and what every converter must do with them."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from magneto_jax.convert import beit3 as released
from magneto_jax.convert import layout, torchscale
from magneto_jax.convert.facts import check_same
from magneto_jax.convert.files import ConversionError
from magneto_jax.models.beit3 import BEiT3
from magneto_jax.models.encoder import Encoder
from magneto_jax.models.encoder_decoder import EncoderDecoder
from magneto_jax.models.language import CausalLM, MaskedLM
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture


def stack(recipe="magneto", kind="decoder", *, depths=(2, 3), of=None, **fields):
  """The fields of a stack of `kind`, of an encoder-decoder if `of` says so."""
  of = of or kind
  depths = dict(zip(("encoder", "decoder"), depths, strict=True))
  layers = {f"{name}_layers": depths[name] for name in of.split("_")}
  architecture = Architecture(of, **layers, width=8, ffn_width=12, heads=2)
  record = RECIPES[recipe](architecture) if isinstance(recipe, str) else recipe(architecture)
  own = {"recipe": getattr(record, kind), "width": 8, "num_heads": 2, "ffn_width": 12}
  return own | {"positions": "learned", "max_length": 6, "position_offset": 2} | fields


def decoder(recipe="magneto", *, tied=False, **fields) -> CausalLM:
  return CausalLM(vocab_size=7, tied=tied, **stack(recipe, **fields))


def encoder(recipe="magneto", **fields) -> Encoder:
  return Encoder(**{"vocab_size": 7} | stack(recipe, "encoder", **fields))


def masked_lm(recipe="magneto", *, tied=True, head="linear", **fields) -> MaskedLM:
  return MaskedLM(encoder=encoder(recipe, **fields), tied=tied, head=head)


def encoder_decoder(recipe="magneto", *, tied=False, shared=False, **fields) -> EncoderDecoder:
  fields["of"] = "encoder_decoder"
  return EncoderDecoder(
    encoder=encoder(recipe, **fields),
    decoder=decoder(recipe, tied=tied, **fields),
    shared_embedding=shared,
  )


def beit3(recipe="magneto_torchscale", **fields) -> BEiT3:
  none = {"vocab_size": None, "positions": "none", "experts": ("vision", "text")}
  return BEiT3(
    encoder=encoder(recipe, **none | fields),
    vocab_size=7,
    num_patches=4,
    patch_size=2,
    max_text_length=5,
    position_offset=2,
  )


def with_norms(recipe: str, **changes):
  """A recipe whose every sublayer is changed so, for what no named recipe is."""

  def function(architecture):
    def changed(record):
      if record is None:
        return None
      (segment,) = record.segments
      (layer,) = segment.pattern
      parts = {n: dataclasses.replace(s, **changes) for n, s in layer.sublayers.items()}
      pattern = (dataclasses.replace(layer, **parts),)
      return dataclasses.replace(record, segments=(dataclasses.replace(segment, pattern=pattern),))

    found = RECIPES[recipe](architecture)
    return dataclasses.replace(
      found, encoder=changed(found.encoder), decoder=changed(found.decoder)
    )

  return function


@functools.cache
def _shapes(model):
  if isinstance(getattr(model, "encoder", None), BEiT3):
    return layout.shapes_of(model, *released.inputs_of(model))
  args, kwargs = torchscale.inputs_of(model)
  return layout.shapes_of(model, *args, **kwargs)


def weights(model, seed=0) -> dict:
  """Random numbers for every parameter of a model."""
  draw = np.random.default_rng(seed).standard_normal
  return {"params": jax.tree.map(lambda leaf: draw(leaf.shape, np.float32), _shapes(model))}


def assert_same_tensors(found, expected):
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name], tensor, strict=True, err_msg=name)


def assert_round_trip(model, read, write, config) -> dict[str, np.ndarray]:
  """There and back again, twice: the weights, the model, and the tensors; returns the tensors."""
  variables = weights(model)
  tensors = write(model, variables)
  again, read_variables = read(tensors, config)
  assert type(again) is type(model)
  check_same(model, again, "the file")
  jax.tree.map(np.testing.assert_array_equal, read_variables, variables)
  assert_same_tensors(write(again, read_variables), tensors)
  return tensors


def message(run, *args, **kwargs) -> str:
  """The text of a ConversionError, which is one line."""
  with pytest.raises(ConversionError) as caught:
    run(*args, **kwargs)
  text = str(caught.value)
  assert len(text.splitlines()) == 1, text
  return text


def assert_each_is_accounted_for(read, tensors, config, optional=()):
  """A tensor that is missing, unknown or of another shape is named, whichever it is."""
  for number, name in enumerate(sorted(tensors.keys() - set(optional))):
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    text = message(read, rest, config)
    assert re.search(r"missing: (\S+, )*" + re.escape(name), text), (name, text)
    if number % 4 == 0:
      text = message(read, rest | {name: tensors[name][..., None]}, config)
      assert f"wrong shape: {name}" in text
  for name in ("extra", "layers.0.extra.weight", "evil\x1b[2J\n"):
    text = message(read, tensors | {name: np.zeros(3, np.float32)}, config)
    assert f"unknown: {name if name.isprintable() else repr(name)}" in text
