"""The plans of the configs at scale, on 256 chips of v5e: `python -m benchmarks.plans`.

No TPU is needed (`pip install -e '.[plan]'`): each config's real train step is compiled ahead of
time, in a process of its own, some minutes each. What comes out lies in `results/plans-*.json`;
`--table` prints the table of docs/plans.md from it.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import coordinator
from magneto_jax.reporting import in_units

TOPOLOGY = "v5e:16x16"
# Config, and what is changed of it.
CASES: dict[str, tuple[str, ...]] = {
  "gpt_1b3": ("gpt.py:gpt_1b3",),
  "gpt_1b3, fsdp 256": ("gpt.py:gpt_1b3", "mesh.fsdp=256", "mesh.tensor=1"),
  "gpt_6b7": ("gpt.py:gpt_6b7",),
  "deepnet_500_500": ("translation.py:deepnet_500_500",),
  "deepnet_100_100": ("translation.py:deepnet_100_100",),
  "BEiT-3 base": ("beit3.py:base",),
  "BEiT-3 giant": ("beit3.py:giant",),
}


def plan(config: str, *changes: str) -> dict:
  """What `magneto_jax.plan` says, as JSON."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "plan.json"
    command = [sys.executable, "-m", "magneto_jax.plan", f"--config=configs/{config}"]
    command += [f"--topology={TOPOLOGY}", f"--json={path}"]
    command += [f"--config.{change}" for change in changes]
    done = subprocess.run(command, capture_output=True, text=True)
    if not path.exists():
      raise RuntimeError(done.stderr[-2000:])
    return json.loads(path.read_text())


def table(plans: dict[str, dict]) -> str:
  """Markdown, a row a plan."""
  columns = "config|parameters|mesh|a step|of a chip|compute|memory|network|bound|MFU at most"
  lines = [f"| {columns.replace('|', ' | ')} |", "|---" * 10 + "|"]
  for name, found in plans.items():
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    seconds = found["roofline"]["seconds"]
    network = {axis: s for axis, s in seconds.items() if axis.startswith("network")}
    axis = max(network, key=network.get)
    config = found["config"]
    rows = f"{config['batch_size']:,} x {config['data']['seq_length']:,}"
    milliseconds = lambda value: f"{1e3 * value:,.0f} ms"
    cells = (
      name,
      in_units(found["parameters"], ""),
      mesh,
      f"{rows}, remat {config['model']['remat']}",
      f"{found['peak_bytes_per_chip'] / 2**30:.2f} GiB",
      milliseconds(seconds["compute"]),
      milliseconds(seconds["memory"]),
      f"{milliseconds(network[axis])} ({axis.removeprefix('network: ')})",
      found["roofline"]["bound"].removeprefix("network: "),
      f"{found['roofline']['utilisation'][0]:.0%}",
    )
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def newest() -> dict[str, dict]:
  """Of every case the plan that was made last, whichever day's results hold it."""
  kept = {}
  for path in sorted(coordinator.RESULTS.glob("plans-*.json")):
    kept |= json.loads(path.read_text())["plans"]
  return {name: kept[name] for name in CASES if name in kept}


def main() -> None:
  """Plans all cases, or those that are named, and keeps what comes out beside the others."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--cases", default=";".join(CASES), help="names, separated by semicolons")
  parser.add_argument("--table", action="store_true", help="print the table, plan nothing")
  arguments = parser.parse_args()
  if arguments.table:
    print(table(newest()))
    return
  path = coordinator.RESULTS / f"plans-v5e-256-{datetime.date.today()}.json"
  kept = json.loads(path.read_text())["plans"] if path.exists() else {}
  for name in arguments.cases.split(";"):
    kept[name] = plan(*CASES[name])
    print(table({name: kept[name]}).splitlines()[-1], flush=True)
    plans = {name: kept[name] for name in CASES if name in kept}
    results = coordinator.provenance("plans") | {"topology": TOPOLOGY, "plans": plans}
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  main()
