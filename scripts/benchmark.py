"""Measures training steps and the activation cache against what bounds them.

    python scripts/benchmark.py
    python scripts/benchmark.py --case 512,8192,32,2048 --only steps kinds --json steps.json
    python scripts/benchmark.py --device cuda
    python scripts/benchmark.py --only nmf --nmf-rows 100_000 --nmf-worlds 3
    python scripts/benchmark.py --only fits
    python scripts/benchmark.py --only harvest --model FOLDER --hookpoint resid.8 --device cuda

Steps: ours, with kernels and without, a dense one by autograd, the same under torch.compile, the encoder
alone as ours has it, the floor, which is its product by `torch.mm` (on a GPU with the traffic of Adam and one
reading of the pre-activations added), and public trainers where they are installed. Every ratio is of two
things timed in turn in this process, with the median and range of several rounds: absolute times say little
on a shared machine. Reading is measured warm, that is from the page cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sae.activations import Source
from sae.benchmarks.baselines import baseline_figures
from sae.benchmarks.cache import harvest_figures, read_figures, training_figures
from sae.benchmarks.cases import CPU_CASES, GPU_CASES, parse
from sae.benchmarks.fits import fit_figures
from sae.benchmarks.measure import growth, of_case, of_kinds
from sae.benchmarks.nmf import nmf_figures
from sae.benchmarks.steps import missing_compiler
from sae.benchmarks.table import print_figures, print_steps
from sae.errors import InputError
from sae.exits import exit_on_input_error
from sae.ops.heap import keep_freed_memory

PARTS = ("steps", "kinds", "growth", "baselines", "training", "harvest", "read")
LONG = ("nmf", "fits")  # many minutes, nearly all of them scikit-learn's


def main() -> None:
    """Runs what is asked for, prints tables, writes JSON."""
    arguments = _parser().parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("`--device` is cuda, and torch sees no GPU here; leave it out for the CPU's cases.")
    compiled = "steps" in arguments.only and not arguments.no_compile
    if compiled and (missing := missing_compiler()):
        raise InputError(f"torch.compile needs {missing}, and there is none; install it, or `--no-compile`.")
    found: dict[str, Any] = {"torch": torch.__version__, "device": _device(arguments.device)}
    cases = [parse(text, arguments.dtype, arguments.device) for text in arguments.case] or list(
        GPU_CASES if arguments.device.startswith("cuda") else CPU_CASES
    )
    print(f"torch {found['torch']}, {found['device']}")
    keep_freed_memory()  # as training does; all contenders have it
    if "steps" in arguments.only:
        found["steps"] = []
        for case in cases:
            found["steps"].append(of_case(case, arguments.rounds, compiled))
            print_steps(found["steps"][-1])
    if "kinds" in arguments.only:
        found["kinds"] = of_kinds(cases[0], arguments.rounds)
        print_figures(f"kinds {cases[0]}, time over TopK's", found["kinds"])
    if "growth" in arguments.only:
        found["growth"] = growth(cases[0], arguments.rounds)
        print_figures(f"growth {cases[0]}, log time over log size", found["growth"])
    if "baselines" in arguments.only:
        found["baselines"] = baseline_figures(cases[0], arguments.rounds)
        print_figures("baselines", found["baselines"])
    if "nmf" in arguments.only:
        found["nmf"] = nmf_figures(arguments.nmf_rows, arguments.nmf_worlds)
        print_figures("whole fits of NMF", found["nmf"])
    if "fits" in arguments.only:
        found["fits"] = fit_figures(arguments.fit_rows)
        print_figures("whole fits of baselines", found["fits"])
    with tempfile.TemporaryDirectory(prefix="sae-benchmark-") as folder:
        found["cache"] = _cache(arguments, cases, Path(folder))
    print_figures("cache", found["cache"])
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")


def _cache(arguments: argparse.Namespace, cases: list[Any], folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "training" in arguments.only:
        found |= training_figures(cases[0], folder)
    if "harvest" in arguments.only:
        source = Source(
            model=arguments.model,
            dataset=arguments.dataset,
            hookpoints=arguments.hookpoint,
            n_tokens=arguments.tokens,
            context_length=arguments.context_length,
        )
        found |= harvest_figures(source, arguments.device, folder)
    if "read" in arguments.only:
        found |= read_figures(arguments.d_model, arguments.bytes, folder)
    return found


def _device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS + LONG, default=PARTS, help="what to measure")
    parser.add_argument(
        "--case", nargs="+", default=[], help="d_model,n_latents,k,rows; default: the table's"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of a --case")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each contender has")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--model", default="demo", help="`demo`, a folder, or a Hugging Face id")
    parser.add_argument("--dataset", default="demo", help="text, as data.source.dataset")
    parser.add_argument("--hookpoint", nargs="+", default=["resid.2"])
    parser.add_argument("--tokens", type=int, default=100_000, help="to harvest")
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=768, help="width of the rows that are read")
    parser.add_argument("--bytes", type=int, default=600_000_000, help="of the rows that are read")
    parser.add_argument("--nmf-rows", type=int, default=100_000, help="of 256, for fits of 128 components")
    parser.add_argument("--nmf-worlds", type=int, default=1, help="planted draws that NMF is fitted to")
    parser.add_argument("--fit-rows", type=int, default=10_000, help="that each baseline is fitted to")
    parser.add_argument("--device", default="cpu", help="of steps and of the language model")
    parser.add_argument("--json", help="also write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(exit_on_input_error(main))
