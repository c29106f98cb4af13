"""Closed-form moments against a reference file, against simulations, and against each other.

`pytest tests/theory/moments_test.py --moments=FILE` reads another file of the form of
`tests/testdata/moments_reference.json`: sections of settings, each with the closed form's values
and those of a simulation with standard errors.
"""

import contextlib
import functools
import itertools
import json
import math
import pathlib
import warnings

import numpy as np
import pytest

from magneto_jax.theory import moments
from magneto_jax.theory.moments import Gradient, Moments, OutsideValidity

# Of a closed form against the file's: both are float64.
RTOL = 1e-9

# ---------------------------------------------------------------------------------------------
# The reference file: a function of the settings for each section
# ---------------------------------------------------------------------------------------------


def flat(x: Moments, g: Gradient | None = None) -> dict:
  """The moments by the file's names."""
  values = {"x_mean": x.mean, "x_var": x.variance, "x_cov": x.covariance}
  return values | ({"g_var": g.variance, "g_cov": g.covariance} if g else {})


def given(p) -> tuple[Moments, Gradient]:
  s2 = p.get("s2", 1.0)
  return (
    Moments(p.get("mu", 0.0), s2, p["r"] * s2),
    Gradient(p["g2"], p["rg"] * p["g2"]),
  )


def linear(p):
  x, g = given(p)
  return flat(
    moments.linear(x, fan_in=p["din"], weight_variance=p["sw2"]),
    moments.linear_gradient(g, fan_out=p["dout"], weight_variance=p["sw2"]),
  )


def dropout(p):
  x, g = given(p)
  return flat(moments.dropout(x, p["p"]), moments.dropout_gradient(g, p["p"]))


def activation(p, name):
  x, g = given(p)
  return flat(moments.activation(name, x), moments.activation_gradient(name, g, x))


def layer_norm(p, width):
  x, g = given(p)
  return flat(moments.layer_norm(x, width=width), moments.norm_gradient(g, x))


def softmax(p):
  values, g = {}, Gradient(p["g2"], 0.0)
  for form, suffix in (("full", ""), ("simple", "_approx"), ("ratio", "_ratio_form")):
    of_scores = dict(variance=p["s2"], correlation=p["r"], keys=p["L"], form=form)
    values["x_mean"], values[f"x_var{suffix}"] = moments.softmax(**of_scores)
    if form != "ratio":
      values[f"g_var{suffix}"] = moments.softmax_gradient(g, **of_scores).variance
  return values


def embedding(p):
  x = moments.embedding(
    moments.zipf(p["V"]), table_variance=1.0, tables=p["n_embd"], segments=p["segment"]
  )
  return {"r": x.correlation, "x_var": x.variance}


def projection(p, name, x=None):
  return moments.linear(x or given(p)[0], fan_in=p["d"], weight_variance=p[name])


def scores(p):
  x = Moments(0.0, p["s2"], p["r"] * p["s2"])
  row = moments.scores(projection(p, "sq2", x), projection(p, "sk2", x))
  return {"var": row.variance, "row_var": row.variance * (1 - row.key_correlation)}


def single_head(p):
  g = given(p)[1]
  row = moments.scores(projection(p, "sq2"), projection(p, "sk2"))
  of_rows = dict(keys=p["L"], causal=p["causal"], dropout=p["p"], width=p["d"])
  x = moments.attention_mixing(projection(p, "sv2"), row, **of_rows)
  paths = moments.attention_mixing_gradient(g, row, input_correlation=p["r"], **of_rows)
  unit = p["dk"] * p["sv2"] * p["g2"]
  into = Gradient(unit * paths.total.variance, unit * paths.total.covariance)
  return {name: value for name, value in flat(x, into).items() if name != "x_mean"}


def attention_block(p):
  x, g = given(p)
  values = dict(
    width=p["d"],
    keys=p["L"],
    qk_variance=p["sqk2"],
    v_variance=p["sv2"],
    out_variance=p["so2"],
    dropout=p["ph"],
    attention_dropout=p["pa"],
  )
  values = flat(
    moments.attention_block(x, **values), moments.attention_block_gradient(g, x, **values)
  )
  return {name: value for name, value in values.items() if name != "x_mean"}


def ffn_block(p):
  x, g = given(p)
  values = dict(
    width=p["d"],
    ffn_width=p["dff"],
    in_variance=p["s12"],
    out_variance=p["s22"],
    dropout=p["p"],
    activation=p["act"],
  )
  values = flat(moments.ffn_block(x, **values), moments.ffn_block_gradient(g, x, **values))
  return {name: value for name, value in values.items() if name != "x_mean"}


def correlation_schedule(p) -> list[float]:
  """r_l entering each layer, by which DeepScaleLM scales W_V and W_O."""
  kept, skip, branch = 1 - p["p_hidden"], p["lam"] ** 2, p["beta"] ** 2
  r, variance, entering = p["r0"] * kept, 1.0, []
  for _ in range(p["N"]):
    entering.append(r)
    for factor in (lambda r: 1.0, moments.kappa):
      total = skip * variance + branch
      r = (skip * variance * r + branch * kept * factor(r)) / total
      variance = total
  return entering


