"""Each paper's layer and model, transcribed literally in NumPy: what ours are held against.

Nothing of magneto_jax is used but the names of its parameters. All is computed in the dtype of the
parameters it is given: float64 for an exact check. `p` is the tree of one layer.
"""

import functools
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


def heads(p, x, memory=None, *, visible=None, bias=0.0, turn=None, qk_norm=None):
  """concat_i softmax(q_i k_i^T / sqrt(H) + bias) v_i, [B, T, N H].

  Keys and values are of `memory`, if there is one, else of x. Causal unless `visible` [.., T, S]
  says; `turn` is of queries and keys, `qk_norm` one of `each_head` and `all_heads`.
  """
  memory = x if memory is None else memory
  q, k, v = project(p["query"], x), project(p["key"], memory), project(p["value"], memory)
  if qk_norm:
    q, k = qk_norm(p["query_norm"], q), qk_norm(p["key_norm"], k)
  return attend(*(turn(q, k) if turn else (q, k)), v, visible=visible, bias=bias)


def project(p, x):
  """x W + b, [B, N, T, H]."""
  return np.einsum("btd,dnh->bnth", x, p["kernel"]) + p["bias"][:, None]


def attend(q, k, v, *, visible=None, bias=0.0):
  """Scaled dot-product attention of [B, N, T, H]; [B, T, N H], the heads side by side."""
  logits = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]) + bias
  visible = np.tri(q.shape[2], dtype=bool) if visible is None else visible
  outputs = softmax(np.where(visible, logits, -np.inf)) @ v
  return outputs.swapaxes(1, 2).reshape(len(q), q.shape[2], -1)


def each_head(norm):
  """arXiv 2302.05442: a norm over each head's channels, with the same gain for all heads."""
  return norm


def all_heads(norm):
  """arXiv 2501.00656: a norm over all channels of a token's queries, or keys."""

  def over_width(p, q_bnth):
    q = q_bnth.swapaxes(1, 2)
    return norm(p, q.reshape(*q.shape[:2], -1)).reshape(q.shape).swapaxes(1, 2)

  return over_width


def no_cross(p, x):
  """What stands between self-attention and feed-forward network where there is no memory."""
  return x


def t5_bias(table, queries, keys, *, bidirectional=True, max_distance=128):
  """arXiv 1910.10683, section 2.1 and its code: bias[n, i, j] = table[bucket(j - i), n]."""
  bias = np.zeros((1, table.shape[1], queries, keys))
  for i in range(queries):
    for j in range(keys):
      bucket, size, distance = 0, len(table), i - j
      if bidirectional:
        size //= 2
        bucket, distance = size * (j > i), abs(i - j)
      distance, exact = max(distance, 0), size // 2
      if distance < exact:
        bucket += distance
      else:
        ratio = math.log(distance / exact) / math.log(max_distance / exact)
        bucket += min(exact + int(ratio * (size - exact)), size - 1)
      bias[0, :, i, j] = table[bucket]
  return bias


def torchscale_xpos(q, k, base=512):
  """microsoft/torchscale 4d1e0e8, component/xpos_relative_position.py: centred positions.

  Channels (2j, 2j + 1) of query t are turned by t 10000^(-2j/d) and scaled by zeta_j^e_t, with
  e_t = (t - ceil(T/2)) / base; those of keys are divided by it.
  """
  length, d = q.shape[-2:]
  j = np.arange(d // 2)
  zeta = (2 * j + 0.4 * d) / (1.4 * d)
  t = np.arange(length)[:, None]
  scale = np.repeat(zeta ** ((t - math.ceil(length / 2)) / base), 2, axis=-1)
  angle = np.repeat(t * 10000 ** (-2 * j / d), 2, axis=-1)

  def rotate_every_two(x):
    y = np.empty_like(x)
    y[..., 0::2], y[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return y

  turn = lambda x: x * np.cos(angle) + rotate_every_two(x) * np.sin(angle)
  return turn(q) * scale, turn(k) / scale


def patches(p, images, size, masked=None):
  """arXiv 2010.11929, equation 1: x_class, then the pixels of each patch times E, row by row."""
  batch, height, width, channels = images.shape
  kernel = p["projection"]["kernel"]
  rows, columns = height // size, width // size
  x = np.zeros((batch, rows * columns, kernel.shape[-1])) + p["projection"]["bias"]
  for row, column in itertools.product(range(rows), range(columns)):
    for i, j, c in itertools.product(range(size), range(size), range(channels)):
      pixel = images[:, row * size + i, column * size + j, c]
      x[:, row * columns + column] += pixel[:, None] * kernel[i, j, c]
  if masked is not None:
    x = np.where(masked[..., None], p["mask_token"], x)
  if "class_token" in p:
    x = np.concatenate([np.tile(p["class_token"], (batch, 1, 1)), x], axis=1)
  return x


# ---------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------


def pre_ln(p, x, depth, cross=no_cross, **see):
  """arXiv 2002.04745, table 1, right."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + dense(att["out"], heads(att, ln("self_attention", "in", x), **see))
  x = cross(p, x)
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x))))


def pre_rms_norm(p, x, depth, cross=no_cross, **see):
  """Pre-LN with arXiv 1910.07467's norm, as in Llama."""
  att, ffn, norms = p["self_attention"], p["ffn"], (p["self_attention_residual"], p["ffn_residual"])
  x = x + dense(att["out"], heads(att, rms_norm(norms[0]["in_norm"], x), **see))
  x = cross(p, x)
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], rms_norm(norms[1]["in_norm"], x))))


