"""What the laws of training compare: all that a run leaves, read back and set side by side."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from sae.dictionaries import Dictionary, SparseAutoencoder
from sae.dictionaries.penalised import Penalised

OF_THE_CLOCK = (
    "wall_s", "tokens_per_s", "fit_s", "event_files", "data_wait", "memory_bytes", "figures", ".python",
)  # fmt: skip
"""Names of what may differ between two runs that are the same; from Python's generator beartype draws too."""
KINDS = {
    name: {"n_latents": 96, **({"target_l0": 2.0} if issubclass(kind, Penalised) else {"k": 2})}
    for name, kind in Dictionary.kinds.items()
    if issubclass(kind, SparseAutoencoder) and kind.__module__.startswith("sae.")
}
"""Every kind of autoencoder, with arguments of a small one; a new kind adds its own."""
QUICK = ("BatchTopK",)
EVERY_KIND = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
"""The kinds as parameters of a law: where time is short, one that chooses over all ranks."""


VARIANTS = {
    "resample": ("TopK", {"revival": ["resample"], "resample_every": 5}),
    "resample-thresholds": ("JumpReLU", {"revival": ["resample", "auxk"], "resample_every": 5}),
    "minfire": ("BatchTopK", {"revival": ["minfire", "auxk"]}),
    "its own": ("MatryoshkaBatchTopK", {"revival": None}),
    "minfire-penalised": ("ReLU", {"revival": ["minfire"]}),
    "pre_act": ("Gated", {"revival": ["pre_act"]}),
    "averages": ("BatchTopK", {"ema_decay": 0.9}),
    "row-sparse": ("TopK", {"row_sparse_adam": True}),
    "whitened": ("JumpReLU", {"whiten": True, "start": "subspace"}),
    "quadratic": (
        "JumpReLU",
        {
            "dictionary": {
                "class_path": "JumpReLU",
                "init_args": {"n_latents": 96, "target_l0": 2.0, "penalty": "quadratic"},
            }
        },
    ),
}
"""Ways to train that the kinds' own do not have: a kind, and settings of `model`."""


def write_run(folder, cache, kind="TopK", baselines=True, model=None, **trainer):
    """A configuration of a short run in `folder` / run, in which latents die and are revived."""
    # Not kept with the cache: every run has to fit it.
    nmf = {"n_components": 8, "curve": [4], "max_rows": 1500, "keep": False}
    listed = [
        {"class_path": "PCABaseline", "init_args": {"curve": [2]}},
        {"class_path": "NMFBaseline", "init_args": nmf},
    ]
    values = {
        "seed_everything": 0,
        "checkpoint_every": 7,
        "report": False,  # laws are of what training leaves
        "data": {"cache": str(cache), "batch_size": 120},
        "model": {
            "dictionary": {"class_path": kind, "init_args": KINDS[kind]},
            "lr": 1e-3,
            "warmup_steps": 3,
            # Those that begin at equal rates never miss many steps in a row.
            **({"revival": ["auxk"]} if "TopK" in kind else {}),
            "dead_after_tokens": 100 if "target_l0" in KINDS[kind] else 400,
            **(model or {}),
        },
        "trainer": {
            "max_steps": 50,
            "default_root_dir": str(folder / "run"),
            "val_check_interval": 10 * trainer.get("accumulate_grad_batches", 1),
            "log_every_n_steps": 3,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": listed if baselines else [],
            **trainer,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def left_by(run):
    """Everything a run has left, by name: checkpoint, metrics, and every point of every curve."""
    checkpoint = torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)
    metrics = json.loads((Path(run) / "metrics.json").read_text())
    everything = {"checkpoint": checkpoint, "metrics": metrics, "curves": _curves(Path(run))}
    flat = dict(_flat(everything, ""))
    return {name: value for name, value in flat.items() if not any(word in name for word in OF_THE_CLOCK)}


def some_die(left):
    """Whether latents died in a run, so that they had to be brought back."""
    return any(".curves.train/dead_fraction." in n and n.endswith(".1") and v > 0 for n, v in left.items())


def differing(a, b, tolerance=0.0):
    """Names of what two runs left that differs by more than `tolerance` of its largest value."""
    return [
        f"{name}: {a.get(name)} and {b.get(name)}"
        for name in sorted({*a, *b})
        if name not in a or name not in b or _distance(a[name], b[name]) > tolerance
    ]


def _distance(a, b):
    if isinstance(a, torch.Tensor) and a.shape == b.shape:
        a, b = a.double(), b.double()
        if torch.equal(a, b):
            return 0.0
        return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) / max(abs(a), 1e-30)
    return 0.0 if a == b else float("inf")


def _curves(run):
    """tag -> [(step, value)], in the order of the files: what is there twice is seen twice."""
    points = {}
    files = [p for p in (run / "tensorboard").glob("events*") if not p.name.endswith(".hparams")]
    for path in sorted(files, key=_when_begun):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                points.setdefault(value.tag, []).append([event.step, *value.tensor.float_val])
    return points


def _when_begun(events):
    """By a file's second and, within one second, its number in the process: 10 comes after 9."""
    parts = events.name.split(".")  # events.out.tfevents.<second>.<host>.<process>.<number>
    return int(parts[3]), int(parts[-1])


def _flat(value, name):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{i}")
    else:
        yield name, value
