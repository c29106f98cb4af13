"""Attention on one GPU, by case: what `python -m benchmarks.attention --platform=cuda` runs.

Every implementation is a process, so that all are traced at the same time, and one whose kernel
takes its process down is started again while the others lose nothing. Results are written after
every case.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import re
import statistics
import subprocess
import time

from benchmarks import coordinator
from benchmarks.shapes import Attention
from benchmarks.stability import pictures
from magneto_jax import reporting

OURS = "magneto_jax"
CALLS = {"forward": "forward", "gradient": "forward and backward"}
TOKENS, WIDTH = 16_384, 2_048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DROPOUT = 0.1
FEATURES = (
  {},
  {"bias": True},
  {"bias": True, "bias_gradient": True},
  {"padding": True},
  {"dropout": DROPOUT},
  {"bias": True, "bias_gradient": True, "padding": True, "dropout": DROPOUT},
)


def _case(head_dim: int, length: int, causal: bool, **features) -> Attention:
  """As many tokens and as wide a stream for every length and head dim."""
  return Attention(
    batch=TOKENS // length,
    length=length,
    heads=WIDTH // head_dim,
    head_dim=head_dim,
    causal=causal,
    dtype="bfloat16",
    **features,
  )


def _triangle(batch: int, **features) -> Attention:
  """The shape with a bias that tokamax publishes its block sizes for."""
  return Attention(
    batch=batch, length=768, heads=4, head_dim=64, causal=False, dtype="bfloat16", **features
  )


CASES = (
  *(
    _case(head_dim, length, causal, **features)
    for head_dim in (64, 128)
    for causal in (False, True)
    for features in FEATURES
    for length in LENGTHS
  ),
  *(_triangle(batch, **features) for batch in (64, 256, 768) for features in FEATURES[1:3]),
)
# Some of each, for a first look.
QUICK = (
  *(_case(64, 4096, False, **features) for features in FEATURES),
  *(_case(128, 4096, True, **features) for features in FEATURES),
  *(_triangle(64, **features) for features in FEATURES[1:3]),
  *(_case(h, t, causal) for h, causal in ((64, True), (128, False)) for t in (4096, 16384)),
)
# Seconds after which a call is taken to hang: the kernels of a case are compiled in less.
PATIENCE_S = 240
# A turn of one variant: enough calls to take about so long.
TURN_MS = 25
# What a call may need beside its inputs: every process keeps what it has taken once.
MEMORY_GIB = 16.0
PRODUCT = 8192
PEAK_IN_WORDS = (
  f"the best rate of a product of {PRODUCT}^3, bfloat16, random, of the libraries given"
)
# How far norms of bfloat16 results may lie apart.
TOLERANCE = 2e-2
PICTURE = coordinator.ROOT / "docs" / "attention-gpu.png"
MARKED_DEVICE = "H200"


def variants(case: Attention) -> list[str]:
  """What is compared: `NAME-IMPLEMENTATION:HOW`.

  `:dense` is given the bias as the others are, `:no_dropout` is the same call without it.
  """
  features = case.bias or case.padding or case.dropout
  names = [OURS, f"{OURS}-pallas_gpu"] + [f"{OURS}-cudnn"] * bool(features)
  if case.bias:
    names += [f"{OURS}:dense", f"{OURS}-pallas_gpu:dense"]
  if case.dropout:
    names += [f"{OURS}:no_dropout", f"{OURS}-pallas_gpu:no_dropout"]
  names += ["jax.nn-cudnn"] + ["jax.nn-xla"] * (case.length <= 4096)
  names += ["tokamax-mosaic", "tokamax-triton"] + ["tokamax"] * bool(features)
  names += ["torch-flash", "torch-cudnn"] + ["torch-efficient"] * case.bias
  return names


def host(variant: str) -> str:
  """The process of a variant: its implementation's; one for all of torch's or tokamax's."""
  name = variant.partition(":")[0]
  return next((one for one in ("torch", "tokamax") if name.startswith(one)), name)


class Device:
  """An implementation's process, which is started again when a kernel has taken it down."""

  def __init__(self, name: str, variables: dict[str, str]):
    # torch's side only reads tables with jax.
    self._variables = variables | ({"JAX_PLATFORMS": "cpu"} if name == "torch" else {})
    self._name = name
    self.start()

  def start(self) -> None:
    """Raises RuntimeError if the library does not load."""
    self._process = coordinator.Process(self._variables, patience_s=PATIENCE_S)
    self.facts = self._process.ask(do="load_device", library=self._name)

  def ask(self, method: str, **options):
    """Raises RuntimeError if the process fails, dies or hangs; it must then be restarted."""
    return self._process.ask(do="tell", method=method, options=options)

  def restart(self) -> None:
    self._process.kill()
    self._process.close()
    # If it does not come up again, the next request says so.
    with contextlib.suppress(RuntimeError):
      self.start()

  def close(self) -> None:
    self._process.close()


