"""What the TPU's compiler makes of the attention kernels: `python -m benchmarks.tpu_static_cost`.

No TPU is needed: libtpu compiles ahead of time (`pip install -e '.[tpu]'`), and writes the
instruction words ("bundles", one a cycle at best) that it has scheduled.
"""

import argparse
import dataclasses
import functools
import glob
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import coordinator
from magneto_jax import kernels

BOUND = (
  "These are bounds that the compiler gives, not times, and no gate: waiting for memory is not in "
  "them. They rank block sizes, and show what spills."
)
B, T, N = 2, 4096, 4
CAUSAL, SEGMENTS, RELATIVE, DENSE = "causal", "segments", "relative", "dense"
HASH, HARDWARE = "dropout_hash", "dropout_hardware"
BLOCKS = "512x512,128x128,256x256,256x512,512x256,512x1024,1024x512,1024x1024"
FEATURES = {
  "base": (),
  **{name: (name,) for name in (CAUSAL, SEGMENTS, RELATIVE, DENSE, HASH, HARDWARE)},
  "all": (CAUSAL, SEGMENTS, RELATIVE, HARDWARE),
}


@dataclasses.dataclass(frozen=True)
class Variant:
  """One library's kernels at one size of blocks.

  Attributes:
    library: of LIBRARIES.
    block_q, block_kv: of both passes.
  """

  library: str
  head_dim: int
  feature: str
  block_q: int
  block_kv: int


# ---------------------------------------------------------------------------------------------
# What is compiled: functions of q, k, v [B, T, N, H] (ours) or [B, N, T, H] (theirs) and the rest
# ---------------------------------------------------------------------------------------------


def ours(variant: Variant, array) -> tuple[Callable, list, dict]:
  """(function, what it is differentiated in, what else it is given)."""
  has = FEATURES[variant.feature]
  q = array((B, T, N, variant.head_dim), jnp.bfloat16)
  primals, rest = [q, q, q], {}
  if RELATIVE in has:
    primals.append(kernels.RelativeBias(array((32, N), jnp.float32)))
  if DENSE in has:
    rest["bias"] = array((1, N, T, T), jnp.bfloat16)
  if SEGMENTS in has:
    rest |= dict.fromkeys(("q_segment_ids", "kv_segment_ids"), array((B, T), jnp.int32))
  if {HASH, HARDWARE} & set(has):
    rest["dropout_key"] = array((), jax.random.key(0).dtype)
  sides = (variant.block_q, variant.block_kv) * 2
  options = {
    "implementation": kernels.PallasTpu(*sides, random="hardware" if HARDWARE in has else "hash"),
    "is_causal": CAUSAL in has,
    "dropout_rate": 0.1 if "dropout_key" in rest else 0.0,
  }
  attend = functools.partial(kernels.dot_product_attention, **options)
  return attend, primals, rest


def splash(variant: Variant, array) -> tuple[Callable, list, dict]:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  has = FEATURES[variant.feature]
  q, kv = variant.block_q, variant.block_kv
  sizes = kernel.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_kv_compute=min(kv, 512),
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_kv_dkv_compute=min(kv, 512),
    use_fused_bwd_kernel=True,
  )
  mask = (masks.CausalMask if CAUSAL in has else masks.FullMask)((T, T))
  attend = kernel.make_splash_mha(
    masks.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=1, block_sizes=sizes
  )
  ids = [kernel.SegmentIds(*[array((B, T), jnp.int32)] * 2)] if SEGMENTS in has else []
  x = array((B, N, T, variant.head_dim), jnp.bfloat16)
  return lambda *xs, ids: jax.vmap(attend)(*xs, *ids), [x, x, x], {"ids": ids}


def flash(variant: Variant, array) -> tuple[Callable, list, dict]:
  from jax.experimental.pallas.ops.tpu import flash_attention as kernel

  has = FEATURES[variant.feature]
  q, kv = variant.block_q, variant.block_kv
  sides = dict.fromkeys(("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq"), q)
  sides |= dict.fromkeys(
    ("block_k_major", "block_k", "block_k_major_dkv", "block_k_dkv", "block_k_major_dq"), kv
  )
  sizes = kernel.BlockSizes(**sides, block_k_dq=kv, block_b=1)
  rest = {}
  if SEGMENTS in has:
    rest["segment_ids"] = kernel.SegmentIds(*[array((B, T), jnp.int32)] * 2)
  x = array((B, N, T, variant.head_dim), jnp.bfloat16)
  options = {"causal": CAUSAL in has, "block_sizes": sizes}
  return lambda *xs, **rest: kernel.flash_attention(*xs, **rest, **options), [x, x, x], rest