def post_ln(p, x, depth, cross=no_cross, **see):
  """arXiv 1706.03762, section 3.1."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = ln("self_attention", "post", x + dense(att["out"], heads(att, x, **see)))
  x = cross(p, x)
  return ln("ffn", "post", x + dense(ffn["wo"], gelu(dense(ffn["wi"], x))))


def magneto(p, x, depth, cross=no_cross, **see):
  """arXiv 2210.06423, equations 1-4."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = heads(att, ln("self_attention", "in", x), **see)
  x = x + dense(att["out"], layer_norm(att["mid_norm"], h))
  x = cross(p, x)
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def deepnet(p, x, depth, alpha=None, cross=no_cross, **see):
  """arXiv 2203.00555, figure 2: alpha of one stack, unless it is given."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  alpha = (2 * depth) ** (1 / 4) if alpha is None else alpha
  x = ln("self_attention", "post", alpha * x + dense(att["out"], heads(att, x, **see)))
  x = cross(p, x)
  return ln("ffn", "post", alpha * x + dense(ffn["wo"], gelu(dense(ffn["wi"], x))))


def normformer(p, x, depth, cross=no_cross, **see):
  """arXiv 2110.09456, section 2: gamma_i on head i before W_o."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = heads(att, ln("self_attention", "in", x), **see) * _a_head(att["head_scale"], x)
  x = x + ln("self_attention", "out", dense(att["out"], h))
  x = cross(p, x)
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def normformer_residual_scale(p, x, depth, cross=no_cross, **see):
  """arXiv 2110.09456, section 2: lambda on the feed-forward network's residual."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = heads(att, ln("self_attention", "in", x), **see) * _a_head(att["head_scale"], x)
  x = x + ln("self_attention", "out", dense(att["out"], h))
  x = cross(p, x)
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return p["ffn_residual"]["skip"] * x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def normformer_contiguous(p, x, depth, cross=no_cross, **see):
  """fairseq since November 2021: y[c] = gamma[c // h] z[c] after W_o."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  z = dense(att["out"], heads(att, ln("self_attention", "in", x), **see))
  x = x + ln("self_attention", "out", z * _a_head(att["head_scale"], x))
  x = cross(p, x)
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def normformer_interleaved(p, x, depth, cross=no_cross, **see):
  """fairseq before November 2021: einsum("tbhd,h->tbdh"), so y[d H + i] = gamma[i] z[i h + d]."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  z = dense(att["out"], heads(att, ln("self_attention", "in", x), **see))
  z = z.reshape(*x.shape[:2], len(att["head_scale"]), -1)
  y = np.einsum("bthd,h->btdh", z, att["head_scale"]).reshape(x.shape)
  x = x + ln("self_attention", "out", y)
  x = cross(p, x)
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def sandwich_ln(p, x, depth, cross=no_cross, **see):
  """arXiv 2105.13290, section 2.4."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = dense(att["out"], heads(att, ln("self_attention", "in", x), **see))
  x = x + ln("self_attention", "out", h)
  x = cross(p, x)
  h = dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x))))
  return x + ln("ffn", "out", h)


