"""Each paper's layer, transcribed literally in NumPy: what the one `Block` is held against.

Nothing of magneto_jax is used but the names of its parameters. All is computed in the dtype of the
parameters it is given: float64 for an exact check. `p` is the tree of one layer.
"""

import inspect
import itertools
import math
import operator

import jax
import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def layer_norm(p, x, epsilon=1e-5):
  centred = x - x.mean(-1, keepdims=True)
  variance = (centred**2).mean(-1, keepdims=True)
  return centred / np.sqrt(variance + epsilon) * p["scale"] + p["bias"]


def rms_norm(p, x, epsilon=1e-5):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"]


def dense(p, x):
  """x W + b, where W may have its input axes apart: the heads' outputs are one vector to it."""
  return x @ p["kernel"].reshape(x.shape[-1], -1) + p["bias"].reshape(-1)


def gelu(x):
  return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def softmax(x):
  weights = np.exp(x - x.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def heads(p, x, visible=None):
  """concat_i softmax(q_i k_i^T / sqrt(H)) v_i, [B, T, N H]; causal unless `visible` [T, S] says."""
  projections = (p[name] for name in ("query", "key", "value"))
  q, k, v = (np.einsum("btd,dnh->bnth", x, w["kernel"]) + w["bias"][:, None] for w in projections)
  logits = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
  visible = np.tri(x.shape[1], dtype=bool) if visible is None else visible
  outputs = softmax(np.where(visible, logits, -np.inf)) @ v
  return outputs.swapaxes(1, 2).reshape(*x.shape[:2], -1)


# ---------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------


def pre_ln(p, x, depth):
  """arXiv 2002.04745, table 1, right."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + dense(att["out"], heads(att, ln("self_attention", "in", x)))
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x))))


def pre_rms_norm(p, x, depth):
  """Pre-LN with arXiv 1910.07467's norm, as in Llama."""
  att, ffn, norms = p["self_attention"], p["ffn"], (p["self_attention_residual"], p["ffn_residual"])
  x = x + dense(att["out"], heads(att, rms_norm(norms[0]["in_norm"], x)))
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], rms_norm(norms[1]["in_norm"], x))))


def post_ln(p, x, depth):
  """arXiv 1706.03762, section 3.1."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = ln("self_attention", "post", x + dense(att["out"], heads(att, x)))
  return ln("ffn", "post", x + dense(ffn["wo"], gelu(dense(ffn["wi"], x))))


def magneto(p, x, depth):
  """arXiv 2210.06423, equations 1-4."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = heads(att, ln("self_attention", "in", x))
  x = x + dense(att["out"], layer_norm(att["mid_norm"], h))
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def deepnet(p, x, depth):
  """arXiv 2203.00555, figure 2, one stack."""
  att, ffn, ln, alpha = p["self_attention"], p["ffn"], _norms(p), (2 * depth) ** (1 / 4)
  x = ln("self_attention", "post", alpha * x + dense(att["out"], heads(att, x)))
  return ln("ffn", "post", alpha * x + dense(ffn["wo"], gelu(dense(ffn["wi"], x))))


def normformer(p, x, depth):
  """arXiv 2110.09456, section 2: gamma_i on head i before W_o."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = heads(att, ln("self_attention", "in", x)) * _a_head(att["head_scale"], x)
  x = x + ln("self_attention", "out", dense(att["out"], h))
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def normformer_residual_scale(p, x, depth):
  """arXiv 2110.09456, section 2: lambda on the feed-forward network's residual."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = heads(att, ln("self_attention", "in", x)) * _a_head(att["head_scale"], x)
  x = x + ln("self_attention", "out", dense(att["out"], h))
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return p["ffn_residual"]["skip"] * x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def normformer_contiguous(p, x, depth):
  """fairseq since November 2021: y[c] = gamma[c // h] z[c] after W_o."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  z = dense(att["out"], heads(att, ln("self_attention", "in", x)))
  x = x + ln("self_attention", "out", z * _a_head(att["head_scale"], x))
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def normformer_interleaved(p, x, depth):
  """fairseq before November 2021: einsum("tbhd,h->tbdh"), so y[d H + i] = gamma[i] z[i h + d]."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  z = dense(att["out"], heads(att, ln("self_attention", "in", x)))
  z = z.reshape(*x.shape[:2], len(att["head_scale"]), -1)
  y = np.einsum("bthd,h->btdh", z, att["head_scale"]).reshape(x.shape)
  x = x + ln("self_attention", "out", y)
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def sandwich_ln(p, x, depth):
  """arXiv 2105.13290, section 2.4."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = dense(att["out"], heads(att, ln("self_attention", "in", x)))
  x = x + ln("self_attention", "out", h)
  h = dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x))))
  return x + ln("ffn", "out", h)


def out_norm(p, x, depth):
  """arXiv 2111.09883, section 3.2."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + ln("self_attention", "out", dense(att["out"], heads(att, x)))
  return x + ln("ffn", "out", dense(ffn["wo"], gelu(dense(ffn["wi"], x))))