def weight_variances(p) -> tuple[float, float, list[float], list[float], float]:
  """Of an embedding table, W_Q and W_K, each layer's W_V and W_O, and the two of the FFN."""
  d, f, n, kept = p["d"], p["dff"], p["N"], 1 - p["p_hidden"]
  model = p["model"].split("_")[0]
  if model == "xavier":
    qkv = 2 / (d + d // p["heads"])
    return 1 / d, qkv, [qkv] * n, [1 / d] * n, 2 / (d + f)
  if model == "deepnorm":
    gain = (8 * n) ** -0.5
    return 1 / d, 1 / d, [gain / d] * n, [gain / d] * n, gain * 2 / (d + f)
  ffn = math.sqrt(2 * kept / (d * f))
  attention = {
    "dslm": lambda: [math.sqrt(kept / r) / d for r in correlation_schedule(p)],
    "simple": lambda: [ffn] * n,
  }[model]()
  return kept / 3, 1 / d, attention, attention, ffn


def stack(p):
  """Every layer's input, forwards, and its gradient, backwards, from the one-step functions."""
  table, qk, v, out, ffn = weight_variances(p)
  blocks = []
  for layer in range(p["N"]):
    of_attention = dict(
      width=p["d"],
      keys=p["L"],
      qk_variance=qk,
      v_variance=v[layer],
      out_variance=out[layer],
      dropout=p["p_hidden"],
      attention_dropout=p["p_attn"],
    )
    of_ffn = dict(
      width=p["d"],
      ffn_width=p["dff"],
      in_variance=ffn,
      out_variance=ffn,
      dropout=p["p_hidden"],
    )
    blocks += [
      (
        functools.partial(moments.attention_block, **of_attention),
        functools.partial(moments.attention_block_gradient, **of_attention),
      ),
      (
        functools.partial(moments.ffn_block, **of_ffn),
        functools.partial(moments.ffn_block_gradient, **of_ffn),
      ),
    ]
  scales = dict(skip=p["lam"], branch=p["beta"])
  x = moments.dropout(Moments(0.0, 3 * table, p["r0"] * 3 * table), p["p_hidden"])
  inputs = [x if p["pre_ln"] else moments.layer_norm(x)]
  for block, _ in blocks:
    step = moments.pre_ln if p["pre_ln"] else moments.post_ln
    inputs.append(step(inputs[-1], block, **scales))
  gradients = [Gradient(1.0, p["rg_top"])]
  for (block, gradient), x in zip(reversed(blocks), inputs[-2::-1], strict=True):
    if p["pre_ln"]:
      g = moments.pre_ln_gradient(gradients[-1], x, gradient, **scales)
    else:
      g = moments.post_ln_gradient(gradients[-1], x, block, gradient, **scales)
    gradients.append(g)
  inputs = [inputs[2 * layer] for layer in p["layers"]]
  gradients = [gradients[::-1][2 * layer] for layer in p["layers"]]
  return {
    "S": [x.variance for x in inputs],
    "r": [x.correlation for x in inputs],
    "g": [g.variance for g in gradients],
    "rg": [g.correlation for g in gradients],
  }


def rank_collapse(p):
  """Blocks one after the other, each on a normalised input, without residuals."""
  d = p["d"]
  of_attention = dict(keys=p["L"], qk_variance=1 / d, v_variance=1 / d, out_variance=1 / d)
  attention = functools.partial(
    moments.attention_block,
    width=d,
    dropout=p["p"],
    attention_dropout=p["p"],
    **of_attention,
  )
  ffn = functools.partial(
    moments.ffn_block,
    width=d,
    ffn_width=4 * d,
    in_variance=1 / d,
    out_variance=1 / d,
    dropout=p["p"],
  )
  layer = {"attn": [attention], "ffn": [ffn], "both": [attention, ffn]}[p["block"]]
  x, r = Moments(0.0, 1.0, p["r0"]), [p["r0"]]
  for _ in range(p["depth"]):
    for block in layer:
      x = block(moments.layer_norm(x))
    r.append(x.correlation)
  return {"r": r}


def high_scores(p):
  mean, variance = moments.softmax(p["score_var_within_row"], 0.0, keys=p["L"])
  return {"sum_a2": p["L"] * (variance + mean**2)}


SECTIONS = {
  "linear": linear,
  "dropout": dropout,
  "relu": functools.partial(activation, name="relu"),
  "gelu": functools.partial(activation, name="gelu"),
  "softmax": softmax,
  "embedding": embedding,
  "scores": scores,
  "sha_ext": single_head,
  "sha_ext_causal": single_head,
  "attn_block_ext": attention_block,
  "ffn_block_relu": ffn_block,
  "ffn_block_gelu": ffn_block,
  "stacks": stack,
  "rank_collapse_no_skip": rank_collapse,
  "high_scores": high_scores,
}
# Not settings; formulae beside which the closed forms are better; tests/theory/test_recipes.py.
NOT_HERE = {"meta", "sha_repo", "dslm_golden"}

# The errors that the docstrings state, relative to the variance (a mean's: to the deviation).
STATED_ERRORS = {
  "linear": 0.015,
  "dropout": 0.004,
  "relu": 0.006,
  "gelu": 0.007,
  "layernorm_d64": 0.018,
  "layernorm_d256": 0.006,
  "layernorm_d1024": 0.003,
  "softmax": 0.055,
  "embedding": 0.05,
  "scores": 0.11,
  "sha_ext": 0.049,
  "sha_ext_causal": 0.27,
  "attn_block_ext": 0.029,
  "ffn_block_relu": 0.034,
  "ffn_block_gelu": 0.035,
  "high_scores": 0.05,
}


def function_of(section: str):
  """The section's function; a section that nobody knows is an error, not one to skip."""
  if section.startswith("layernorm_d"):
    return functools.partial(layer_norm, width=int(section.removeprefix("layernorm_d")))
  return SECTIONS[section]


def cases(config) -> list[tuple[str, int, dict]]:
  sections = json.loads(pathlib.Path(config.getoption("--moments")).read_text())
  return [
    (section, number, case)
    for section, settings in sections.items()
    if section not in NOT_HERE and not section.endswith("paper")
    for number, case in enumerate(settings)
  ]


def pytest_generate_tests(metafunc):
  if "case" in metafunc.fixturenames:
    found = cases(metafunc.config)
    ids = [f"{section}-{number}" for section, number, _ in found]
    metafunc.parametrize("case", found, ids=ids)


@contextlib.contextmanager
def noting_validity():
  """Yields a list that afterwards holds the closed forms' own warnings."""
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("error")
    warnings.simplefilter("always", OutsideValidity)
    yield caught


def test_there_are_cases(pytestconfig):
  assert len(cases(pytestconfig)) > 20


def test_unknown_sections_are_errors():
  with pytest.raises(KeyError):
    function_of("layernorm")


def test_closed_forms_are_those_of_the_file(case):
  """Within 1e-9, or 1e-15 absolute where the file's value is itself the rounding of a zero."""
  section, _, reference = case
  with noting_validity():
    computed = function_of(section)(reference["params"])
  assert set(computed) == set(reference["theory"])
  for name, expected in reference["theory"].items():
    atol = 1e-15 if np.max(np.abs(expected)) < 1e-15 else 0
    np.testing.assert_allclose(computed[name], expected, rtol=RTOL, atol=atol, err_msg=name)


def test_closed_forms_warn_exactly_where_they_fail(case):
  """Nothing that the file calls valid warns, and of the high scores all others do."""
  section, _, reference = case
  with noting_validity() as caught:
    function_of(section)(reference["params"])
  if section == "high_scores":
    assert bool(caught) != reference["valid"]
  elif reference.get("valid", True):
    assert not caught


def test_simulations_agree_with_closed_forms(case):
  """Within the error that the docstring states, or four standard errors of the simulation.

  Means are compared in units of the standard deviation and covariances of the variance: at a
  correlation near zero a covariance is all noise. Where the file says that a form is not valid, it
  is not. Bands of what is run through many layers: see `check_stack`.
  """
  section, _, reference = case
  simulated = reference["simulated"]
  if section == "stacks":
    check_stack(reference)
  elif section == "rank_collapse_no_skip":
    computed = rank_collapse(reference["params"])
    np.testing.assert_allclose(computed["r"], simulated["r"], atol=0.035)
  elif reference.get("valid", True):
    for name, value in function_of(section)(reference["params"]).items():
      measured = name.removesuffix("_approx").removesuffix("_ratio_form")
      variance = simulated.get(measured.split("_")[0] + "_var", simulated[measured])
      unit = math.sqrt(variance) if name.endswith("mean") else variance
      noise = 4 * reference.get("std_err", {}).get(measured, 0.0)
      bound = max(noise, STATED_ERRORS[section] * unit)
      assert abs(value - simulated[measured]) <= bound, (name, value, simulated[measured], bound)


def check_stack(reference):
  """The bands of a mean over one to twelve models of width 256.

  The variance within 15% and the correlation within 0.07 at every layer; ln g at the input within
  0.25, or 0.5 for a Pre-LN stack without scales, or two standard deviations between models. Where a
  Post-LN stack without scales has ten models, the slope of ln g over the middle half within 10%.
  """
  p, simulated = reference["params"], reference["simulated"]
  with noting_validity():
    computed = stack(p)
  np.testing.assert_allclose(computed["S"], simulated["S"], rtol=0.15)
  np.testing.assert_allclose(computed["r"], simulated["r"], atol=0.07)
  error = np.log(computed["g"]) - np.log(simulated["g"])
  unscaled = p["model"].startswith("xavier")
  band = 0.5 if unscaled and p["pre_ln"] else 0.25
  assert abs(error[0]) <= max(band, 2 * reference["seed_std_log_g0"])
  if unscaled and not p["pre_ln"] and p["seeds"] >= 10:
    at = [np.argmin(np.abs(np.array(p["layers"]) - part * p["N"])) for part in (0.25, 0.75)]
    slopes = [np.diff(np.log(values["g"])[at]) for values in (computed, simulated)]
    np.testing.assert_allclose(*slopes, rtol=0.1)


# ---------------------------------------------------------------------------------------------
# Simulations: settings drawn at random
# ---------------------------------------------------------------------------------------------


def draw(rng, shape, x: Moments | Gradient) -> np.ndarray:
  """Normal numbers [trials, tokens, features] with the moments."""
  trials, _, features = shape
  own = math.sqrt(x.variance - x.covariance) * rng.standard_normal(shape)
  common = math.sqrt(x.covariance) * rng.standard_normal((trials, 1, features))
  return getattr(x, "mean", 0.0) + own + common


def random_moments(rng, mean=False) -> Moments:
  variance = rng.uniform(0.3, 3)
  return Moments(rng.normal() if mean else 0.0, variance, rng.uniform(0, 0.95) * variance)


def random_gradient(rng) -> Gradient:
  variance = rng.uniform(0.3, 3)
  return Gradient(variance, rng.uniform(0, 0.95) * variance)


def check(samples: np.ndarray, theory: Moments | Gradient, slack=0.0):
  """Samples [trials, tokens, features], independent over trials, have the moments of the theory.

  E x, E x^2 and E x_i x_j, within five standard errors and a share `slack` of the variance.
  """
  tokens = samples.shape[1]
  squares = (samples**2).sum(1)
  products = (samples.sum(1) ** 2 - squares) / (tokens * (tokens - 1))
  expected = {"one": theory.variance, "two": theory.covariance}
  measured = {"one": squares.mean(-1) / tokens, "two": products.mean(-1)}
  if isinstance(theory, Moments):
    expected = {"mean": theory.mean, "one": theory.second, "two": theory.second_covariance}
    measured["mean"] = samples.mean((1, 2))
  for name, value in expected.items():
    trials = measured[name]
    error = trials.std(ddof=1) / math.sqrt(len(trials))
    bound = 5 * error + slack * theory.variance
    assert abs(trials.mean() - value) <= bound, (name, trials.mean(), value, error)


@pytest.mark.parametrize("seed", range(3))
def test_linear_and_dropout(seed):
  rng = np.random.default_rng(seed)
  x, g = random_moments(rng, mean=True), random_gradient(rng)
  fan_in, fan_out, weight, bias, rate = 24, 16, *rng.uniform(0.01, 0.3, 2), rng.uniform(0.05, 0.6)
  inputs, outputs = draw(rng, (3000, 6, fan_in), x), draw(rng, (3000, 6, fan_out), g)
  kernel = math.sqrt(weight) * rng.standard_normal((3000, fan_in, fan_out))
  bias_draws = math.sqrt(bias) * rng.standard_normal((3000, 1, fan_out))
  y = moments.linear(x, fan_in=fan_in, weight_variance=weight, bias_variance=bias)
  check(inputs @ kernel + bias_draws, y)
  into = moments.linear_gradient(g, fan_out=fan_out, weight_variance=weight)
  check(outputs @ kernel.swapaxes(1, 2), into)
  kept = (rng.random(inputs.shape) >= rate) / (1 - rate)
  check(inputs * kept, moments.dropout(x, rate))
  check(outputs * kept[..., :fan_out], moments.dropout_gradient(g, rate))


@pytest.mark.parametrize("segments", [False, True])
def test_embedding(segments):
  """Two tokens of a segment table are in one segment with probability u^2 + (1-u)^2."""
  rng = np.random.default_rng(7)
  frequencies, tables, trials, tokens = moments.zipf(50), 2 + segments, 1500, 12
  table_variance = 0.7
  shape = (trials, tokens)
  words = rng.choice(50, p=frequencies, size=shape)
  boundary = rng.random((trials, 1))
  ids = [words, np.broadcast_to(np.arange(tokens), shape), 1 * (rng.random(shape) < boundary)]
  total = 0
  for rows in ids[:tables]:
    table = math.sqrt(table_variance) * rng.standard_normal((trials, rows.max() + 1, 8))
    total = total + np.take_along_axis(table, rows[..., None], 1)
  x = moments.embedding(
    frequencies, table_variance=table_variance, tables=tables, segments=segments
  )
  check(total, x)


@pytest.mark.parametrize("name", moments.ACTIVATIONS)
def test_activations(name):
  rng = np.random.default_rng(11)
  record = moments.ACTIVATIONS[name]
  for _ in range(2):
    x, g = random_moments(rng), random_gradient(rng)
    a, upstream = draw(rng, (3000, 4, 32), x), draw(rng, (3000, 4, 32), g)
    if record.gated:
      b = draw(rng, (3000, 4, 32), x)
      check(record.function(a) * b, moments.activation(name, x))
      # Side by side the two gradients have half their sum's moments.
      through = np.concatenate(
        [upstream * record.derivative(a) * b, upstream * record.function(a)], -1
      )
      through = math.sqrt(2) * through
    else:
      check(record.function(a), moments.activation(name, x))
      through = upstream * record.derivative(a)
    check(through, moments.activation_gradient(name, g, x))


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("seed", range(2))
def test_norms(name, seed):
  """The backward pass of the norm is written out; widths are finite, hence 2/width of slack."""
  rng = np.random.default_rng(seed)
  width, epsilon = 128, 0.2
  x, g = random_moments(rng, mean=True), random_gradient(rng)
  inputs, outputs = draw(rng, (400, 6, width), x), draw(rng, (400, 6, width), g)
  centred = name == "layer_norm"
  inputs = inputs - centred * inputs.mean(-1, keepdims=True)
  scale = np.sqrt((inputs**2).mean(-1, keepdims=True) + epsilon)
  y = inputs / scale
  into = outputs - centred * outputs.mean(-1, keepdims=True)
  into = (into - y * (outputs * y).mean(-1, keepdims=True)) / scale
  if centred:
    theory = moments.layer_norm(x, width=width, epsilon=epsilon)
  else:
    theory = moments.rms_norm(x, epsilon=epsilon)
  check(y, theory, slack=2 / width)
  into_theory = moments.norm_gradient(g, x, epsilon=epsilon, norm=name)
  check(into, into_theory, slack=3 / width)


@pytest.mark.parametrize("form", moments.SOFTMAX_FORMS)
def test_softmax(form):
  """Rows of scores with something in common, gradients that keys share in part.

  The largest errors that the docstring states at e <= 0.5 and 128 keys; 2% of the gradient more for
  what is of order 1/L.
  """
  rng = np.random.default_rng(13)
  keys, trials = 128, 4000
  for _ in range(2):
    x = Moments(0.0, variance := rng.uniform(0.4, 1.0), rng.uniform(0.5, 0.9) * variance)
    g = random_gradient(rng)
    rows, upstream = draw(rng, (trials, keys, 1), x), draw(rng, (trials, keys, 1), g)
    weights = softmax_of(rows, axis=1)
    through = weights * (upstream - (weights * upstream).sum(1, keepdims=True))
    of_scores = dict(keys=keys, form=form)
    mean, variance = moments.softmax(x.variance, x.correlation, **of_scores)
    np.testing.assert_allclose(weights.mean(), mean, rtol=1e-12)
    np.testing.assert_allclose(weights.var(), variance, rtol=0.055 if form == "full" else 0.03)
    into = moments.softmax_gradient(g, x.variance, x.correlation, **of_scores)
    check(through, into, slack=0.03)
    # A row's gradients sum to zero, which the slack would hide.
    np.testing.assert_allclose(into.variance + (keys - 1) * into.covariance, 0, atol=1e-18)


def softmax_of(rows, axis=-1):
  exponentials = np.exp(rows - rows.max(axis, keepdims=True))
  return exponentials / exponentials.sum(axis, keepdims=True)


def test_scores():
  rng = np.random.default_rng(17)
  query, key = random_moments(rng), random_moments(rng)
  q, k = draw(rng, (4000, 6, 16), query), draw(rng, (4000, 6, 16), key)
  products = q @ k.swapaxes(1, 2) / 4
  theory = moments.scores(query, key)
  check(products.swapaxes(1, 2), Gradient(theory.variance, theory.variance * key.correlation))
  check(products, Gradient(theory.variance, theory.variance * query.correlation))
  assert theory.key_correlation == key.correlation
  assert theory.query_correlation == query.correlation


def attention_by_hand(rng, inputs, g, p):
  """One head forwards and backwards: its output, and the gradients by path.

  `inputs` are those of queries, keys and values: in self-attention three times the same.
  """
  x_q, x_k, x_v = inputs
  trials, tokens, width = x_q.shape
  kernel = lambda variance: math.sqrt(variance) * rng.standard_normal((trials, width, p["dk"]))
  w_q, w_k, w_v = kernel(p["qk"]), kernel(p["qk"]), kernel(p["v"])
  swap = lambda array: array.swapaxes(1, 2)
  q, k, v = x_q @ w_q, x_k @ w_k, x_v @ w_v
  rows = q @ swap(k) / math.sqrt(p["dk"])
  if p["causal"]:
    rows = np.where(np.tri(tokens, dtype=bool), rows, -np.inf)
  weights = softmax_of(rows)
  kept = (rng.random(weights.shape) >= p["dropout"]) / (1 - p["dropout"])
  output = (weights * kept) @ v
  upstream = (g @ swap(v)) * kept
  through = weights * (upstream - (weights * upstream).sum(-1, keepdims=True))
  through = through / math.sqrt(p["dk"])
  return output, {
    "value": swap(weights * kept) @ g @ swap(w_v),
    "query": through @ k @ swap(w_q),
    "key": swap(through) @ q @ swap(w_k),
  }


# Of the output and of the value, query and key paths.
@pytest.mark.parametrize(
  "causal, high, slack",
  [(False, 1.0, (0.05, 0.04, 0.05, 0.06)), (True, 0.3, (0.05, 0.04, 0.06, 0.06))],
  ids=["bidirectional", "causal"],
)
@pytest.mark.parametrize("seed", range(3))
def test_attention_and_the_three_paths_of_its_gradient(seed, causal, high, slack):
  """Against the backward pass of the softmax, written out; input of any variance.

  Under a causal mask the stated excess of the query and key paths is taken off first.
  """
  rng = np.random.default_rng(100 + seed)
  trials, tokens, width = 60, 64, 96
  x, g = random_moments(rng), random_gradient(rng)
  score_variance = rng.uniform(high / 3, high)
  p = dict(
    dk=32,
    causal=causal,
    dropout=rng.uniform(0, 0.4),
    qk=math.sqrt(score_variance) / (width * x.variance),
    v=rng.uniform(0.5, 2) / width,
  )
  inputs = [draw(rng, (trials, tokens, width), x)] * 3
  output, into = attention_by_hand(rng, inputs, draw(rng, (trials, tokens, p["dk"]), g), p)
  query = moments.linear(x, fan_in=width, weight_variance=p["qk"])
  values = moments.linear(x, fan_in=width, weight_variance=p["v"])
  row = moments.scores(query, query)
  np.testing.assert_allclose(row.variance, score_variance)
  of_rows = dict(keys=tokens, causal=causal, dropout=p["dropout"], width=width)
  check(output, moments.attention_mixing(values, row, **of_rows), slack[0])
  paths = moments.attention_mixing_gradient(g, row, input_correlation=x.correlation, **of_rows)
  unit = p["dk"] * p["v"] * g.variance
  r, others = x.correlation, tokens - 1
  inverse = causal / np.arange(1.0, tokens + 1)
  one = (inverse**2).mean() * ((1 - r) + r * p["dropout"]) / (1 - p["dropout"])
  two = (inverse.sum() ** 2 - (inverse**2).sum()) / (tokens * others) * g.correlation * (1 - r)
  off = {
    "value": np.zeros(2),
    "query": score_variance * (1 - r) * np.array([one, two]),
    "key": score_variance * (one + others * two * r) * np.array([1, -1 / others]),
  }
  total = 0
  for path, path_slack in zip(paths._fields, slack[1:], strict=True):
    theory = unit * (np.array(getattr(paths, path)) - off[path])
    total = total + theory
    check(into[path], Gradient(*theory), path_slack)
  check(sum(into.values()), Gradient(*total), 0.05)


def test_attention_of_three_inputs():
  """Queries, keys and values with correlations of their own: each takes its place."""
  rng = np.random.default_rng(37)
  trials, tokens, width, v, rate = 250, 64, 64, 0.4, 0.2
  correlations, g = (0.9, 0.1, 0.5), Gradient(1.3, 0.9)
  p = dict(dk=32, causal=False, dropout=rate, qk=math.sqrt(v) / width, v=1 / width)
  inputs = [draw(rng, (trials, tokens, width), Moments(0.0, 1.0, r)) for r in correlations]
  output, into = attention_by_hand(rng, inputs, draw(rng, (trials, tokens, 32), g), p)
  row = moments.Scores(v, key_correlation=0.1, query_correlation=0.9)
  of_rows = dict(keys=tokens, dropout=rate)
  check(output, moments.attention_mixing(Moments(0.0, 1.0, 0.5), row, **of_rows), slack=0.03)
  paths = moments.attention_mixing_gradient(g, row, input_correlation=0.5, **of_rows)
  for path in paths._fields:
    theory = p["dk"] * p["v"] * g.variance * np.array(getattr(paths, path))
    check(into[path], Gradient(*theory), slack=0.05)


@pytest.mark.parametrize("name", moments.ACTIVATIONS)
def test_ffn_block(name):
  """Both projections of a gate take part in the gradient of the input."""
  rng = np.random.default_rng(23)
  record, (trials, tokens, width, ffn_width) = moments.ACTIVATIONS[name], (150, 6, 128, 96)
  x, g, rate = random_moments(rng), random_gradient(rng), 0.2
  p = dict(in_variance=0.9 / width, out_variance=1.3 / ffn_width, dropout=rate)
  inputs, upstream = draw(rng, (trials, tokens, width), x), draw(rng, (trials, tokens, width), g)
  normal = rng.standard_normal
  w_in, w_gated = math.sqrt(p["in_variance"]) * normal((2, trials, width, ffn_width))
  w_out = math.sqrt(p["out_variance"]) * normal((trials, ffn_width, width))
  kept = (rng.random(inputs.shape) >= rate) / (1 - rate)
  a = inputs @ w_in
  b = inputs @ w_gated if record.gated else 1.0
  hidden_gradient = (upstream * kept) @ w_out.swapaxes(1, 2)
  into = (hidden_gradient * record.derivative(a) * b) @ w_in.swapaxes(1, 2)
  if record.gated:
    into = into + (hidden_gradient * record.function(a)) @ w_gated.swapaxes(1, 2)
  p = dict(width=width, ffn_width=ffn_width, activation=name, **p)
  check((record.function(a) * b) @ w_out * kept, moments.ffn_block(x, **p), slack=0.04)
  check(into, moments.ffn_block_gradient(g, x, **p), slack=0.04)


def test_attention_block_with_two_heads():
  """The chain of its parts, causal, with dropout, at a variance other than 1; heads are alike."""
  rng = np.random.default_rng(29)
  trials, tokens, width, rate = 40, 64, 64, 0.1
  x = Moments(0.0, 2.0, 0.8)
  inputs = draw(rng, (trials, tokens, width), x)
  p = dict(dk=32, causal=True, dropout=0.2, qk=0.2 / width, v=1.2 / width)
  heads = [attention_by_hand(rng, [inputs] * 3, inputs[..., :32], p)[0] for _ in range(2)]
  out = math.sqrt(0.7 / width) * rng.standard_normal((trials, width, width))
  kept = (rng.random(inputs.shape) >= rate) / (1 - rate)
  theory = moments.attention_block(
    x,
    width=width,
    keys=tokens,
    qk_variance=p["qk"],
    v_variance=p["v"],
    out_variance=0.7 / width,
    dropout=rate,
    attention_dropout=p["dropout"],
    causal=True,
  )
  check(np.concatenate(heads, -1) @ out * kept, theory, slack=0.03)


def test_residual():
  rng = np.random.default_rng(31)
  x, y, g, h = *(random_moments(rng, mean=True) for _ in "xy"), *map(random_gradient, [rng] * 2)
  samples = lambda z: draw(rng, (1000, 5, 16), z)
  check(0.6 * samples(x) - 1.3 * samples(y), moments.residual(x, y, 0.6, -1.3))
  check(0.6 * samples(g) - 1.3 * samples(h), moments.residual_gradient(g, h, 0.6, -1.3))


# ---------------------------------------------------------------------------------------------
# Identities
# ---------------------------------------------------------------------------------------------

CORRELATIONS = (-1.0, -0.9, -0.3, 0.0, 0.2, 0.5, 0.9, 0.999, 1.0)


def test_kappa_and_tau_at_the_ends_and_as_derivatives():
  """d kappa / d r = tau, as the expectation's derivative is that of the derivatives."""
  np.testing.assert_allclose(moments.kappa(np.array([-1.0, 0, 1])), [0, 1 / math.pi, 1], atol=1e-15)
  np.testing.assert_allclose(moments.tau(np.array([-1.0, 0, 1])), [0, 0.5, 1], atol=1e-15)
  r, step = np.linspace(-0.95, 0.95, 9), 1e-6
  slope = (moments.kappa(r + step) - moments.kappa(r - step)) / (2 * step)
  np.testing.assert_allclose(slope, moments.tau(r), rtol=1e-8)


@pytest.mark.parametrize("name", moments.ACTIVATIONS)
def test_gradients_are_derivatives_of_covariances(name):
  """d E f(x) f(y) / d E x y = E f'(x) f'(y) for normal x, y (Price's theorem), gates included."""
  variance, unit = 1.7, Gradient(1.0, 1.0)
  two = lambda c: moments.activation(name, Moments(0.0, variance, c)).second_covariance
  for r in (-0.7, 0.0, 0.4, 0.9):
    c, step = r * variance, 1e-5
    slope = (two(c + step) - two(c - step)) / (2 * step)
    into = moments.activation_gradient(name, unit, Moments(0.0, variance, c))
    np.testing.assert_allclose(into.covariance, slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", moments.ACTIVATIONS)
def test_equal_tokens_stay_equal(name):
  """At a correlation of 1 the covariance is the variance, forwards and backwards."""
  x, g = Moments(0.0, 0.8, 0.8), Gradient(0.6, 0.6)
  y, into = moments.activation(name, x), moments.activation_gradient(name, g, x)
  np.testing.assert_allclose(
    [y.covariance, into.covariance], [y.variance, into.variance], rtol=1e-9
  )


@pytest.mark.parametrize("name", moments.ACTIVATIONS)
def test_derivatives_are_those_of_the_functions(name):
  record, x, step = moments.ACTIVATIONS[name], np.linspace(-5, 5, 40), 1e-6
  slope = (record.function(x + step) - record.function(x - step)) / (2 * step)
  np.testing.assert_allclose(record.derivative(x), slope, atol=1e-8)
  assert np.isfinite(record.derivative(np.array([-1e4, 1e4]))).all()


@pytest.mark.parametrize("name", moments.ACTIVATIONS)
@pytest.mark.parametrize(
  "variance, of_value, of_slope",
  [(0.01, 1e-12, 1e-12), (1.0, 1e-12, 1e-12), (10.0, 1e-9, 5e-8), (100.0, 5e-7, 5e-5)],
)
def test_quadrature_has_the_stated_error(name, variance, of_value, of_slope):
  """Beside closed forms, or many more nodes; relu's kink costs nothing; r = 1 and -1 included."""
  record, g = moments.ACTIVATIONS[name], Gradient(1.0, 1.0)
  for r in CORRELATIONS:
    x = Moments(0.0, variance, r * variance)
    if record.closed:
      expected, slope = record.closed[0](x), record.closed[1](g, x)
    else:
      expected = moments.quadrature(record.function, x, nodes=200)
      slope = moments.quadrature_gradient(record.derivative, g, x, nodes=200)
    got = moments.quadrature(record.function, x)
    got_slope = moments.quadrature_gradient(record.derivative, g, x)
    np.testing.assert_allclose(got, expected, atol=of_value * expected.second)
    np.testing.assert_allclose(got_slope, slope, atol=of_slope * slope.variance)


def test_what_does_not_vary():
  """A zero stays a zero, and is given the correlation 0."""
  zero, none = Moments(0.0, 0.0, 0.0), Gradient(0.0, 0.0)
  assert zero.correlation == none.correlation == 0
  for name in moments.ACTIVATIONS:
    np.testing.assert_allclose(moments.activation(name, zero), 0, atol=1e-300)
    np.testing.assert_allclose(moments.activation_gradient(name, none, zero), 0, atol=1e-300)
  assert moments.residual(zero, Moments(0.0, 1.0, 0.5)) == (0, 1, 0.5)


def test_arrays_broadcast():
  """Every function of moments takes arrays and gives what it gives for each number."""
  variances, r = np.array([[0.5], [2.0]]), np.array([0.1, 0.6, 1.0])
  steps = dict(fan_in=8, weight_variance=0.2)
  attention = dict(width=64, keys=256, qk_variance=0.01, v_variance=0.02, out_variance=0.02)
  ffn = dict(width=64, ffn_width=128, in_variance=0.02, out_variance=0.02)
  functions = [
    lambda x: moments.linear(x, **steps),
    lambda x: moments.dropout(x, 0.1),
    moments.layer_norm,
    moments.rms_norm,
    lambda x: moments.attention_block(x, **attention),
    lambda x: moments.attention_block(x, causal=True, **attention),
    lambda x: moments.attention_block_gradient(Gradient(*x[1:]), x, causal=True, **attention),
    lambda x: moments.norm_gradient(Gradient(*x[1:]), x),
  ]
  for name in moments.ACTIVATIONS:
    functions += [
      lambda x, name=name: moments.ffn_block(x, activation=name, **ffn),
      lambda x, name=name: moments.ffn_block_gradient(Gradient(*x[1:]), x, activation=name, **ffn),
    ]
  for function in functions:
    together = function(Moments(0.0, variances, r * variances))
    for i, j in itertools.product(range(2), range(3)):
      s2 = variances[i, 0]
      alone = function(Moments(0.0, s2, r[j] * s2))
      picked = [np.broadcast_to(field, (2, 3))[i, j] for field in together]
      np.testing.assert_allclose(picked, alone, rtol=1e-12)


def test_one_key_is_a_copy():
  """A softmax over one key has the weight 1: values pass, scores have no gradient through it."""
  values, row = Moments(0.3, 1.0, 0.4), moments.Scores(4.0, 0.2, 0.2)
  for causal in (False, True):
    mixed = moments.attention_mixing(values, row, keys=1, causal=causal)
    assert (mixed.mean, mixed.variance) == (0.3, 1.0)
  assert moments.softmax(4.0, 0.2, keys=1) == (1.0, 0.0)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_sum_over_tokens(causal):
  """Rows of weights sum to 1 and rows of score gradients to 0: token sums are known exactly.

  The L values' gradients sum to that of L copies, L + L (L-1) rg, and the keys' to zero.
  """
  keys, g = 50, Gradient(1.0, 0.3)
  row = moments.Scores(0.5, 0.4, 0.4)
  paths = moments.attention_mixing_gradient(g, row, keys=keys, input_correlation=0.4, causal=causal)
  sums = [path.variance + (keys - 1) * path.covariance for path in (paths.value, paths.key)]
  np.testing.assert_allclose(sums, [1 + (keys - 1) * 0.3, 0], atol=1e-12)


def test_equal_scores_mix_uniformly():
  """Without variance in the scores the weights are 1/L: values become their mean."""
  values, row = Moments(0.0, 1.0, 0.2), moments.Scores(0.0, 0.5, 0.5)
  mixed = moments.attention_mixing(values, row, keys=20)
  np.testing.assert_allclose(mixed[1:], [0.2 + 0.8 / 20] * 2)
  # The mean over rows of the mean of i values, and over pairs of the overlap of two such means.
  mixed = moments.attention_mixing(values, row, keys=20, causal=True)
  one = np.mean([1 / i for i in range(1, 21)])
  two = np.mean([1 / max(i, k) for i in range(1, 21) for k in range(1, 21) if i != k])
  np.testing.assert_allclose(mixed[1:], [0.2 + 0.8 * one, 0.2 + 0.8 * two])


def test_norms_with_epsilon_in_the_residual_steps():
  x, y = Moments(0.0, 2.0, 0.5), Moments(0.0, 0.3, 0.2)
  block = lambda _: y
  seen = []

  def through(g, normed):
    seen.append(normed)
    return Gradient(3 * g.variance, 2 * g.covariance)

  options = dict(skip=0.8, branch=0.5, epsilon=0.1)
  assert moments.pre_ln(x, block, **options) == moments.residual(x, y, 0.8, 0.5)
  after = moments.post_ln(x, block, **options)
  total = 0.64 * 2 + 0.25 * 0.3
  np.testing.assert_allclose(after.variance, total / (total + 0.1))
  g = Gradient(1.0, 0.4)
  before = moments.pre_ln_gradient(g, x, through, **options)
  np.testing.assert_allclose(before, [0.64 + 0.25 * 3 / 2.1, 0.4 * (0.64 + 0.25 * 2 / 2.1)])
  before = moments.post_ln_gradient(g, x, block, through, **options)
  expected = np.array([0.64 + 0.25 * 3, 0.4 * (0.64 + 0.25 * 2)]) / (total + 0.1)
  np.testing.assert_allclose(before, expected)
  assert seen == [moments.layer_norm(x, epsilon=0.1), x]


# ---------------------------------------------------------------------------------------------
# Warnings and errors
# ---------------------------------------------------------------------------------------------


def test_high_scores_warn_and_return():
  """At the bound there is no warning; beyond it one, with the value and the bound; never inf."""
  bound = 0.5 * math.log(128)
  row = moments.Scores(1000.0, 0.0, 0.0)
  moments.softmax(bound, 0.0, keys=128)
  with pytest.warns(OutsideValidity, match=r"2\.5, exceeds 0\.5 ln\(keys\) = 2\.426"):
    assert moments.softmax(5.0, 0.5, keys=128)[1] > 0
  with pytest.warns(OutsideValidity):
    _, variance = moments.softmax(1000.0, 0.0, keys=128)
  np.testing.assert_allclose(variance, 1 / 128 - 1 / 128**2)
  with pytest.warns(OutsideValidity):
    moments.softmax_gradient(Gradient(1.0, 0.0), 1000.0, 0.0, keys=128)
  with pytest.warns(OutsideValidity):
    mixed = moments.attention_mixing(Moments(0.0, 1.0, 0.0), row, keys=128)
  np.testing.assert_allclose(mixed.variance, 1)
  with pytest.warns(OutsideValidity):
    paths = moments.attention_mixing_gradient(
      Gradient(1.0, 0.0), row, keys=128, input_correlation=0.0
    )
  assert np.isfinite(paths.total).all()


X, G = Moments(0.0, 1.0, 0.5), Gradient(1.0, 0.5)
ROW = moments.Scores(0.5, 0.2, 0.2)
ERRORS = {
  "variance": (lambda: moments.relu(Moments(0.0, -1.0, 0.0)), "variance=-1.0 must be >= 0"),
  "nan": (lambda: moments.dropout(Moments(0.0, math.nan, 0.0), 0.1), "variance=nan"),
  "covariance": (lambda: moments.relu(Moments(0.0, 1.0, 1.1)), "must not exceed variance"),
  "gradient": (lambda: moments.relu_gradient(Gradient(1.0, -1.1), X), "must not exceed"),
  "mean": (lambda: moments.gelu(Moments(0.5, 1.0, 0.0)), "mean=0.5 must be 0"),
  "array": (lambda: moments.relu(Moments(0.0, np.array([1.0, -1.0]), 0.0)), "must be >= 0"),
  "rate": (lambda: moments.dropout(X, 1.0), r"rate=1.0 must be within \[0, 1\)"),
  "rate_gradient": (lambda: moments.dropout_gradient(G, -0.1), "rate=-0.1"),
  "kappa": (lambda: moments.kappa(1.1), r"r=1.1 must be within \[-1, 1\]"),
  "tau": (lambda: moments.tau(-1.1), "r=-1.1"),
  "fan_in": (lambda: moments.linear(X, fan_in=0, weight_variance=1.0), "fan_in=0"),
  "weight": (lambda: moments.linear(X, fan_in=1, weight_variance=-1.0), "weight_variance=-1.0"),
  "keys": (lambda: moments.softmax(1.0, 0.0, keys=0), "keys=0 must be at least 1"),
  "correlation": (lambda: moments.softmax(1.0, 2.0, keys=9), "score correlation=2.0"),
  "form": (lambda: moments.softmax(0.1, 0.0, keys=9, form="log"), "form='log'"),
  "full": (lambda: moments.softmax(0.1, 0.0, keys=1, form="full"), "two keys"),
  "attention": (lambda: moments.attention_mixing(X, ROW, keys=9, dropout=1.5), "dropout=1.5"),
  "input": (
    lambda: moments.attention_mixing_gradient(G, ROW, keys=9, input_correlation=3.0),
    "input_correlation=3.0",
  ),
  "width": (lambda: moments.layer_norm(X, width=0), "width=0"),
  "epsilon": (lambda: moments.rms_norm(Moments(0.0, 0.0, 0.0)), "needs epsilon > 0"),
  "norm": (lambda: moments.norm_gradient(G, X, norm="batch_norm"), "norm='batch_norm'"),
  "activation": (lambda: moments.activation("tanh", X), "activation='tanh' must be one of gelu"),
  "frequencies": (lambda: moments.token_correlation([0.5, 0.6]), "sum to 1.1"),
  "negative": (lambda: moments.token_correlation([1.5, -0.5]), "frequencies must be >= 0"),
  "tables": (lambda: moments.token_correlation([1.0], segments=True), "tables=1 must be"),
  "vocabulary": (lambda: moments.zipf(0), "vocab_size=0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_values_are_errors(name):
  call, message = ERRORS[name]
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize(("queries", "keys"), [(3, 7), (7, 3), (5, 5)])
@pytest.mark.parametrize("form", ["closed", "integral"])
def test_a_memory_gets_the_gradient_of_all_its_queries(queries, keys, form):
  """Equal weights: every value's gradient is the sum of the queries', over the keys."""
  g = moments.Gradient(2.0, 0.6)
  value = moments.attention_mixing_gradient(
    g,
    moments.Scores(0.0, 0.0, 0.0),
    keys=keys,
    queries=queries,
    input_correlation=0.3,
    form=form,
  ).value
  total = queries * (1 + (queries - 1) * 0.3) / keys**2
  assert value.variance == pytest.approx(total)
  assert value.covariance == pytest.approx(total)