def out_norm(p, x, depth, cross=no_cross, **see):
  """arXiv 2111.09883, section 3.2."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + ln("self_attention", "out", dense(att["out"], heads(att, x, **see)))
  x = cross(p, x)
  return x + ln("ffn", "out", dense(ffn["wo"], gelu(dense(ffn["wi"], x))))


def layernorm_scaling(p, x, depth, layer, cross=no_cross, **see):
  """arXiv 2502.05795, equation 5: layer counts from 1."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + dense(att["out"], heads(att, ln("self_attention", "in", x) / math.sqrt(layer), **see))
  x = cross(p, x)
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x) / math.sqrt(layer))))


def layer_scale(p, x, depth, cross=no_cross, **see):
  """arXiv 2103.17239, equation 4."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = dense(att["out"], heads(att, ln("self_attention", "in", x), **see))
  x = x + p["self_attention_residual"]["branch"] * h
  x = cross(p, x)
  h = dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x))))
  return x + p["ffn_residual"]["branch"] * h


def rezero(p, x, depth, cross=no_cross, **see):
  """arXiv 2003.04887, equation 1."""
  att, ffn = p["self_attention"], p["ffn"]
  x = x + p["self_attention_residual"]["branch"] * dense(att["out"], heads(att, x, **see))
  x = cross(p, x)
  return x + p["ffn_residual"]["branch"] * dense(ffn["wo"], gelu(dense(ffn["wi"], x)))


def depth_mup(p, x, depth, cross=no_cross, **see):
  """arXiv 2310.02244: branches times 1 / sqrt(L)."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + dense(att["out"], heads(att, ln("self_attention", "in", x), **see)) / math.sqrt(depth)
  x = cross(p, x)
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x)))) / math.sqrt(depth)


def completep(p, x, depth, cross=no_cross, **see):
  """arXiv 2505.01618: branches times 1 / L."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  x = x + dense(att["out"], heads(att, ln("self_attention", "in", x), **see)) / depth
  x = cross(p, x)
  return x + dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x)))) / depth


def keel(p, x, depth, cross=no_cross, **see):
  """arXiv 2601.19895: a is the number of the stack's sublayers."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  a = (2 if cross is no_cross else 3) * depth
  h = dense(att["out"], heads(att, ln("self_attention", "in", x), **see))
  x = ln("self_attention", "post", a * x + h)
  x = cross(p, x)
  h = dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x))))
  return ln("ffn", "post", a * x + h)


def olmo2(p, x, depth, cross=no_cross, **see):
  """arXiv 2501.00656, section 3: RMSNorm of the branches, and of all of q and of k."""
  att, ffn, norms = p["self_attention"], p["ffn"], (p["self_attention_residual"], p["ffn_residual"])
  h = dense(att["out"], heads(att, x, qk_norm=all_heads(rms_norm), **see))
  x = x + rms_norm(norms[0]["out_norm"], h)
  x = cross(p, x)
  return x + rms_norm(norms[1]["out_norm"], dense(ffn["wo"], gelu(dense(ffn["wi"], x))))


def _lambda_beta(depth):
  """arXiv 2403.09635: lambda^2 = 1 - 2 / N and beta^2 = 2 / N."""
  return math.sqrt(1 - 2 / depth), math.sqrt(2 / depth)


def deepscalelm(p, x, depth, cross=no_cross, **see):
  """arXiv 2403.09635: lambda skip + beta block, Pre-LN."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  lam, beta = _lambda_beta(depth)
  x = lam * x + beta * dense(att["out"], heads(att, ln("self_attention", "in", x), **see))
  x = cross(p, x)
  return lam * x + beta * dense(ffn["wo"], gelu(dense(ffn["wi"], ln("ffn", "in", x))))


def deepscalelm_post(p, x, depth, cross=no_cross, **see):
  """arXiv 2403.09635, Post-LN: lambda multiplies what the last norm gave."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  lam, beta = _lambda_beta(depth)
  h = dense(att["out"], heads(att, x, **see))
  x = ln("self_attention", "post", lam * x + beta * h)
  x = cross(p, x)
  return ln("ffn", "post", lam * x + beta * dense(ffn["wo"], gelu(dense(ffn["wi"], x))))


def pre_ln_qk_norm(p, x, depth, cross=no_cross, **see):
  """arXiv 2302.05442, section 2: q_i and k_i normalised before their product."""
  see["qk_norm"] = each_head(layer_norm)
  return pre_ln(p, x, depth, cross, **see)


