"""Interrupts a run at random moments, again and again, and checks that it ends as if nothing had happened.

    python scripts/resume_drill.py
    python scripts/resume_drill.py --interruptions 12 --runs 3 --ranks 2 --seed 1

One run goes through. Then the same run is started and killed (SIGKILL), asked to stop (SIGTERM, SIGUSR1,
Ctrl-C) or has its last checkpoint torn, each time at a random moment, until it has had its share of
interruptions; then it is left to end. Weights, Adam's moments, counters and metrics must be equal bit for
bit, and every curve must have each step once. Takes about half a minute for each run and a quarter for each
interruption, nearly all of it imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from sae.activations.exchange.imported import import_rows
from sae.activations.synthetic import PlantedWorld

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LONGEST_S = 8.0
"""Seconds after the start of training in which a run's interruptions come."""
OF_THE_CLOCK = ("tokens_per_s", "data_wait", "memory_bytes", "mfu", "figures")


def main() -> None:
    """Runs the drill; exit status 1 if any end differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interruptions", type=int, default=20, help="In all.")
    parser.add_argument(
        "--runs", type=int, help="Runs that share them; as many as interruptions if left out."
    )
    parser.add_argument("--ranks", type=int, default=1, help="Processes of each run.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments and the signals.")
    arguments = parser.parse_args()
    runs = arguments.runs or arguments.interruptions
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="resume-drill-") as scratch:
        folder = Path(scratch)
        import_rows(PlantedWorld(96, 32, active=3, max_cosine=0.6).sample(20_000).x, folder / "cache")
        command = _command(folder, arguments.ranks)
        begin = time.monotonic()
        _run([*command, f"--trainer.default_root_dir={folder / 'unbroken'}"], None)
        print(f"unbroken: {time.monotonic() - begin:.0f} s", flush=True)
        unbroken = _left_by(folder / "unbroken")
        equal = 0
        for i in range(runs):
            run = folder / f"run{i}"
            share = arguments.interruptions * (i + 1) // runs
            share -= arguments.interruptions * i // runs
            _interrupt([*command, f"--trainer.default_root_dir={run}"], run, share, chance)
            wrong = _differing(unbroken, _left_by(run))
            equal += not wrong
            print(
                f"run {i}: {share} interruptions, {'equal bit for bit' if not wrong else wrong[:5]}",
                flush=True,
            )
    print(f"{arguments.interruptions} interruptions, {equal} of {runs} ends bit-equal")
    sys.exit(equal < runs)


def _command(folder: Path, ranks: int) -> list[str]:
    values = {
        "seed_everything": 0,
        "checkpoint_every": 100,
        "data": {"cache": str(folder / "cache"), "batch_size": 256},
        "model": {
            "dictionary": {"class_path": "TopK", "init_args": {"n_latents": 256, "k": 4}},
            "dead_after_tokens": 20_000,
        },
        "trainer": {
            "max_steps": 1200,
            "val_check_interval": 250,
            "log_every_n_steps": 10,
            "accelerator": "cpu",
            "devices": ranks,
            "enable_progress_bar": False,
            "callbacks": ["PCABaseline"],
        },
    }
    path = folder / "drill.yaml"
    path.write_text(yaml.safe_dump(values))
    return [sys.executable, str(ROOT / "train.py"), "--config", str(path)]


def _run(command: list[str], until: float | None, signum: int = 0) -> int:
    """Runs a command, and interrupts it after so many seconds of training; gives its exit status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if until is not None:
        progress = Path(command[-1].partition("=")[2]) / "progress.json"
        begun = time.time()
        while process.poll() is None and not (progress.is_file() and progress.stat().st_mtime > begun):
            time.sleep(0.02)
        time.sleep(until)
        process.send_signal(signum)
    output, _ = process.communicate(timeout=600)
    if until is None and process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-3000:]}")
    return process.returncode


def _interrupt(command: list[str], run: Path, share: int, chance: random.Random) -> None:
    for _ in range(share):
        signum, moment = chance.choice(SIGNALS), chance.uniform(0.0, LONGEST_S / share)
        status = _run(command, moment, signum)
        torn = signum == signal.SIGKILL and chance.random() < 0.5 and _tear(run)
        told = f"{signal.Signals(signum).name} after {moment:.2f} s, exit {status}"
        print(f"  {told}, step {_step(run)}{', last.ckpt torn' if torn else ''}", flush=True)
    _run(command, None)


def _step(run: Path) -> int | str:
    try:
        return json.loads((run / "progress.json").read_text())["step"]
    except (OSError, ValueError):
        return "unknown"


def _tear(run: Path) -> bool:
    """Cuts the last checkpoint in half, as a disk that lied about a sync may; if there is one before."""
    last = run / "checkpoints" / "last.ckpt"
    if not (last.is_file() and last.with_name("previous.ckpt").is_file()):
        return False
    half = last.read_bytes()[: last.stat().st_size // 2]
    last.unlink()
    last.write_bytes(half)
    return True


def _left_by(run: Path) -> dict[str, object]:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    metrics = json.loads((run / "metrics.json").read_text())
    for clocked in ("wall_s", "tokens_per_s"):
        metrics.pop(clocked)
    for baseline in metrics["baselines"].values():
        baseline.pop("fit_s")
    weights = {f"weights {name}": value for name, value in checkpoint["state_dict"].items()}
    adam = checkpoint["optimizer_states"][0]["state"]
    moments = {f"Adam's {i} {name}": v for i, each in adam.items() for name, v in each.items()}
    return {**weights, **moments, "metrics": metrics, "curves": _curves(run)}


def _curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    points: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((run / "tensorboard").glob("events.out.tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val and not any(word in value.tag for word in OF_THE_CLOCK):
                    points.setdefault(value.tag, []).append((event.step, value.tensor.float_val[0]))
    return points


def _differing(a: dict[str, object], b: dict[str, object]) -> list[str]:
    return [
        name
        for name in a
        if not (torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name])
    ]


if __name__ == "__main__":
    main()
