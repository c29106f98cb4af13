"""Continues a prompt: `python -m magneto_jax.generate --workdir=DIR --prompt="..."`."""

import jax
from absl import flags

from magneto_jax import cli, decoding, runs
from magneto_jax.config import ConfigError

_WORKDIR = flags.DEFINE_string("workdir", None, "A workdir that train has filled.", required=True)
_PROMPT = flags.DEFINE_string("prompt", "", "The text to continue.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "How many tokens to add at most.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 1, "How many continuations.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.8, "Divides the logits; 0 takes the best token each time.", lower_bound=0.0
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k best; 0: all.", lower_bound=0)
_TOP_P = flags.DEFINE_float(
  "top_p", 1.0, "Sample in the nucleus of this mass.", lower_bound=0.0, upper_bound=1.0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0)
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; the newest by default.")


def main(argv: list[str]) -> None:
  del argv
  if _TOP_P.value == 0:
    raise ConfigError("--top_p must be above 0; for the best token each time set --temperature=0")
  tokenizer = runs.load_tokenizer(_WORKDIR.value)
  model, variables = runs.load(_WORKDIR.value, step=_STEP.value)
  prompt = [tokenizer.bos_id, *tokenizer.encode(_PROMPT.value)]
  continuations = decoding.generate(
    model,
    variables,
    [prompt] * _SAMPLES.value,
    max_new_tokens=_TOKENS.value,
    key=jax.random.key(_SEED.value),
    temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value,
    top_p=_TOP_P.value,
    eos_id=tokenizer.eos_id,
    pad_id=tokenizer.pad_id,
  )
  for i, tokens in enumerate(continuations):
    if _SAMPLES.value > 1:
      print(f"--- {i + 1} of {_SAMPLES.value}")
    print(_PROMPT.value + tokenizer.decode(tokens))


if __name__ == "__main__":
  cli.run(main)
