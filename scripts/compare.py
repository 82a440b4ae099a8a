"""Trains one configuration with several seeds, and tables every dictionary and every baseline in it.

    python scripts/compare.py --config comparison.yaml --seeds 3
    python scripts/compare.py --config comparison.yaml --seeds 3 --data.source.model FOLDER \\
        --data.source.dataset 'texts/*.txt' --trainer.default_root_dir runs/comparison-mine
    python scripts/compare.py --runs runs/comparison/seed-0 runs/comparison/seed-1

Trained dictionaries have a second row, without their encoder: their directions coded by the search that codes
the baselines' (FVU and bits alone).

Whatever follows goes to train.py, which trains the seeds one after the other, each in a folder of its own
below `trainer.default_root_dir`. What is finished is not done again, what was interrupted goes on: give
the same command. Writes comparison.md, comparison.json and frontier-*.svg there, or beside the --runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from sae.cli import find_config
from sae.dictionaries import MatchingPursuit
from sae.errors import InputError
from sae.exits import exit_on_input_error
from sae.files import write_atomically, write_json
from sae.inspection.comparison_figures import frontier
from sae.inspection.figures import to_page
from sae.runs import Run, finished_metrics, open_run
from sae.studies.comparison import Row, compare, frontier_points, in_order, searched, table
from sae.training.names import SINGLE, metrics_of_each

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
ROOT = "--trainer.default_root_dir"


def main(args: list[str] | None = None) -> None:
    """Trains what is missing, and writes the table."""
    given, passed = _parser().parse_known_args(args)
    if given.seeds < 1:
        raise InputError(f"`--seeds` must be at least 1, got {given.seeds}.")
    if given.runs:
        if passed:
            raise InputError(f"`--runs` trains nothing, so {passed[0]} has no meaning; leave it out.")
        runs, out = given.runs, given.runs[0].parent
    else:
        out = _root(passed, given.config)
        runs = [_trained(given.config, passed, seed, out / f"seed-{seed}") for seed in range(given.seeds)]
    metrics = {run: finished_metrics(run) for run in runs}
    rows = in_order([*compare(metrics), *_searched(metrics)])
    text = f"{len(runs)} seed{'s'[: len(runs) > 1]}, held-out rows; trained ones in bold\n\n{table(rows)}\n"
    write_atomically(out / "comparison.md", text.encode())
    write_json(out / "comparison.json", [row._asdict() for row in rows])
    for x, label in (("l0", "coefficients per row (L0)"), ("bits_per_token", "bits per token")):
        write_atomically(out / f"frontier-{x}.svg", to_page(frontier(frontier_points(rows, x), label)))
    print(f"\n{text}\n{out} holds comparison.md, comparison.json and frontiers over L0 and bits (.svg).")


def _searched(metrics: dict[Path, dict[str, Any]]) -> Iterator[Row]:
    """Every trained dictionary that has an encoder, without it."""
    folders = list(metrics)
    for name, of in metrics_of_each(metrics[folders[0]]).items():
        asked = None if name == SINGLE else name
        try:
            opened = [open_run(folder, dictionary=asked) for folder in folders]
        except InputError as error:  # no reason to lose the rest
            print(f"No dictionary was coded by a search: {error}", file=sys.stderr)
            return
        first = opened[0]
        if isinstance(first.dictionary, MatchingPursuit):
            continue
        title, mean = "SAE" if name == SINGLE else name, first.cache.moments(first.hookpoint).mean
        dictionaries = [run.dictionary for run in opened]
        yield searched(title, dictionaries, max(1, round(of["l0"])), partial(_held_out, first), mean)


def _held_out(run: Run) -> Iterator[Tensor]:
    return (batch.x for batch in run.cache.batches("held_out", run.hookpoint, 1024))


def _root(passed: list[str], config: str) -> Path:
    """The folder that train.py would write to."""
    for i, argument in enumerate(passed):
        if argument == ROOT and i + 1 < len(passed):
            return Path(passed[i + 1])
        if argument.startswith(f"{ROOT}="):
            return Path(argument.partition("=")[2])
    named = yaml.safe_load(find_config(config).read_text()).get("trainer", {}).get("default_root_dir")
    if named is None:
        raise InputError(f"`trainer.default_root_dir` is in neither {config} nor the command; give {ROOT}.")
    return Path(named)


def _trained(config: str, passed: list[str], seed: int, folder: Path) -> Path:
    command = [sys.executable, str(TRAIN), "--config", config, *passed]
    command += [f"--seed_everything={seed}", f"{ROOT}={folder}", "--report=false"]
    print(f"seed {seed}: {folder}", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise SystemExit(status)  # train.py has said why
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="comparison.yaml", help="As train.py takes it.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, nargs="+", help="Finished runs to table instead.")
    return parser


if __name__ == "__main__":
    exit_on_input_error(main)
