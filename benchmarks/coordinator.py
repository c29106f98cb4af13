"""Runs variants in turns, each in a process of its own, and keeps what they measured."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

import rich.box
import rich.console
import rich.table

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_CODE = (".", ":(exclude)benchmarks/results")
# With which the README gives its commands; of Linux, and of speed alone.
README_VARIABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def environment(threads: int, *, huge_pages: bool = True, platform: str = "cpu") -> dict[str, str]:
  """What every process is given, whichever library it measures.

  Huge pages for malloc: XLA:CPU allocates its temporaries afresh each step and spends a fifth of
  its time on page faults without; torch gains too. A passive wait: OpenMP's threads otherwise
  spin, and take the processor from whatever else runs.
  """
  variables = {
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": platform,
    "MKL_NUM_THREADS": str(threads),
    "NPROC": str(threads),
    "OMP_NUM_THREADS": str(threads),
    "OMP_WAIT_POLICY": "passive",
    "OPENBLAS_NUM_THREADS": str(threads),
  }
  if huge_pages:
    variables["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
  return variables


class Process:
  """A worker; `ask` sends a request and waits for the answer.

  Args:
    variables: added to the environment.
    folder: the checkout whose code runs; this one by default.
    patience_s: seconds after which a request is taken to hang, and the worker ended; None: never.
  """

  def __init__(
    self,
    variables: Mapping[str, str],
    folder: pathlib.Path = ROOT,
    patience_s: float | None = None,
  ):
    self._patience_s = patience_s
    self._process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.worker"],
      cwd=folder,
      env=os.environ | dict(variables),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, **request) -> dict:
    """Raises RuntimeError if the worker fails, has died, or is ended for its slowness."""
    timer = threading.Timer(self._patience_s or threading.TIMEOUT_MAX, self.kill)
    timer.daemon = True
    timer.start()
    try:
      print(json.dumps(request), file=self._process.stdin, flush=True)
      line = self._process.stdout.readline()
    except BrokenPipeError:
      line = ""
    finally:
      timer.cancel()
    answer = json.loads(line) if line else {"error": f"exit status {self._process.wait()}"}
    if "error" in answer:
      raise RuntimeError(f"{request}: {answer['error']}")
    return answer

  def kill(self) -> None:
    """Ends the worker, whatever it does; a request that waits for it fails."""
    self._process.kill()

  def close(self) -> None:
    with contextlib.suppress(BrokenPipeError):  # It may have died with a request unread.
      self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


@contextlib.contextmanager
def loaded(variants: Sequence[str], shape, threads: int, variables) -> Iterator[tuple]:
  """Yields ({variant: its process}, {variant: what loading it answered}).

  A variant `NAME@FOLDER` is NAME as another checkout of this repository has it.
  """
  with contextlib.ExitStack() as stack:
    processes, answers = {}, {}
    for variant in variants:
      name, _, folder = variant.partition("@")
      processes[variant] = Process(variables, pathlib.Path(folder) if folder else ROOT)
      stack.callback(processes[variant].close)
      answers[variant] = processes[variant].ask(
        do="load", variant=name, shape=dataclasses.asdict(shape), threads=threads
      )
    yield processes, answers


def turn(process: Process, call: str, count: int, **options) -> dict:
  """An untimed call, then `count` timed ones: after idling, the first one faults pages anew."""
  process.ask(do="turn", call=call, count=1, options=options)
  return process.ask(do="turn", call=call, count=count, options=options)


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def medians(rounds: Sequence[dict], call: str) -> dict[str, float]:
  """Median of each measure over all timed calls of all rounds, and the best wall time."""
  pooled = {
    measure: [value for turns in rounds for value in turns[call][measure]]
    for measure in ("wall_ms", "cpu_ms", "page_faults")
  }
  figures = {measure: statistics.median(values) for measure, values in pooled.items()}
  return figures | {"best_wall_ms": min(pooled["wall_ms"])}


def ratios(rounds: Sequence[dict], baseline: Sequence[dict], call: str, measure: str) -> dict:
  """Medians of a turn over the baseline's of the same round: all of them, median, spread."""
  per_round = [
    statistics.median(ours[call][measure]) / statistics.median(theirs[call][measure])
    for ours, theirs in zip(rounds, baseline, strict=True)
  ]
  return {
    "rounds": per_round,
    "median": statistics.median(per_round),
    "min": min(per_round),
    "max": max(per_round),
  }


def in_words(ratio: dict | None) -> str:
  """`1.08 (1.05-1.12)`."""
  if ratio is None:
    return "-"
  return f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"


# ---------------------------------------------------------------------------------------------
# The record and the command line
# ---------------------------------------------------------------------------------------------


