"""Diagnosis of real models: what is measured, beside what the theory predicts of it.

The long table (`slow`) asks each recipe, as encoder and as decoder, at three depths, for the errors
that are stated below. It is about an hour of one core.
"""

import dataclasses
import functools
import itertools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from benchmarks import prediction
from benchmarks.coordinator import RESULTS
from magneto_jax import diagnostics
from magneto_jax.layers.cross_entropy import scores_of
from magneto_jax.models import BEiT3, CausalLM, Encoder, EncoderDecoder, MaskedLM, VisionEncoder
from magneto_jax.theory import propagation
from magneto_jax.theory.recipes import RECIPES
from magneto_jax.theory.records import Architecture
from tests.models.common import compiled

# ---------------------------------------------------------------------------------------------
# Measured against predicted
# ---------------------------------------------------------------------------------------------


@functools.cache
def cell(name: str, kind: str, depth: int, seeds: int = prediction.SEEDS) -> dict:
  return prediction.cell(name, kind, depth, seeds=seeds)


def has_post(name: str, kind: str) -> bool:
  layer = prediction.build(name, kind, 12).recipe.layers[0]
  return any("post" in sub.norms for sub in layer.sublayers.values())


# Their gradient is followed closely; that of Post-LN falls exponentially, and its slope is.
FOLLOWED = ("deepnet", "keel", "deepscalelm, post")


def check(name: str, kind: str, found: dict) -> None:
  """The errors that docs/theory.md states, of means over models.

  The stream's variance within 10 % (with a norm at the site post: before it, at every layer, else
  in the mean over layers), the correlation within 0.08 (decoders 0.11, post 0.06), and of encoders
  the gradient's logarithm within 0.5 (FOLLOWED: 0.25, and decoders 0.4). Of a Post-LN encoder its
  slope within 10 % and 0.01 a layer (0.03 at 12 layers): the gradient falls exponentially; a
  decoder's gathers on the first tokens. Out-norm's scores are outside the softmax's validity: the
  logarithm is within 40 % of its range.
  """
  post = has_post(name, kind)
  assert found["variance_largest" if post else "variance_mean"] <= 0.10
  assert found["correlation"] <= (0.06 if post else 0.11 if kind == "decoder" else 0.08)
  if name == "post_ln" and kind == "encoder":
    measured = found["slope_measured"]
    apart = abs(found["slope_predicted"] - measured)
    # The middle half of 12 layers is seven points of a fluctuating curve.
    assert apart <= (0.03 if found["layers"] == 12 else 0.01 + 0.10 * abs(measured))
  elif name in FOLLOWED:
    assert found["log_gradient"] <= (0.25 if kind == "encoder" else 0.4)
  elif name == "out_norm":
    measured = [value for value in found["measured"]["log_gradient"] if value is not None]
    assert found["log_gradient"] <= 0.4 * max(abs(v) for v in measured if math.isfinite(v))
  elif kind == "encoder":
    assert found["log_gradient"] <= 0.5


QUICK = {("magneto", "encoder", 12): 3, ("pre_ln", "decoder", 12): 3}
TABLE = list(itertools.product(prediction.VARIANTS, prediction.KINDS, prediction.DEPTHS))


@pytest.mark.parametrize("case", QUICK, ids=lambda case: "-".join(map(str, case)))
def test_predictions_hold_of_a_few_real_models(case):
  check(*case[:2], cell(*case, seeds=QUICK[case]))


@pytest.mark.slow
@pytest.mark.parametrize("name, kind, depth", TABLE)
def test_predictions_hold_of_real_models(name, kind, depth):
  check(name, kind, cell(name, kind, depth))


def median_of_streams(kind: str, cells: dict[str, dict]) -> float:
  """Of recipes without a norm at the site post."""
  return np.median([e["variance_mean"] for name, e in cells.items() if not has_post(name, kind)])


@pytest.mark.slow
@pytest.mark.parametrize("depth", prediction.DEPTHS)
@pytest.mark.parametrize("kind", prediction.KINDS)
def test_the_stream_is_predicted_within_five_per_cent_in_the_median(kind, depth):
  """In one process it reads what the table measured."""
  cells = {name: cell(name, kind, depth) for name in prediction.VARIANTS}
  assert median_of_streams(kind, cells) <= 0.05