# Each with its features, and how many heads a step of its kernels computes.
LIBRARIES = {
  "magneto_jax": (ours, set(FEATURES), lambda head_dim: max(1, 128 // head_dim)),
  "splash": (splash, {"base", CAUSAL, SEGMENTS}, lambda head_dim: 1),
  "flash": (flash, {"base", CAUSAL, SEGMENTS}, lambda head_dim: 1),
}


# ---------------------------------------------------------------------------------------------
# What the compiler has written
# ---------------------------------------------------------------------------------------------


def kernels_in(folder: str, kinds: int) -> Iterator[dict]:
  """The figures of every kernel that was dumped into `folder`.

  A block runs one body of a kernel that has one for each of several kinds of blocks: those are the
  runs without a branch that use the matrix unit most.
  """
  for path in sorted(glob.glob(f"{folder}/*-final_bundles.txt")):
    number, name, _ = pathlib.Path(path).name.split("-", 2)
    table = glob.glob(f"{folder}/{number}-{glob.escape(name)}-*-final_hlo-static-per-bundle-util*")
    if len(table) != 1 or not re.search("attention|splash|flash", name):
      continue
    columns, rows = utilization(pathlib.Path(table[0]).read_text())
    runs = straight_runs(pathlib.Path(path).read_text(), len(rows))
    products = {(start, stop): sum(row[0] for row in rows[start:stop]) for start, stop in runs}
    chosen = sorted(sorted(products, key=products.get, reverse=True)[:kinds])
    yield {
      "kernel": re.sub(r"^(jit_|jvp_|transpose_jvp_)+|(_block_.*)?[._\d]*$", "", name),
      "bundles": len(rows),
      "spills": sum(row[columns.index("VSTORE:SPILL")] for row in rows),
      "bodies": [body(columns, rows[start:stop]) for start, stop in chosen],
    }


def utilization(text: str) -> tuple[list[str], list[list[int]]]:
  """(slots, [how many of each one are used] a bundle)."""
  _, names, _, _, *lines = text.splitlines()
  return [name.strip() for name in names.split(",")], [
    [int(x) for x in line.split()] for line in lines if line.strip()
  ]


def straight_runs(text: str, count: int) -> list[tuple[int, int]]:
  """[start, stop) between branches: what is computed for a block of scores is one run."""
  branches = []
  for line in text.splitlines():
    found = re.match(r"\s*(0x[0-9a-f]+|\d+)\s+(?:[A-Z]+)?:", line)
    # A body begins where a branch around it ends, and ends where the next one is.
    if found and "sbr." in line:
      branches.append(int(found[1], 16))
  edges = [0, *branches, count]
  return list(zip(edges[:-1], edges[1:], strict=True))


def body(columns, rows) -> dict:
  """Length, span of the matrix unit, spills, and the slots used in a run."""
  used = [n for n, row in enumerate(rows) if row[0]]
  return {
    "bundles": len(rows),
    "mxu_span": used[-1] - used[0] + 1 if used else 0,
    "spills": sum(row[columns.index("VSTORE:SPILL")] for row in rows),
    "slots": {name: sum(row[i] for row in rows) for i, name in enumerate(columns)},
  }


def kinds_of(variant: Variant) -> list[str]:
  """The kinds of blocks that our kernels have a body for, in the order of the code; others, one."""
  has = set(FEATURES[variant.feature])
  if variant.library != "magneto_jax":
    return ["all"]
  return [
    f"{seen}{side}"
    for seen in (("full", "partial") if {CAUSAL, SEGMENTS} & has else ("full",))
    for side in (("near", "far") if RELATIVE in has else ("",))
    for side in [f" {side}".rstrip()]
  ]


def measure(variant: Variant, device, folder: str) -> list[dict]:
  """The kernels of a variant, or why there are none."""
  make, _, heads = LIBRARIES[variant.library]
  sharding = jax.sharding.SingleDeviceSharding(device)
  array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  for path in glob.glob(f"{folder}/*"):
    os.remove(path)
  try:
    function, primals, rest = make(variant, array)

    def passes(primals, rest):
      out, vjp = jax.vjp(lambda *xs: function(*xs, **rest), *primals)
      return out, vjp(out)

    jax.jit(passes).lower(primals, rest).compile()
  except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
    return [dataclasses.asdict(variant) | {"refused": str(error).splitlines()[0][:200]}]
  pairs = variant.block_q * variant.block_kv * heads(variant.head_dim)
  kinds, found = kinds_of(variant), []
  for figures in kernels_in(folder, len(kinds)):
    for one in figures["bodies"]:
      one["milli_bundles_per_pair"] = 1000 * one["bundles"] / pairs
    found.append(dataclasses.asdict(variant) | {"blocks": kinds} | figures)
  return found


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def sides(text: str) -> list[tuple[int, int]]:
  return [tuple(int(side) for side in pair.split("x")) for pair in text.split(",")]


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v5e:2x2", help="v5:2x2x1, v6e:2x2, tpu7x:2x2x1, ...")
  parser.add_argument("--head-dim", default="64,128", help="separated by commas")
  parser.add_argument("--libraries", default=",".join(LIBRARIES))
  parser.add_argument("--features", default=",".join(FEATURES), help="at the first size of blocks")
  parser.add_argument("--blocks", default=BLOCKS, help="QUERIESxKEYS, the first for all features")
  parser.add_argument("--output", type=pathlib.Path, help="a JSON file; default: in results/")
  args = parser.parse_args()
  for name, table in (("libraries", LIBRARIES), ("features", FEATURES)):
    for value in getattr(args, name).split(","):
      if value not in table:
        parser.error(f"--{name}: {value!r} is not one of {', '.join(table)}")
  try:
    args.head_dim, args.blocks = [int(x) for x in args.head_dim.split(",")], sides(args.blocks)
  except ValueError as error:
    parser.error(f"--head-dim takes 64,128 and --blocks 512x512,256x512: {error}")
  return args


def variants(args) -> Iterator[Variant]:
  """All features at the first size of blocks, and the others without any."""
  for head_dim in args.head_dim:
    for n, block in enumerate(args.blocks):
      for library in args.libraries.split(","):
        for feature in args.features.split(",") if n == 0 else ["base"]:
          if feature in LIBRARIES[library][1]:
            yield Variant(library, head_dim, feature, *block)


def is_backward(kernel: str) -> bool:
  return re.search("backward|bwd|dkv|dq", kernel) is not None


def show(found: list[dict]) -> None:
  """A line a body; ranked by cost within a pass, head dim and feature."""
  ranked = sorted(
    (is_backward(x["kernel"]), x["head_dim"], list(FEATURES).index(x["feature"]), cost, n, x)
    for x in found
    for n, cost in enumerate(one["milli_bundles_per_pair"] for one in x.get("bodies", []))
  )
  rows = []
  for _, head_dim, _, cost, n, x in ranked:
    one, kernel = x["bodies"][n], x["kernel"]
    if x["library"] not in kernel:
      kernel = f"{x['library']} {kernel}"
    kernel += f", {x['blocks'][n]}" if len(x["bodies"]) > 1 else ""
    block = f"{x['block_q']}x{x['block_kv']}"
    figures = (one["bundles"], one["mxu_span"], one["spills"], x["bundles"])
    rows.append((kernel, str(head_dim), x["feature"], block, f"{cost:.2f}", *map(str, figures)))
  notes = [
    f"not served: {x['library']} H={x['head_dim']} {x['feature']} "
    f"{x['block_q']}x{x['block_kv']}: {x['refused']}"
    for x in found
    if "refused" in x
  ]
  columns = (
    "kernel, its blocks",
    "H",
    "feature",
    "block",
    "a pair",
    "body",
    "MXU",
    "spills",
    "all",
  )
  explained = (
    "a pair: thousandths of a bundle for a query, a key and a head; body: bundles that a block of "
    "scores takes, of them MXU the span of the matrix unit; all: of the whole kernel, with the "
    "bodies of other kinds of blocks, and what is done once."
  )
  coordinator.show(columns, rows, [*notes, explained, BOUND])


def main() -> None:
  args = arguments()
  if importlib.util.find_spec("libtpu") is None:
    sys.exit("no TPU compiler: pip install -e '.[tpu]'")
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory() as folder:
    variables = {
      "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
      "TPU_SKIP_MDS_QUERY": "1",
      "TPU_ACCELERATOR_TYPE": "v5litepod-4",
      "TPU_WORKER_HOSTNAMES": "localhost",
      "TPU_WORKER_ID": "0",
    }
    os.environ |= variables
    device = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices[0]
    found = []
    for variant in variants(args):
      print(variant, file=sys.stderr, flush=True)
      found += measure(variant, device, folder)
  show(found)
  results = coordinator.provenance("tpu_static_cost") | {
    "topology": args.topology,
    "device_kind": device.device_kind,
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    "shape": {"B": B, "T": T, "N": N, "dtype": "bfloat16"},
    "meaning": BOUND,
    "kernels": found,
  }
  name = f"tpu_static_cost-{args.topology.replace(':', '-')}-{results['date'][:10]}.json"
  path = args.output or coordinator.RESULTS / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(results, indent=1) + "\n")
  print(f"wrote {path}")


if __name__ == "__main__":
  main()