def layernorm_scaling(p, x, depth, layer):
  """arXiv 2502.05795, equation 5: layer counts from 1."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + dense(att["out"], heads(att, ln("self_attention", "in", x) / math.sqrt(layer)))
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x) / math.sqrt(layer))))


def layer_scale(p, x, depth):
  """arXiv 2103.17239, equation 4."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = dense(att["out"], heads(att, ln("self_attention", "in", x)))
  x = x + p["self_attention_residual"]["branch"] * h
  h = dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x))))
  return x + p["ffn_residual"]["branch"] * h


def rezero(p, x, depth):
  """arXiv 2003.04887, equation 1."""
  att, ffn = p["self_attention"], p["ffn"]
  x = x + p["self_attention_residual"]["branch"] * dense(att["out"], heads(att, x))
  return x + p["ffn_residual"]["branch"] * dense(ffn["wo"], gelu(dense(ffn["wi"], x)))


def depth_mup(p, x, depth):
  """arXiv 2310.02244: branches times 1 / sqrt(L)."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + dense(att["out"], heads(att, ln("self_attention", "in", x))) / math.sqrt(depth)
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x)))) / math.sqrt(depth)


def completep(p, x, depth):
  """arXiv 2505.01618: branches times 1 / L."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + dense(att["out"], heads(att, ln("self_attention", "in", x))) / depth
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x)))) / depth


def keel(p, x, depth):
  """arXiv 2601.19895."""
  att, ffn, ln, a = p["self_attention"], p["ffn"], _norms(p), 2 * depth
  h = dense(att["out"], heads(att, ln("self_attention", "in", x)))
  x = ln("self_attention", "post", a * x + h)
  h = dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x))))
  return ln("ffn", "post", a * x + h)


def _norms(p):
  """LN of a sublayer at a site, by name."""
  return lambda sublayer, site, x: layer_norm(p[f"{sublayer}_residual"][f"{site}_norm"], x)


def _a_head(gamma, x):
  """One value a head, on the channels of x."""
  return np.repeat(gamma, x.shape[-1] // len(gamma))


# ---------------------------------------------------------------------------------------------
# Stacks
# ---------------------------------------------------------------------------------------------


def stack(params, x, segments, *, final_norm):
  """Runs `segments`, each a tuple of layers (functions of this module), over stacked parameters.

  `final_norm` is a norm of this module, or None.
  """
  repeats = [_length(params[f"segment_{i}"]) for i in range(len(segments))]
  depth = sum(n * len(layers) for n, layers in zip(repeats, segments, strict=True))
  number = itertools.count(1)
  for i, layers in enumerate(segments):
    for repeat in range(repeats[i]):
      for j, layer in enumerate(layers):
        block = params[f"segment_{i}"][f"block_{j}"]
        # Some papers' numbers depend on which layer it is.
        which = {"layer": next(number)}
        options = which if "layer" in inspect.signature(layer).parameters else {}
        x = layer(jax.tree.map(operator.itemgetter(repeat), block), x, depth, **options)
  return final_norm(params["final_norm"], x) if final_norm else x


def causal_lm(params, tokens, segments, *, final_norm, scale):
  """Logits of a tied model with learned positions: scale E[token] + P[position], stack, E^T."""
  table, positions = params["token_embedding"]["embedding"], params["position_embedding"]
  x = scale * table[tokens] + positions["embedding"][: tokens.shape[1]]
  return stack(params["stack"], x, segments, final_norm=final_norm) @ table.T


def _length(tree):
  return len(jax.tree.leaves(tree)[0])


# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------


def random_params(module, *args, seed=0, dtype=np.float32, **kwargs):
  """Parameters for `module(*args)`, all of them random: norms, biases and learned scales too.

  At their initial values (0 and 1) a misplaced norm gain, bias or learned scale would not show.
  """
  rng = np.random.default_rng(seed)
  key = jax.random.key(0)
  shapes = jax.eval_shape(lambda *args: module.init(key, *args, **kwargs), *args)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape)
    name = path[-1].key
    if name == "kernel":
      return (noise * _fan_in(path, leaf) ** -0.5).astype(dtype)
    if name == "embedding":
      return (noise * leaf.shape[-1] ** -0.5).astype(dtype)
    return ((name != "bias") + 0.3 * noise).astype(dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes.get("params", {}))


def _fan_in(path, leaf):
  """Of stacked or single kernels: [D, N, H] into heads, [N, H, D] out of them, [D, F] otherwise."""
  into_heads = path[-2].key in ("query", "key", "value")
  out_of_heads = path[-2].key == "out"
  return math.prod(leaf.shape[-3:-2] if into_heads else leaf.shape[-3 if out_of_heads else -2 : -1])
