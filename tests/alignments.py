"""Losses of alignments by listing all alignments there are, in float64."""

import itertools

import numpy as np


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def transducer_paths(length: int, labels):
  """Each alignment as its steps (t, u, whether it says a label)."""
  steps = length - 1 + len(labels)
  for places in itertools.combinations(range(steps), len(labels)):
    t, u, path = 0, 0, []
    for step in range(steps):
      says = step in places
      path.append((t, u, says))
      t, u = t + (not says), u + says
    yield [*path, (t, u, False)]


def transducer(logits_TXV, labels, blank=0):
  """(nats, gradient with respect to the logits, o_b, o_y)."""
  log_p = log_softmax(logits_TXV)
  length, columns, _ = log_p.shape
  paths = list(transducer_paths(length, labels))
  symbol = lambda u, says: labels[u] if says else blank
  totals = np.array([sum(log_p[t, u, symbol(u, s)] for t, u, s in path) for path in paths])
  log_total = np.logaddexp.reduce(totals)
  gradient, occupied = np.zeros_like(log_p), np.zeros((2, length, columns))
  for path, share in zip(paths, np.exp(totals - log_total), strict=True):
    for t, u, says in path:
      gradient[t, u] += share * np.exp(log_p[t, u])
      gradient[t, u, symbol(u, says)] -= share
      occupied[int(says), t, u] += share
  return -log_total, gradient, *occupied


def collapsed(alignment, blank=0) -> tuple[int, ...]:
  """The text of a CTC alignment."""
  return tuple(symbol for symbol, _ in itertools.groupby(alignment) if symbol != blank)


def ctc_texts(log_p_TV, blank=0) -> dict[tuple[int, ...], list]:
  """{text: [(log-probability of an alignment, the alignment), ...]}."""
  length, vocab_size = log_p_TV.shape
  found = {}
  for alignment in itertools.product(range(vocab_size), repeat=length):
    total = sum(log_p_TV[t, k] for t, k in enumerate(alignment))
    found.setdefault(collapsed(alignment, blank), []).append((total, alignment))
  return found


def ctc(logits_TV, labels, blank=0):
  """(nats, gradient with respect to the logits)."""
  log_p = log_softmax(logits_TV)
  totals, alignments = zip(*ctc_texts(log_p, blank)[tuple(labels)], strict=True)
  log_total = np.logaddexp.reduce(totals)
  gradient = np.exp(log_p)
  for total, alignment in zip(totals, alignments, strict=True):
    for t, k in enumerate(alignment):
      gradient[t, k] -= np.exp(total - log_total)
  return -log_total, gradient
