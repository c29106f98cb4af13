"""An array that may be compiled for some platforms only, with an error in words for the others."""

import jax
from jax.extend import core
from jax.interpreters import batching, mlir


@jax.jit(static_argnames=("name", "platforms"))
def only_on(x: jax.Array, *, name: str, platforms: tuple[str, ...]) -> jax.Array:
  """x itself.

  Which platform a program is compiled for is known when it is lowered, and not before: what `name`
  does not run on is refused then, by NotImplementedError.
  """
  return _only_on.bind(x, name=name, platforms=platforms)


def _lower(context, x, *, name, platforms):
  for platform in context.module_context.platforms:
    if platform not in platforms:
      raise NotImplementedError(
        f"{name} runs on {' and '.join(platforms)}, and this is compiled for {platform}: name"
        " another implementation, or none"
      )
  return [x]


_only_on = core.Primitive("only_on")
_only_on.def_abstract_eval(lambda x, **_: x)
batching.defvectorized(_only_on)
mlir.register_lowering(_only_on, _lower)