def normformer_two_residual_scales(p, x, depth, cross=no_cross, **see):
  """fairseq's branch normformer2: alpha1 on attention's residual, alpha2 on the FFN's, no gamma."""
  att, ffn, ln = p["self_attention"], p["ffn"], _norms(p)
  h = dense(att["out"], heads(att, ln("self_attention", "in", x), **see))
  x = p["self_attention_residual"]["skip"] * x + ln("self_attention", "out", h)
  x = cross(p, x)
  h = gelu(dense(ffn["wi"], ln("ffn", "in", x)))
  return p["ffn_residual"]["skip"] * x + dense(ffn["wo"], layer_norm(ffn["mid_norm"], h))


def multiway_magneto(p, x, depth, split, **see):
  """arXiv 2208.10442, figure 3 and torchscale: Magneto, joint attention, all else an expert's."""
  vision, text = expert(p, "vision"), expert(p, "text")

  def both(f, x):
    return np.concatenate([f(vision, x[:, :split]), f(text, x[:, split:])], axis=1)

  u = both(lambda p, x: _norms(p)("self_attention", "in", x), x)
  q, k, v = (
    np.concatenate(
      [
        project(vision["self_attention"][w], u[:, :split]),
        project(text["self_attention"][w], u[:, split:]),
      ],
      axis=2,
    )
    for w in ("query", "key", "value")
  )
  h = attend(q, k, v, **see)
  h = both(lambda p, h: layer_norm(p["self_attention"]["mid_norm"], h), h)
  x = x + both(lambda p, h: dense(p["self_attention"]["out"], h), h)
  h = both(lambda p, x: gelu(dense(p["ffn"]["wi"], _norms(p)("ffn", "in", x))), x)
  return x + both(lambda p, h: dense(p["ffn"]["wo"], layer_norm(p["ffn"]["mid_norm"], h)), h)


def expert(p, name):
  """One expert's parameters, as those of a plain model."""
  if name in p:
    return p[name]
  return {
    key: expert(value, name) if isinstance(value, dict) else value for key, value in p.items()
  }


def _norms(p):
  """LN of a sublayer at a site, by name."""
  return lambda sublayer, site, x: layer_norm(p[f"{sublayer}_residual"][f"{site}_norm"], x)


