"""Continues a prompt: `python -m magneto_jax.generate --workdir=DIR --prompt="..."`."""

import jax
from absl import flags

from magneto_jax import cli, decoding, runs
from magneto_jax.config import ConfigError, config_errors


def main() -> None:
  """Defines the flags and runs the command."""
  cli.define_workdir_flag("A workdir that train has filled.")
  flags.DEFINE_string("prompt", "", "The text to continue.")
  flags.DEFINE_integer("tokens", 128, "How many tokens to add at most.", lower_bound=1)
  flags.DEFINE_integer("samples", 1, "How many continuations.", lower_bound=1)
  flags.DEFINE_float(
    "temperature", 0.8, "Divides the logits; 0 takes the best token each time.", lower_bound=0.0
  )
  flags.DEFINE_integer("top_k", 0, "Sample among the k best; 0: all.", lower_bound=0)
  flags.DEFINE_float(
    "top_p", 1.0, "Sample in the nucleus of this mass.", lower_bound=0.0, upper_bound=1.0
  )
  flags.DEFINE_integer("seed", 0, "The seed of the sampling.", lower_bound=0, upper_bound=2**32 - 1)
  flags.DEFINE_integer("step", None, "The checkpoint's step; by default the newest.")
  cli.run(lambda: run(flags.FLAGS))


def run(args) -> None:
  """Prints the continuations that the flags ask for."""
  if args.top_p == 0:
    raise ConfigError("--top_p must be above 0; for the best token each time set --temperature=0")
  tokenizer = runs.load_tokenizer(args.workdir)
  model, variables = runs.load(args.workdir, step=args.step)
  with config_errors():
    prompt = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
    continuations = decoding.generate(
      model,
      variables,
      [prompt] * args.samples,
      max_new_tokens=args.tokens,
      key=jax.random.key(args.seed),
      temperature=args.temperature,
      top_k=args.top_k,
      top_p=args.top_p,
      eos_id=tokenizer.eos_id,
      pad_id=tokenizer.pad_id,
    )
  for i, tokens in enumerate(continuations):
    if args.samples > 1:
      print(f"--- {i + 1} of {args.samples}")
    print(args.prompt + tokenizer.decode(tokens))


if __name__ == "__main__":
  main()
