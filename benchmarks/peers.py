"""The other side: PyTorch libraries, as their users call them."""

import math
import sys
import types
from importlib.metadata import version

import torch
import torch.nn.functional as F

from benchmarks.shapes import Shape


class Torch:
  """A torch model, ready to be timed, with the interface of `ours.Library`.

  Subclasses build `network` and call it: `logits(tokens) -> [B, T, V]`.
  """

  package = "torch"

  def __init__(self, shape: Shape, threads: int, device: str = "cpu"):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    self._shape = shape
    arrays = shape.batch().items()
    batch = {name: torch.from_numpy(array).long().to(device) for name, array in arrays}
    self._inputs, self._targets = batch["inputs"], batch["targets"]
    # True where there is padding; None where there is none.
    is_padding = torch.arange(shape.seq_length, device=device)[None] >= batch["lengths"][:, None]
    self._padding = None if shape.causal else is_padding
    with torch.device(device):
      self.network = self.build(shape)
    # fused: the fastest of torch's three AdamW.
    self._optimizer = torch.optim.AdamW(
      self.network.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    self.parameters = sum(p.numel() for p in self.network.parameters())
    self.versions = {name: version(name) for name in {"torch", self.package}}

  def _loss(self) -> torch.Tensor:
    logits = self.logits(self._inputs)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), self._targets.reshape(-1))

  def step(self) -> float:
    self.network.train()
    self._optimizer.zero_grad(set_to_none=True)
    loss = self._loss()
    loss.backward()
    self._optimizer.step()
    return loss.item()

  @torch.inference_mode()
  def forward(self) -> float:
    self.network.eval()
    return self._loss().item()

  @torch.inference_mode()
  def decode(self, *, batch_size: int, prompt_length: int, new_tokens: int) -> int:
    self.network.eval()
    prompts = self._inputs[:batch_size, :prompt_length]
    return self.continued(prompts, new_tokens).numel() - prompts.numel()


class Torchscale(Torch):
  """microsoft/torchscale's Sub-LN decoder or encoder, tied, with learned positions."""

  package = "torchscale"

  def build(self, shape: Shape):
    _stand_in_for_timm()
    from torchscale.architecture import config, decoder, encoder
    from torchscale.component.embedding import PositionalEmbedding, TextEmbedding

    kind = "decoder" if shape.causal else "encoder"
    options = {
      f"{kind}_embed_dim": shape.width,
      f"{kind}_attention_heads": shape.heads,
      f"{kind}_ffn_embed_dim": shape.ffn_width,
      f"{kind}_layers": shape.layers,
      "vocab_size": shape.vocab_size,
      "no_scale_embedding": False,
      "subln": True,
    }
    embedding = TextEmbedding(shape.vocab_size, shape.width)
    # What `share_*_input_output_embed` does; for the encoder that option reads a missing field.
    projection = torch.nn.Linear(shape.width, shape.vocab_size, bias=False)
    projection.weight = embedding.weight
    configs = {"decoder": config.DecoderConfig, "encoder": config.EncoderConfig}
    networks = {"decoder": decoder.Decoder, "encoder": encoder.Encoder}
    return networks[kind](
      configs[kind](**options),
      embed_tokens=embedding,
      output_projection=projection,
      # Its positions count from 2: two rows are never read.
      embed_positions=PositionalEmbedding(shape.max_length + 2, shape.width),
    )

  def logits(self, tokens):
    if self._shape.causal:
      return self.network(tokens)[0]
    return self.network(tokens, encoder_padding_mask=self._padding)["encoder_out"]

  def continued(self, tokens, new_tokens: int):
    """The loop that torchscale leaves to its users: the whole prefix in, the cache in `state`."""
    state = {"is_first_step": True}
    for _ in range(new_tokens):
      logits = self.network(tokens, incremental_state=state)[0]
      state["is_first_step"] = False
      tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens


class CompiledTorchscale(Torchscale):
  """The same on a GPU as torch's users train it: bfloat16 by autocast, float32 parameters.

  Compiled are a layer, once for all, and the output with its loss.
  """

  def __init__(self, shape: Shape, threads: int):
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    super().__init__(shape, threads, self._device)
    for layer in self.network.layers:
      layer.compile(dynamic=False)
    self._score = torch.compile(self._score, dynamic=False)

  def _loss(self) -> torch.Tensor:
    with torch.autocast(self._device, torch.bfloat16):
      x_BTD = self.network(self._inputs, features_only=True)[0]
      return self._score(x_BTD, self.network.output_projection.weight)

  def _score(self, x_BTD, table_VD) -> torch.Tensor:
    logits = F.linear(x_BTD, table_VD).flatten(0, 1)
    return F.cross_entropy(logits.float(), self._targets.flatten())

  def memory(self) -> dict[str, float]:
    """GiB of the device at the highest point so far."""
    return {"memory_gib": torch.cuda.max_memory_allocated() / 2**30}


def _stand_in_for_timm() -> None:
  """torchscale imports `drop_path` from timm 0.6, which does not import beside today's torch."""

  def drop_path(x, rate: float = 0.0, training: bool = False):
    if rate and training:
      raise NotImplementedError("benchmarks run without drop-path")
    return x

  layers = types.ModuleType("timm.models.layers")
  layers.drop_path = drop_path
  for name in ("timm", "timm.models"):
    sys.modules.setdefault(name, types.ModuleType(name))
  sys.modules["timm.models.layers"] = layers


class XTransformers(Torch):
  """lucidrains/x-transformers: Pre-LN, torch's fused attention, no biases in attention."""

  package = "x-transformers"

  def build(self, shape: Shape):
    from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper

    network = TransformerWrapper(
      num_tokens=shape.vocab_size,
      max_seq_len=shape.max_length,
      tie_embedding=True,
      attn_layers=(Decoder if shape.causal else Encoder)(
        dim=shape.width,
        depth=shape.layers,
        heads=shape.heads,
        attn_dim_head=shape.width // shape.heads,
        attn_flash=True,
        ff_mult=shape.ffn_width / shape.width,
      ),
    )
    self._wrapper = AutoregressiveWrapper(network) if shape.causal else None
    return network

  def logits(self, tokens):
    return self.network(tokens, mask=None if self._padding is None else ~self._padding)

  def continued(self, tokens, new_tokens: int):
    new = self._wrapper.generate(tokens, new_tokens, temperature=0.0, cache_kv=True)
    return torch.cat([tokens, new], dim=1)


class TorchEncoder(Torch):
  """torch.nn.TransformerEncoder: Pre-LN, torch's fused attention."""

  def build(self, shape: Shape):
    return _TorchEncoderLM(shape)

  def logits(self, tokens):
    return self.network(tokens, self._padding)


class _TorchEncoderLM(torch.nn.Module):
  def __init__(self, shape: Shape):
    super().__init__()
    self._causal = shape.causal
    self._scale = math.sqrt(shape.width)
    self.tokens = torch.nn.Embedding(shape.vocab_size, shape.width)
    self.positions = torch.nn.Embedding(shape.max_length, shape.width)
    for table in (self.tokens, self.positions):
      torch.nn.init.normal_(table.weight, std=shape.width**-0.5)
    layer = torch.nn.TransformerEncoderLayer(
      shape.width,
      shape.heads,
      shape.ffn_width,
      dropout=0.0,
      activation="gelu",
      batch_first=True,
      norm_first=True,
    )
    self.stack = torch.nn.TransformerEncoder(
      layer, shape.layers, norm=torch.nn.LayerNorm(shape.width), enable_nested_tensor=False
    )

  def forward(self, tokens, padding):
    length = tokens.shape[1]
    mask = None
    if self._causal:
      mask = torch.nn.Transformer.generate_square_subsequent_mask(length)
    x = self.tokens(tokens) * self._scale + self.positions.weight[:length]
    x = self.stack(x, mask=mask, src_key_padding_mask=padding, is_causal=self._causal)
    return F.linear(x, self.tokens.weight)


VARIANTS = {
  "torchscale": Torchscale,
  "torchscale-compiled": CompiledTorchscale,
  "x-transformers": XTransformers,
  "torch": TorchEncoder,
}