def test_the_results_that_are_kept_hold_all_of_this():
  """Every recipe, encoder and decoder, at every depth; and the page quotes them."""
  results = json.loads(max(RESULTS.glob("prediction-*.json")).read_text())
  cells = {(row["recipe"], row["kind"], row["layers"]): row for row in results["cells"]}
  assert sorted(cells) == sorted(TABLE)
  assert all(row["seeds"] >= 8 for row in results["cells"])
  for (name, kind, _), found in cells.items():
    check(name, kind, found)
  for kind, depth in itertools.product(prediction.KINDS, prediction.DEPTHS):
    at = {name: row for (name, k, d), row in cells.items() if (k, d) == (kind, depth)}
    assert median_of_streams(kind, at) <= 0.05
  page = (RESULTS.parents[1] / "docs" / "theory.md").read_text()
  assert "\n".join(prediction.table(results)) in page


# ---------------------------------------------------------------------------------------------
# Tiny models of every kind
# ---------------------------------------------------------------------------------------------

TINY = {"width": 16, "num_heads": 2, "ffn_width": 32, "remat": "full"}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 17, (2, 6)).astype(np.int32)
IMAGES = RNG.standard_normal((2, 4, 4, 3)).astype(np.float32)


def tiny_recipe(name, kind, layers=2):
  depths = {f"{stack}_layers": layers for stack in kind.split("_")}
  return RECIPES[name](Architecture(kind, **depths, width=16, ffn_width=32, heads=2))


def tiny_encoder(name="pre_ln", layers=2, **options) -> Encoder:
  own = TINY | {"vocab_size": 17, "positions": "rotary"} | options
  return Encoder(recipe=tiny_recipe(name, "encoder", layers).encoder, **own)


def tiny_decoder(name="pre_ln", layers=2, **options) -> CausalLM:
  own = TINY | {"vocab_size": 17, "positions": "rotary"} | options
  return CausalLM(recipe=tiny_recipe(name, "decoder", layers).decoder, **own)


def tiny_both() -> EncoderDecoder:
  recipe, own = tiny_recipe("magneto", "encoder_decoder"), TINY | {"vocab_size": 17}
  return EncoderDecoder(
    encoder=Encoder(recipe=recipe.encoder, **own), decoder=CausalLM(recipe=recipe.decoder, **own)
  )


def tiny_beit3() -> BEiT3:
  encoder = tiny_encoder(experts=("vision", "text"), positions="none", vocab_size=None)
  return BEiT3(encoder=encoder, vocab_size=17, num_patches=4, patch_size=2, max_text_length=6)


# name: (model, arguments, stacks, tokens a sample).
MODELS = {
  "causal_lm": (tiny_decoder, (TOKENS,), ("decoder",), 6),
  "encoder": (tiny_encoder, (TOKENS,), ("encoder",), 6),
  "masked_lm": (lambda: MaskedLM(encoder=tiny_encoder("deepnet")), (TOKENS,), ("encoder",), 6),
  "encoder_decoder": (tiny_both, (TOKENS[:, ::-1].copy(), TOKENS), ("encoder", "decoder"), 6),
  "vision": (
    lambda: VisionEncoder(encoder=tiny_encoder(vocab_size=None), patch_size=2),
    (IMAGES,),
    ("encoder",),
    5,
  ),
  "beit3": (tiny_beit3, (IMAGES, TOKENS), ("encoder",), 11),
}


def refuse(constant):
  raise ValueError(f"{constant} is no JSON")


def as_text(diagnosis) -> str:
  """The diagnosis as strict JSON, read back."""
  text = json.dumps(diagnosis.as_json(), allow_nan=False)
  json.loads(text, parse_constant=refuse)
  return text


@pytest.mark.parametrize("name", MODELS)
def test_the_stacks_of_every_model_are_found(name):
  make, _, stacks, _ = MODELS[name]
  parts = diagnostics.parts_of(make())
  assert tuple(parts) == stacks
  for kind, part in parts.items():
    assert part.is_causal == (kind == "decoder")
    assert part.backbone.recipe.num_layers == 2


class Two(nn.Module):
  first: Encoder
  second: Encoder


@pytest.mark.parametrize("make", [lambda: nn.Dense(3), lambda: Two(tiny_encoder(), tiny_encoder())])
def test_a_module_without_stacks_of_its_own_is_refused(make):
  with pytest.raises(TypeError, match="has no stack of layers that can be measured"):
    diagnostics.parts_of(make())