def environment(platform: str) -> dict[str, str]:
  """What every process is given: they share the device, and compile anew on all cores."""
  return {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": platform,
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }


def start(names, variables) -> tuple[dict[str, Device], dict[str, str]]:
  """({name: its process}, {name: why there is none})."""
  devices, missing = {}, {}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    started = {name: pool.submit(Device, name, variables) for name in names}
  for name, future in started.items():
    try:
      devices[name] = future.result()
    except RuntimeError as error:
      missing[name] = last_line(error)
  if not devices:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    raise SystemExit(f"nothing could be loaded, is there a GPU? {reasons}")
  return devices, missing


class Measurement:
  """One case: its variants are compiled, checked and take turns; what fails drops out."""

  def __init__(self, devices: dict[str, Device], case: Attention, names, memory_gib: float):
    self._devices, self._case, self._memory_gib = devices, case, memory_gib
    self.results = {name: {} for name in names}

  def run(self, rounds: int) -> dict:
    """{variant: what it is, `rounds` of turns; or `refused` or `failed` and the reason}."""
    self._compile(dict.fromkeys(map(host, self.results)))
    for variant in self._running():
      self._attempt(variant, "check")
    check_agreement({name: self.results[name] for name in self._running()}, self._case)
    for _ in range(rounds):
      for variant in self._running():
        self._turns(variant)
    return self.results

  def _running(self) -> list[str]:
    return [name for name, x in self.results.items() if not {"refused", "failed"} & set(x)]

  def _compile(self, hosts) -> None:
    """In several processes at the same time."""
    case = dataclasses.asdict(self._case)
    futures = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for name in hosts:
        own = [variant for variant in self._running() if host(variant) == name]
        options = {"variants": own, "case": case, "memory_gib": self._memory_gib}
        futures[name] = own, pool.submit(self._devices[name].ask, "compile", **options)
    for name, (own, future) in futures.items():
      try:
        for variant, answer in future.result().items():
          self.results[variant] |= answer
      except RuntimeError as error:
        for variant in own:
          self.results[variant]["failed"] = last_line(error)
        self._devices[name].restart()

  def _attempt(self, variant: str, method: str, **options) -> dict | None:
    """What the variant's process answers; a failure costs that variant alone."""
    if variant not in self._running():
      return None
    device = self._devices[host(variant)]
    try:
      answer = device.ask(method, variant=variant, **options)
    except RuntimeError as error:
      self.results[variant]["failed"] = last_line(error)
      device.restart()
      self._compile([host(variant)])
      return None
    if method == "check":
      self.results[variant] |= answer
    return answer

  def _turns(self, variant: str) -> None:
    turns = {}
    for call in CALLS:
      count = round(TURN_MS / max(self.results[variant]["ms"][call], 1e-3))
      answer = self._attempt(variant, "turn", call=call, count=max(1, min(200, count)))
      if answer is None:
        return
      turns[call] = {name: [value] for name, value in answer.items()}
    self.results[variant].setdefault("rounds", []).append(turns)


def check_agreement(results: dict, case: Attention) -> None:
  """Marks as failed whose norms of output and gradients are not those of most (without dropout)."""
  if case.dropout or not results:
    return
  norms = zip(*(result["norms"] for result in results.values()), strict=True)
  middle = [statistics.median(each) for each in norms]
  for result in results.values():
    pairs = zip(result["norms"], middle, strict=True)
    if not all(math.isclose(*pair, rel_tol=TOLERANCE) for pair in pairs):
      result["failed"] = f"computes something else: norms {result['norms']}, not {middle}"


