from magneto_jax.config import config_of_variant


def _tiny(config):
  config.task = "image_tokenizer"
  config.log_every = 25
  config.model.layers = 2
  config.model.encoder_layers = 2
  config.model.width = 96
  config.model.patch_size = 4
  config.model.positions = "learned"
  config.model.codebook_redraw = 0.1
  config.optimizer.b2 = 0.99
  config.optimizer.weight_decay = 1e-4
  config.optimizer.clip_norm = 1.0
  config.optimizer.end_factor = 0.05
  config.optimizer.warmup_steps = 50
  config.optimizer.learning_rate = 2e-3


def mnist(config):
  _tiny(config)
  config.steps = 1500
  config.batch_size = 64
  config.eval_every = config.checkpoint_every = 250
  config.model.image_size = 28
  config.model.image_vocab_size = 128
  config.data.name = "embedded/mnist5k"


VARIANTS = {"mnist": mnist}


def get_config(variant="mnist"):
  return config_of_variant(VARIANTS, variant, "configs/image_tokenizer.py")