@pytest.mark.parametrize(
  "name", [n if n == "causal_lm" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_every_model_is_diagnosed(name, tmp_path):
  """From the model and a batch to figures, JSON and a picture; the same again; float32."""
  make, args, stacks, tokens = MODELS[name]
  found = diagnostics.diagnose(make(), *args, name=name)
  assert tuple(found.measured) == tuple(found.predicted) == stacks
  for m, p in zip(found.measured.values(), found.predicted.values(), strict=True):
    assert m.tokens == tokens
    for values in (*m[:5], *p[:4]):
      assert values.shape == (3,) and np.all(np.isfinite(values))
    # Width 16 is far from infinite: the sum of squares is near, no more.
    assert p.variance == pytest.approx(m.variance, rel=0.7)
    assert p.variance[0] == pytest.approx(m.variance[0], rel=1e-6)
  assert 0.1 < found.predicted_update.matrices / found.update.matrices < 10
  assert math.isnan(found.update_ratio) and '"matrices_over_baseline": null' in as_text(found)
  path = diagnostics.draw([found], tmp_path / "x.png", title=name)
  assert path.read_bytes().startswith(b"\x89PNG")
  if name == "encoder":
    again = diagnostics.diagnose(make(), *args, name=name)
    assert as_text(again) == as_text(found)
    other = diagnostics.diagnose(make(), *args, name=name, seed=1, baseline=found)
    assert as_text(other) != as_text(found)
    assert other.update_ratio == other.update.matrices / found.update.matrices


@pytest.mark.slow
def test_recomputation_changes_no_figure():
  kept, recomputed = (
    diagnostics.diagnose(tiny_decoder(remat=remat), TOKENS) for remat in ("none", "full")
  )
  for a, b in zip(kept.measured["decoder"], recomputed.measured["decoder"], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(kept.update, recomputed.update, rtol=1e-4)


@pytest.mark.slow
def test_static_arguments_and_arrays_with_one_row_pass():
  """A mask [1, T, T] holds for all samples; return values of any structure are projected."""
  visible = np.tri(6, dtype=bool)[None]
  found = diagnostics.diagnose(tiny_encoder(), TOKENS, visible_BTT=visible)
  assert np.all(np.isfinite(found.measured["encoder"].gradient))


@pytest.mark.slow
@pytest.mark.parametrize("tokens", (np.zeros((2, 6), np.int32), TOKENS[:, :1]))
def test_batches_without_variety_are_diagnosed(tokens):
  """All tokens alike, and one token a sample."""
  found = diagnostics.diagnose(tiny_encoder(), tokens)
  expected = 1.0 if tokens.shape[1] > 1 else 0.0
  np.testing.assert_allclose(found.measured["encoder"].correlation, expected, atol=1e-5)
  as_text(found)


def test_the_setting_is_read_from_the_model():
  model = tiny_decoder(
    window=(3, 0), num_kv_heads=1, head_dim=4, use_bias=False, dropout_rate=0.1, drop_path_rate=0.2
  )
  (part,) = diagnostics.parts_of(model).values()
  setting = diagnostics.setting_of(part, 6)
  assert (setting.kv_features, setting.query_features) == (4, 8)
  assert (setting.reach, setting.is_causal, setting.use_bias) == (4, True, False)
  assert (setting.dropout, setting.drop_path) == (0.1, 0.2)
  assert setting.rotation == propagation.rotation(6, 4) < 1
  (part,) = diagnostics.parts_of(tiny_encoder(window=(2, 3), positions="none")).values()
  setting = diagnostics.setting_of(part, 6)
  assert (setting.reach, setting.rotation, setting.bias_variance) == (6, 1.0, 0.0)
  (part,) = diagnostics.parts_of(tiny_encoder(window=(2, None), relative_buckets=8)).values()
  setting = diagnostics.setting_of(part, 6)
  assert setting.reach is None and setting.bias_variance == pytest.approx(1 / 16)


# ---------------------------------------------------------------------------------------------
# The first update
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("make", (tiny_encoder, tiny_decoder, tiny_both))
def test_the_first_update_is_a_small_step_of_sgd(make):
  """(F(theta - eta g) - F(theta)) / eta in float64; 1e-4."""
  with jax.enable_x64(True):
    model = make() if make is tiny_both else make(dtype=jnp.float64)
    args = (TOKENS, TOKENS[:, ::-1].copy())[: 2 if make is tiny_both else 1]
    if make is tiny_both:
      model = EncoderDecoder(
        encoder=model.encoder.clone(dtype=jnp.float64),
        decoder=model.decoder.clone(dtype=jnp.float64),
      )
    params = model.init(jax.random.key(0), *args)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    loss = diagnostics.random_projection(jax.random.key(1))
    call = diagnostics.Call(args, {}, loss, jax.random.key(2))
    update = compiled(lambda params: diagnostics.first_update(model, params, call))(params)
    output = lambda params: call.apply(model, {"params": params})
    run, gradient = compiled(output), compiled(jax.grad(lambda params: loss(output(params))))
    gradient = gradient(params)
    eta = 1e-4
    for expected, is_moved in (
      (update.matrices, diagnostics.is_matrix),
      (update.everything, diagnostics.is_of_a_layer),
    ):
      moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf, g, is_moved=is_moved: leaf - eta * g * is_moved(path),
        params,
        gradient,
      )
      change = np.sqrt(np.mean((run(moved) - run(params)) ** 2)) / eta
      np.testing.assert_allclose(change, expected, rtol=1e-4)
  moved = [
    "/".join(key.key for key in path)
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    if diagnostics.is_matrix(path)
  ]
  assert moved and all("segment_" in name and name.endswith("kernel") for name in moved)


class Scorer(nn.Module):
  """A layer and a vocabulary: what a language model is to the first update."""

  @nn.compact
  def __call__(self, x_BTD, *, targets_BT=None, deterministic=True):
    x_BTD = nn.Dense(8, name="segment_0")(x_BTD)
    table_VD = self.param("table", nn.initializers.normal(1.0), (17, 8))
    return scores_of(x_BTD, table_VD, targets_BT, chunk=5)


def test_the_first_update_of_a_scored_call_is_of_the_logits():
  """Which move, and not only what the targets cost; also where the loss takes them by chunks."""
  model, x_BTD = Scorer(), jax.random.normal(jax.random.key(0), (*TOKENS.shape, 4))
  params = model.init(jax.random.key(1), x_BTD)["params"]
  targets = TOKENS[:, ::-1].astype(np.int32)
  costs = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  calls = (
    diagnostics.Call((x_BTD,), {"targets_BT": targets}, jnp.mean, jax.random.key(2)),
    diagnostics.Call((x_BTD,), {}, lambda logits: jnp.mean(costs(logits)), jax.random.key(2)),
  )
  run = lambda params: [diagnostics.first_update(model, params, call) for call in calls]
  np.testing.assert_allclose(*compiled(run)(params), rtol=1e-5)  # float32


def middle_model(name, layers):
  recipe = RECIPES[name](Architecture("encoder", layers, width=64, ffn_width=256, heads=4))
  return Encoder(
    recipe=recipe.encoder,
    vocab_size=64,
    width=64,
    num_heads=4,
    ffn_width=256,
    positions="rotary",
    remat="full",
  )


@functools.cache
def updates(name, layers, batch=2, seeds=4) -> tuple[float, float]:
  """(measured, predicted) first update of the matrices: geometric means over seeds."""
  model, found = middle_model(name, layers), []

  @jax.jit
  def run(key, tokens_BT):
    params = model.init(key, tokens_BT)["params"]
    loss = diagnostics.random_projection(jax.random.fold_in(key, 1))
    call = lambda tokens_BT: diagnostics.Call((tokens_BT,), {}, loss, jax.random.fold_in(key, 2))
    update = diagnostics.first_update(model, params, call(tokens_BT[:1]))
    return update, diagnostics.statistics(model, params, call(tokens_BT))

  for seed in range(seeds):
    tokens_BT = np.random.default_rng(seed).integers(0, 64, (batch, 16)).astype(np.int32)
    update, taken = run(jax.random.key(seed), tokens_BT)
    predicted = diagnostics.predict(model, diagnostics.profiles_of(model, *taken), batch)[1]
    found.append((float(update.matrices), predicted.matrices))
  return tuple(np.exp(np.log(found).mean(axis=0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("pre_ln", "deepnet", "magneto"))
def test_the_first_update_is_predicted_within_a_factor(name):
  """3 in itself, 2 in its growth from 6 to 24 layers."""
  for layers in (6, 24):
    measured, predicted = updates(name, layers)
    assert 1 / 3 < predicted / measured < 3
  growth = [
    deep / shallow for deep, shallow in zip(updates(name, 24), updates(name, 6), strict=True)
  ]
  assert 1 / 2 < growth[1] / growth[0] < 2


def test_the_updates_prediction_is_of_one_sample():
  """The same figures of a batch of 8 samples are of 8 times smaller gradients a sample."""
  flat = np.ones(3)
  measured = diagnostics.Measured(flat, 0.1 * flat, 1e-4 * flat, 0 * flat, flat, 6)
  model, given = tiny_encoder(), {"encoder": measured}
  one, eight = (diagnostics.predict(model, given, samples)[1] for samples in (1, 8))
  np.testing.assert_allclose(eight, 8 * np.array(one), rtol=1e-9)


# ---------------------------------------------------------------------------------------------
# Findings
# ---------------------------------------------------------------------------------------------


def made_up(**given) -> diagnostics.Measured:
  figures = {
    "variance": [1, 2, 3, 4],
    "correlation": [0.1, 0.2, 0.3, 0.4],
    "gradient": [4, 3, 2, 1],
  }
  figures |= {"gradient_correlation": [0, 0, 0, 0], "largest": [4, 5, 6, 7]} | given
  return diagnostics.Measured(**{k: np.array(v, float) for k, v in figures.items()}, tokens=6)


@pytest.mark.parametrize(
  "given, figure, words",
  [
    ({}, None, ""),
    ({"gradient": [1, 1e9, 1e3, 1]}, "gradient", "explodes"),
    ({"gradient": [1, 1e-9, 1e-3, 1]}, "gradient", "vanishes"),
    ({"gradient": [1, math.inf, 1, 1]}, "gradient", "not finite"),
    ({"correlation": [0, 0.5, 0.999, 1]}, "correlation", "from layer 2 on"),
    ({"largest": [1, 1, 1e5, 1e6]}, "float16", "overflows float16"),
    ({"largest": [1, 1, 1e4, 1e4]}, "float16", "comes within 8 times"),
  ],
)
def test_findings_are_of_what_was_measured(given, figure, words):
  found = diagnostics.findings_of({"encoder": made_up(**given)})
  assert [f.figure for f in found] == [figure] * bool(figure)
  assert all(words in f.text for f in found)
  # Of two stacks it is said which.
  both = diagnostics.findings_of({"encoder": made_up(), "decoder": made_up(**given)})
  assert [f.text for f in both] == [f"decoder: {f.text}" for f in found]


@pytest.mark.parametrize("field", ("variance", "correlation", "gradient", "gradient_correlation"))
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_what_is_not_finite_is_not_predicted(field, value):
  measured = made_up(**{field: [value] * 4})
  profiles, update = diagnostics.predict(tiny_encoder(layers=3), {"encoder": measured})
  assert np.all(np.isnan(profiles["encoder"].variance)) and math.isnan(update.matrices)
  assert "nothing is predicted" in profiles["encoder"].notes[0]


def test_a_gradient_of_zero_and_a_correlation_of_rounding_are_predicted():
  measured = made_up(gradient=[0] * 4, gradient_correlation=[math.nan] * 4)
  profiles, update = diagnostics.predict(tiny_encoder(layers=3), {"encoder": measured})
  assert np.all(profiles["encoder"].gradient == 0) and update.matrices == 0
  measured = made_up(correlation=[1.00001] * 4)
  profiles, _ = diagnostics.predict(tiny_encoder(layers=3), {"encoder": measured})
  assert np.all(profiles["encoder"].correlation <= 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_model_that_overflows_float16_is_diagnosed(tmp_path):
  """Embeddings of ten thousand: the stream comes near the largest float16; of a million: is inf."""
  found = []
  for scale in (4e4, 4e6):
    stack = tiny_recipe("pre_ln", "encoder").encoder
    embedding = dataclasses.replace(stack.embedding, scale=scale)
    stack = dataclasses.replace(stack, embedding=embedding)
    model = Encoder(recipe=stack, vocab_size=17, positions="rotary", dtype=jnp.float16, **TINY)
    found.append(diagnostics.diagnose(model, TOKENS, name=f"{scale:g}"))
  assert {"float16"} <= {finding.figure for finding in found[0].findings}
  assert "comes within" in found[0].findings[-1].text
  assert {"float16"} <= {finding.figure for finding in found[1].findings}
  assert any("nothing is predicted" in note for note in found[1].notes)
  as_text(found[1])
  assert diagnostics.draw(found, tmp_path / "x.png").exists()


def test_a_batch_is_some_thousand_tokens_and_no_more_rows_than_are_allowed():
  of = lambda samples: types.SimpleNamespace(train=samples, augment=None)
  data = of([{"inputs": np.full(100, i)} for i in range(30)])
  for rows, expected in ((4, 4), (50, 10)):
    batch = diagnostics.first_samples(data, rows, 100)
    np.testing.assert_array_equal(batch["inputs"][:, 0], np.arange(expected))
  data.augment = lambda sample, rng: sample | {"drawn": rng.integers(10**9, size=3)}
  drawn = diagnostics.first_samples(data, 4, 100)["drawn"]
  np.testing.assert_array_equal(drawn, diagnostics.first_samples(data, 4, 100)["drawn"])
  assert len(np.unique(drawn)) == 12
  assert len(diagnostics.first_samples(data, 8, 5000)["inputs"]) == 1
  with pytest.raises(ValueError, match="no sample of 100 tokens: give more text"):
    diagnostics.first_samples(of([]), 8, 100)