def measure_product(devices: dict[str, Device], rounds: int, platform: str) -> dict[str, float]:
  """{jax or torch: TFLOP a second of its product of random bfloat16 matrices, the best}."""
  size, rates = PRODUCT if platform == "cuda" else 256, {}
  libraries = {"torch" if name == "torch" else "jax": x for name, x in devices.items()}
  for name, device in libraries.items():
    request = {"size": size, "dtype": "bfloat16", "count": 10}
    try:
      turns = [device.ask("product", **request) for _ in range(rounds)]
    except RuntimeError as error:  # The other's will do.
      print(f"no product of {name}'s: {last_line(error)}")
      device.restart()
      continue
    rates[name] = 2 * size**3 / 1e9 / min(turn["wall_ms"] for turn in turns)
  return rates


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def summary(case: Attention, results: dict, peak: float) -> list[dict]:
  """A cell a variant: median, least and largest time, TFLOP/s, share of the peak, memory."""
  cells = []
  ours = results.get(OURS, {}).get("rounds")
  for variant, result in results.items():
    cell = {"case": case.name, "variant": variant}
    for name in ("implementation", "refused", "failed"):
      if name in result:
        cell[name] = result[name]
    if not {"refused", "failed"} & set(cell):
      for call in CALLS:
        times = [x for turns in result["rounds"] for x in turns[call]["wall_ms"]]
        queued = [x for turns in result["rounds"] for x in turns[call]["queue_ms"]]
        ms = statistics.median(times)
        tflops = case.flops[call] * case.visible_share / 1e9 / ms
        cell[call] = {
          "ms": ms,
          "min_ms": min(times),
          "max_ms": max(times),
          "queue_ms": statistics.median(queued),
          "tflop_per_second": tflops,
          "share_of_peak": tflops / peak,
          "memory_mib": result["memory_mib"][call],
        }
        if ours and variant != OURS and len(ours) == len(result["rounds"]):
          cell[call]["ours_over"] = coordinator.ratios(ours, result["rounds"], call, "wall_ms")
    cells.append(cell)
  return cells


@dataclasses.dataclass(frozen=True)
class Mark:
  """The time of `theirs` over that of `ours`, forward and backward, in cases with these features.

  Attributes:
    features: of the case, as its name ends.
    ours, theirs: variants; of several theirs the fastest.
    bound: what the ratio is at least.
    calls: of CALLS.
  """

  features: str
  ours: str
  theirs: tuple[str, ...]
  bound: float
  calls: tuple[str, ...] = ("gradient",)


_TOKAMAX = ("tokamax", "tokamax-mosaic", "tokamax-triton")
MARKS = (
  Mark("plain", OURS, ("jax.nn-cudnn",), 0.9, calls=("forward", "gradient")),
  Mark("bias+gradient", OURS, ("jax.nn-cudnn",), 2.0),
  Mark("bias+gradient", OURS, _TOKAMAX, 1.2),
  Mark(
    "dropout",
    f"{OURS}-pallas_gpu",
    (f"{OURS}-pallas_gpu:no_dropout",),
    1 / 1.15,
    calls=("forward", "gradient"),
  ),
)


def marks(cells: list[dict]) -> list[dict]:
  """What this library has set itself, on an H200, where both sides were measured."""
  ran = {(cell["case"], cell["variant"]): cell for cell in cells if "gradient" in cell}
  checked = []
  for mark in MARKS:
    for case in dict.fromkeys(cell["case"] for cell in cells):
      theirs = [ran[case, name] for name in mark.theirs if (case, name) in ran]
      if case.split()[-1] != mark.features or (case, mark.ours) not in ran or not theirs:
        continue
      for call in mark.calls:
        best = min(theirs, key=lambda cell: cell[call]["ms"])
        value = best[call]["ms"] / ran[case, mark.ours][call]["ms"]
        name = f"{case}, {CALLS[call]}: {best['variant']}'s time over {mark.ours}'s"
        checked.append(coordinator.mark(name, value, mark.bound, at_most=False))
  return checked


def show(cells: list[dict]) -> None:
  """Prints a case's table, and why variants are missing."""
  columns = ["variant"]
  for call in CALLS:
    name = {"forward": "fwd", "gradient": "fwd+bwd"}[call]
    columns += [f"{name} ms", "TFLOP/s", "of peak", "MiB"]
  rows, reasons = [], []
  for cell in cells:
    row = [cell["variant"]]
    for reason in ("refused", "failed"):
      if reason in cell:
        reasons.append(f"  {reason}: {cell['variant']}: {cell[reason]}")
    if "gradient" not in cell:
      continue
    for call in CALLS:
      entry = cell[call]
      row += [f"{entry['ms']:.3f} ({entry['min_ms']:.3f}-{entry['max_ms']:.3f})"]
      row += [f"{entry['tflop_per_second']:.0f}", f"{entry['share_of_peak']:.0%}"]
      row += [f"{entry['memory_mib']:.0f}"]
    rows.append(row)
  print(f"\n{cells[0]['case']}")
  coordinator.show(columns, rows, reasons)