def _a_head(gamma, x):
  """One value a head, on the channels of x."""
  return np.repeat(gamma, x.shape[-1] // len(gamma))


# ---------------------------------------------------------------------------------------------
# Cross-attention, between self-attention and the feed-forward network of a decoder
# ---------------------------------------------------------------------------------------------


def cross_pre_ln(p, x, memory, depth, layer, **see):
  """One norm, before it: Pre-LN; arXiv 2210.06423, equation 5 (Magneto); fairseq (NormFormer)."""
  att, ln = p["cross_attention"], _norms(p)
  return x + dense(att["out"], heads(att, ln("cross_attention", "in", x), memory, **see))


def cross_post_ln(p, x, memory, depth, layer, **see):
  """arXiv 1706.03762, section 3.1."""
  att, ln = p["cross_attention"], _norms(p)
  return ln("cross_attention", "post", x + dense(att["out"], heads(att, x, memory, **see)))


def cross_deepnet(p, x, memory, depth, layer, **see):
  """arXiv 2203.00555, figure 2: the decoder's alpha is (3M)^1/4."""
  att, ln, alpha = p["cross_attention"], _norms(p), (3 * depth) ** (1 / 4)
  return ln("cross_attention", "post", alpha * x + dense(att["out"], heads(att, x, memory, **see)))


def cross_sandwich_ln(p, x, memory, depth, layer, **see):
  att, ln = p["cross_attention"], _norms(p)
  h = dense(att["out"], heads(att, ln("cross_attention", "in", x), memory, **see))
  return x + ln("cross_attention", "out", h)


def cross_out_norm(p, x, memory, depth, layer, **see):
  att, ln = p["cross_attention"], _norms(p)
  return x + ln("cross_attention", "out", dense(att["out"], heads(att, x, memory, **see)))


def cross_olmo2(p, x, memory, depth, layer, **see):
  att, norm = p["cross_attention"], p["cross_attention_residual"]["out_norm"]
  h = heads(att, x, memory, qk_norm=all_heads(rms_norm), **see)
  return x + rms_norm(norm, dense(att["out"], h))


def cross_layernorm_scaling(p, x, memory, depth, layer, **see):
  att, h = p["cross_attention"], _norms(p)("cross_attention", "in", x) / math.sqrt(layer)
  return x + dense(att["out"], heads(att, h, memory, **see))


def cross_layer_scale(p, x, memory, depth, layer, **see):
  att, h = p["cross_attention"], _norms(p)("cross_attention", "in", x)
  scale = p["cross_attention_residual"]["branch"]
  return x + scale * dense(att["out"], heads(att, h, memory, **see))


def cross_rezero(p, x, memory, depth, layer, **see):
  att, scale = p["cross_attention"], p["cross_attention_residual"]["branch"]
  return x + scale * dense(att["out"], heads(att, x, memory, **see))


def cross_depth_mup(p, x, memory, depth, layer, **see):
  att, h = p["cross_attention"], _norms(p)("cross_attention", "in", x)
  return x + dense(att["out"], heads(att, h, memory, **see)) / math.sqrt(depth)


def cross_completep(p, x, memory, depth, layer, **see):
  att, h = p["cross_attention"], _norms(p)("cross_attention", "in", x)
  return x + dense(att["out"], heads(att, h, memory, **see)) / depth


def cross_keel(p, x, memory, depth, layer, **see):
  att, ln = p["cross_attention"], _norms(p)
  h = dense(att["out"], heads(att, ln("cross_attention", "in", x), memory, **see))
  return ln("cross_attention", "post", 3 * depth * x + h)


def cross_deepscalelm(p, x, memory, depth, layer, **see):
  """Scaled as the stack's other residuals are, which the authors' code does not do."""
  att, h = p["cross_attention"], _norms(p)("cross_attention", "in", x)
  lam, beta = _lambda_beta(depth)
  return lam * x + beta * dense(att["out"], heads(att, h, memory, **see))


# ---------------------------------------------------------------------------------------------
# Stacks
# ---------------------------------------------------------------------------------------------


def stack(params, x, segments, *, final_norm, cross=None, **options):
  """Runs `segments`, each a tuple of layers (functions of this module), over stacked parameters.

  `final_norm` is a norm of this module, or None; `cross` is a cross-attention with its memory
  bound; other options are those of the layers.
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
        own = which if "layer" in inspect.signature(layer).parameters else {}
        if cross is not None:
          own = own | {"cross": functools.partial(cross, depth=depth, **which)}
        p = jax.tree.map(operator.itemgetter(repeat), block)
        x = layer(p, x, depth, **own, **options)
  return final_norm(params["final_norm"], x) if final_norm else x


def embed(params, tokens, *, scale, norm=None):
  """scale E[token] + P[position], with learned positions; then a norm, if there is one."""
  table = params["token_embedding"]["embedding"]
  x = scale * table[tokens]
  if "position_embedding" in params:
    x = x + params["position_embedding"]["embedding"][: tokens.shape[1]]
  return norm(params["embedding_norm"], x) if norm else x


def causal_lm(params, tokens, segments, *, final_norm, scale, embedding_norm=None, **options):
  """Logits of a tied model: embedding, stack, E^T."""
  x = embed(params, tokens, scale=scale, norm=embedding_norm)
  h = stack(params["stack"], x, segments, final_norm=final_norm, **options)
  return h @ params["token_embedding"]["embedding"].T


def encoder(params, tokens, segments, *, final_norm, scale, mask, embedding_norm=None, **options):
  """Padding enters as zeros, and no query sees it."""
  x = embed(params, tokens, scale=scale, norm=embedding_norm) * mask[..., None]
  visible = mask[:, None, None, :]
  return stack(params["stack"], x, segments, final_norm=final_norm, visible=visible, **options)


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
    if name.endswith("embedding"):
      return (noise * leaf.shape[-1] ** -0.5).astype(dtype)
    if name.endswith("relative_bias"):
      return noise.astype(dtype)
    return ((not name.endswith("bias")) + 0.3 * noise).astype(dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes.get("params", {}))


def _fan_in(path, leaf):
  """Of stacked or single kernels: [D, N, H] into heads, [N, H, D] out of them, [D, F] otherwise.

  Those of a convolution are [w, C, D] or [h, w, C, D].
  """
  names = {key.key for key in path[-3:-1]}  # The last may be an expert's.
  if any(name.startswith(("projection", "conv_", "vgg_")) for name in names):
    return math.prod(leaf.shape[:-1])
  if names & {"query", "key", "value"}:
    return leaf.shape[-3]
  return math.prod(leaf.shape[-3 if "out" in names else -2 : -1])
