"""TODO"""
import dataclasses
@dataclasses.dataclass(frozen=True)
class PallasTpu:
  interpret: bool = False
  name = "pallas_tpu"
  platforms = ("tpu",)
  def check(self, call):
    raise NotImplementedError("not yet")