def parser(doc: str, *, variants: Sequence[str], shape: str | None, rounds: int):
  """The arguments that all benchmarks share; without `--shape` if `shape` is None."""
  result = argparse.ArgumentParser(description=doc.splitlines()[0])
  result.add_argument("--variants", default=",".join(variants), help="separated by commas")
  if shape is not None:
    result.add_argument("--shape", default=shape, help="of benchmarks/shapes.py")
  result.add_argument("--rounds", type=int, default=rounds)
  result.add_argument("--threads", type=int, default=2)
  result.add_argument("--no-huge-pages", dest="huge_pages", action="store_false")
  result.add_argument("--output", type=pathlib.Path, help="a JSON file; default: in results/")
  return result


def refuse(parser, args: argparse.Namespace, names: Sequence[str], why: str) -> None:
  """Ends with one line if options are given that mean nothing here."""
  given = [name for name in names if getattr(args, name) != parser.get_default(name)]
  if given:
    options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    parser.error(f"{options} cannot be given here: {why}")


def command(module: str, arguments: Sequence[str]) -> None:
  """Runs a command of the package, as the README gives it.

  Raises:
    SystemExit: if it fails; its own words are on the terminal.
  """
  words = [sys.executable, "-m", module, *arguments]
  if code := subprocess.run(words, env=os.environ | README_VARIABLES, cwd=ROOT).returncode:
    raise SystemExit(f"the command ended with {code}: {' '.join(words[1:])}")


def provenance(benchmark: str, variables: Mapping[str, str] | None = None) -> dict:
  """Where, when and how; `variables` are those added to the environment."""
  inherited = ("XLA_FLAGS", "LD_PRELOAD", "JAX_", "OMP_", "KMP_", "MKL_", "MALLOC_", "GLIBC_")
  inherited = {name: value for name, value in os.environ.items() if name.startswith(inherited)}
  return {
    "benchmark": benchmark,
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": shlex.join(
      ["python", "-m", f"benchmarks.{benchmark}", *map(_without_folders, sys.argv[1:])]
    ),
    "git_commit": _git("rev-parse", "HEAD"),
    # But for the results, which the run before may have written and nothing reads.
    "git_clean": _git("status", "--porcelain", "--untracked-files=no", "--", *_CODE) == "",
    "machine": _machine(),
    "load_average_at_start": os.getloadavg()[0],
    "environment": inherited | dict(variables or {}),
  }


def _without_folders(argument: str) -> str:
  """An argument; of an absolute path the name alone, as its folders are of no other machine."""
  flag, equals, value = argument.rpartition("=")
  return f"{flag}{equals}{os.path.basename(value) if os.path.isabs(value) else value}"


def record(benchmark: str, args: argparse.Namespace, shape, variables) -> dict:
  """The head of a results file of variants that took turns."""
  return provenance(benchmark, variables) | {
    "threads": args.threads,
    "shape": {"name": args.shape} | dataclasses.asdict(shape),
    "gflop_per_step": shape.step_flops / 1e9,
  }


def _git(*arguments: str) -> str | None:
  """What git prints; None where there is no git or no commit."""
  result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
  return result.stdout.strip() if result.returncode == 0 else None


def _machine() -> dict[str, str | int]:
  with open("/proc/cpuinfo") as file:
    names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
  return {
    "processor": names[0] if names else platform.machine(),
    "cores": len(os.sched_getaffinity(0)),
    "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    "system": f"{platform.system()} {platform.release()}",
    "libc": " ".join(platform.libc_ver()),
    "python": platform.python_version(),
  }


def save(results: dict, args: argparse.Namespace, name: str | None = None) -> pathlib.Path:
  """Writes the results file, named by the shape or by `name`; returns its path."""
  day = results["date"][:10]
  default = RESULTS / f"{results['benchmark']}-{name or args.shape}-{day}.json"
  path = args.output or default
  path.parent.mkdir(parents=True, exist_ok=True)
  # Some benchmarks write after every case: what is there is always whole.
  scratch = path.with_suffix(".tmp")
  scratch.write_text(json.dumps(results, indent=1) + "\n")
  scratch.replace(path)
  return path


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
  """Prints a table; the first column is text, the others are numbers."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  for i, column in enumerate(columns):
    table.add_column(column, justify="right" if i else "left", no_wrap=True)
  for row in rows:
    table.add_row(*row)
  # A pipe or a file has no width of its own.
  console = rich.console.Console(width=None if sys.stdout.isatty() else 140, highlight=False)
  console.print(table)
  for note in notes:
    console.print(note, markup=False, soft_wrap=True)


def mark(name: str, value: float, bound: float, *, at_most: bool = True) -> dict:
  """A mark and whether it is met."""
  met = value <= bound if at_most else value >= bound
  return {"name": name, "value": value, "bound": bound, "at_most": at_most, "met": met}


def mark_in_words(entry: dict, digits: int = 2) -> str:
  sign = "<=" if entry["at_most"] else ">="
  verdict = "met" if entry["met"] else "MISSED"
  return f"mark {verdict}: {entry['name']} {entry['value']:.{digits}f} {sign} {entry['bound']:g}"
