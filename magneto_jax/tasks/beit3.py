"""What the tasks of images and texts share: from a config to its BEiT-3."""

from magneto_jax.config import ConfigError, TrainConfig
from magneto_jax.models.beit3 import BEiT3
from magneto_jax.models.encoder import Encoder
from magneto_jax.tasks import common
from magneto_jax.tasks.task import Facts
from magneto_jax.theory import records


def architecture(config: TrainConfig, facts: Facts) -> records.Architecture:
  """What the recipe needs to know of the encoder; the correlation is the text's."""
  return common.architecture(config, facts, "encoder", encoder_layers=config.model.layers)


def recipe(config: TrainConfig, facts: Facts) -> records.Stack:
  """The encoder stack's record of the config's recipe, the fusion layers a segment of their own."""
  stack, fusion = common.recipe(config, architecture(config, facts)).encoder, _fusion_layers(config)
  return records.cut(stack, config.model.layers - fusion) if fusion else stack


def _fusion_layers(config: TrainConfig) -> int:
  fusion, layers = config.model.fusion_layers, config.model.layers
  if fusion > layers:
    raise ConfigError(
      f"config.model.fusion_layers={fusion} are the top ones of model.layers={layers}: set it to at"
      " most as many"
    )
  return fusion


def encoder(config: TrainConfig, facts: Facts) -> BEiT3:
  """The config's multiway encoder of images, texts and pairs of both.

  Args:
    config: of a run.
    facts: `vocab_size`, the tokenizer's ids and the mask's.

  Raises:
    ConfigError: the config asks for what such an encoder cannot have.
  """
  common.refuse_window(config)
  model, task = config.model, config.task
  if model.positions != "learned":
    raise ConfigError(
      f"config.task={task!r} has a table of positions for each modality: set"
      f" model.positions='learned', not {model.positions!r}"
    )
  if config.mesh.sequence != 1:
    raise ConfigError(
      f"config.mesh.sequence={config.mesh.sequence} cannot cut an image's patches, its class token"
      f" and a text alike: with config.task={task!r} use mesh.fsdp or mesh.tensor"
    )
  return BEiT3(
    encoder=Encoder(
      recipe=recipe(config, facts),
      experts=("vision", "text"),
      shared_attention=model.shared_attention,
      fusion_layers=model.fusion_layers,
      **common.backbone(config) | {"positions": "none"},
    ),
    vocab_size=facts["vocab_size"],
    num_patches=common.patches(config),
    patch_size=model.patch_size,
    max_text_length=config.data.seq_length,
  )


def planned_facts(config: TrainConfig) -> Facts:
  """What a model must know of its data, without them; see `common.planned_facts`.

  vocab_size: V + 1, the tokenizer's ids and the mask's, which all models of images and texts have,
    so that one can start with another.
  """
  known = common.planned_facts(config)
  return {**known, "vocab_size": known["vocab_size"] + 1}
