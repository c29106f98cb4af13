"""Attention in NumPy float64, a Python loop a logit: what the vectorised reference is held to."""

import math

import numpy as np

from magneto_jax.kernels import RelativeBias

INF = math.inf


def brute_bucket(r, num_buckets, bidirectional, max_distance):
  """T5's bucket in exact integers: log(m/e) / log(D/e) (n-e) >= j  iff  (m/e)^(n-e) >= (D/e)^j."""
  n = num_buckets // 2 if bidirectional else num_buckets
  base = n if bidirectional and r > 0 else 0
  m = abs(r) if bidirectional else max(-r, 0)
  e = n // 2
  if m < e:
    return base + m
  j = 0
  while e + j < n - 1 and m ** (n - e) * e ** (j + 1) >= max_distance ** (j + 1) * e ** (n - e):
    j += 1
  return base + e + j


def brute_force(
  q,
  k,
  v,
  bias=None,
  *,
  q_segment_ids=None,
  kv_segment_ids=None,
  kv_lengths=None,
  is_causal=False,
  q_offset=0,
  window=None,
  logits_soft_cap=None,
  scale=None,
  keep=None,
  dropout_rate=0.0,
):
  """The definition, one query of one head at a time; `keep` [B, N, T, S] is the dropout mask."""
  (B, T, N, H), (_, S, K, _) = q.shape, k.shape
  out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -INF)
  for b, t, n in np.ndindex(B, T, N):
    position, kv_head = t + q_offset, n * K // N
    logits = {}
    for s in range(S):
      if is_causal and s > position:
        continue
      if window is not None and window[0] is not None and s < position - window[0]:
        continue
      if window is not None and window[1] is not None and s > position + window[1]:
        continue
      if q_segment_ids is not None and q_segment_ids[b, t] != kv_segment_ids[b, s]:
        continue
      if kv_lengths is not None and s >= kv_lengths[b]:
        continue
      x = sum(float(q[b, t, n, h]) * float(k[b, s, kv_head, h]) for h in range(H))
      x *= 1 / math.sqrt(H) if scale is None else scale
      if logits_soft_cap is not None:
        x = logits_soft_cap * math.tanh(x / logits_soft_cap)
      if isinstance(bias, RelativeBias):
        num_buckets = bias.table.shape[0]
        bucket = brute_bucket(s - position, num_buckets, bias.bidirectional, bias.max_distance)
        x += float(bias.table[bucket, n])
      elif bias is not None:
        b_, n_, t_, s_ = (i % size for i, size in zip((b, n, t, s), bias.shape, strict=True))
        x += float(bias[b_, n_, t_, s_])
      if x > -INF:
        logits[s] = x
    if logits:
      top = max(logits.values())
      lse[b, t, n] = top + math.log(sum(math.exp(x - top) for x in logits.values()))
    for s, x in logits.items():
      p = math.exp(x - lse[b, t, n])
      if keep is not None:
        p *= keep[b, n, t, s] / (1 - dropout_rate)
      out[b, t, n] += p * v[b, s, kv_head].astype(np.float64)
  return out, lse