def draw(cells: list[dict], path: pathlib.Path, title: str) -> None:
  """TFLOP/s by length without features: above forward, below with backward; a column a kind."""
  plain = [cell for cell in cells if cell["case"].endswith("plain") and "gradient" in cell]
  if not plain:
    return
  kinds = {}
  for cell in plain:
    length, head_dim, _, mask, _ = cell["case"].split()
    kinds.setdefault(f"{head_dim} {mask}", []).append((int(length[1:]), cell))
  styles = reporting.line_styles(list(dict.fromkeys(cell["variant"] for cell in plain)))
  figure, grid = pictures.panels(2, len(kinds), title=title, width=4.2, height=3.4)
  for axes, (kind, group) in zip(grid.T, kinds.items(), strict=True):
    for panel, call in zip(axes, CALLS, strict=True):
      for variant, style in styles.items():
        points = sorted(
          (n, x[call]["tflop_per_second"]) for n, x in group if x["variant"] == variant
        )
        panel.plot([x for x, _ in points], [y for _, y in points], lw=1.4, ms=4.5, **style)
      lengths = sorted({n for n, _ in group})
      panel.set_xscale("log", base=2)
      panel.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
      panel.set_ylim(bottom=0)
      pictures.tidy(panel, title=f"{kind}, {CALLS[call]}", xlabel="length", ylabel="TFLOP/s")
  pictures.save(figure, path, pictures.handles(styles))


def driver() -> str | None:
  """The NVIDIA driver's version and the card's limits, as nvidia-smi tells them."""
  fields = "driver_version,power.limit,clocks.max.sm"
  command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None


def last_line(error: Exception) -> str:
  """What an error says, without how it came there."""
  return str(error).strip().splitlines()[-1][:300]


def run(args, cases=None, platform: str = "cuda") -> pathlib.Path:
  """Measures the cases that `args` asks for; returns the results file.

  Args:
    args: the command line's.
    cases: others than CASES.
    platform: another one, to see the benchmark itself run.
  """
  variables = environment(platform)
  memory_gib = args.memory_gib or MEMORY_GIB
  cases = cases or (QUICK if args.quick else CASES)
  names = [case.name for case in cases]
  try:
    cases = [case for case in cases if re.search(args.cases, case.name)]
  except re.error as error:
    raise SystemExit(f"--cases={args.cases!r} is no regular expression: {error}") from None
  if not cases:
    raise SystemExit(f"--cases={args.cases!r} is in none of the names {', '.join(names)}")
  wanted = args.variants.split(",") if args.variants else None
  chosen = {case: wanted or variants(case) for case in cases}
  head = coordinator.provenance("attention", variables) | {"driver": driver()}
  names = dict.fromkeys(host(variant) for group in chosen.values() for variant in group)
  devices, missing = start(names, variables)
  try:
    products = measure_product(devices, args.rounds, platform)
    peak = max(products.values())
    device = next(iter(devices.values())).facts["device"]
    head |= {
      "device": device,
      "versions": {name: x.facts["versions"] for name, x in devices.items()},
      "missing": missing,
      "peak": PEAK_IN_WORDS,
      "peak_tflop_per_second": products,
      "flops": "4 B N T T H forward, 3 times that with backward, of the pairs that are visible",
      "memory": "beside the inputs, results included",
      "memory_limit_gib": memory_gib,
    }
    slug = re.sub(r"\W+", "-", device.lower()).strip("-")
    cells, measured, checked, unseen = [], [], [], []
    begin = time.monotonic()
    for case in cases:
      if measured and args.seconds and time.monotonic() - begin > args.seconds:
        unseen.append(case.name)
        continue
      own = [variant for variant in chosen[case] if host(variant) in devices]
      results = Measurement(devices, case, own, memory_gib).run(args.rounds)
      measured.append({"case": dataclasses.asdict(case), "name": case.name, "variants": results})
      found = summary(case, results, peak)
      show(found)
      cells += found
      checked = marks(cells)
      path = coordinator.save(
        head | {"summary": cells, "marks": checked, "cases": measured}, args, slug
      )
  finally:
    for each in devices.values():
      each.close()
  picture = path.with_suffix(".png") if args.output else PICTURE
  draw(cells, picture, f"Attention on {device}: {TOKENS:,} tokens of {WIDTH:,}, bfloat16")
  rates = ", ".join(f"{name} {value:.0f}" for name, value in products.items())
  print(f"{device}; TFLOP a second of bfloat16 matrix products: {rates}")
  if unseen:
    print(f"not begun within {args.seconds:g} s: {', '.join(unseen)}")
  for name, reason in missing.items():
    print(f"not loaded: {name}: {reason}")
  if MARKED_DEVICE not in device:
    print(f"the marks are of an {MARKED_DEVICE}, and this is not one")
  for entry in checked:
    print(coordinator.mark_in_words(entry))
  print(f"written to {path} and {picture}")
  return path
