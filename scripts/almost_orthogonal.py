"""Counts almost-orthogonal directions: of random packings by dimension, or those of dictionaries.

    python scripts/almost_orthogonal.py
    python scripts/almost_orthogonal.py --epsilon 0.13 --learn sae
    python scripts/almost_orthogonal.py --dictionary runs/quickstart --epsilon 0.1 0.2 0.3
    python scripts/almost_orthogonal.py --runs runs/comparison/seed-* --name sae_8 --epsilon 0.2 0.3

Without --dictionary: how many directions a greedy packing of random ones reaches in d dimensions, beside what
is proved and the d of a basis, and c in count = exp(c epsilon² d) over the d that --cap did not cut. --learn
also plants them in sparse mixtures, learns them back by dictionary learning or with a BatchTopK autoencoder,
and fits the number recovered in the same way. With --dictionary: the geometry of its directions and the
largest almost-orthogonal subset found, both beside random directions of the same shape. With --runs, which
differ by their seed: the same among the latents that fire on held-out rows and that every seed has found.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

import sae
from sae.errors import InputError
from sae.exits import exit_on_input_error
from sae.ops.almost_orthogonal import sizes_by_epsilon
from sae.ops.capacity import greedy_lower_bound, random_signs_lower_bound, upper_bound
from sae.ops.geometry import geometry_of, random_rows
from sae.runs import Run, open_run
from sae.studies.planted_capacity import DIMENSIONS, LEARNERS, fit_exponential, planted_sweep
from sae.studies.stable_sets import living, stable_sets, table

# Held-out rows that tell whether a latent fires.
_ROWS, _BATCH = 65_536, 2048


def main(args: list[str] | None = None) -> None:
    """Prints the table."""
    given = _parser().parse_args(args)
    if given.runs:
        _print_stable(given)
        return
    if given.dictionary is not None:
        _print_dictionary(given)
        return
    for epsilon in given.epsilon:
        _print_sweep(given, epsilon)


def _print_sweep(given: argparse.Namespace, epsilon: float) -> None:
    learned = given.learn is not None
    heads = ("d", "basis", "found", "signs >=", "greedy >=", "at most", "recovered")
    print(f"epsilon {epsilon:g}\n" + "".join(f"{head:>12}" for head in heads[: 6 + learned]))
    points = []
    settings = {"most_planted": given.most_planted, "k": given.k, "device": given.device}
    learn = LEARNERS[given.learn] if learned else None
    for point in planted_sweep(
        given.dimensions, epsilon, given.seed, given.patience, given.cap, learn, **settings
    ):
        points.append(point)
        bounds = [bound(point.d, epsilon) for bound in (random_signs_lower_bound, greedy_lower_bound)]
        bounds.append(upper_bound(point.d, epsilon))
        found = f"{point.found:,}" if point.is_full else f">{point.found:,}"
        shown = f"{point.d:>12}{point.d:>12}{found:>12}" + "".join(f"{bound:>12.4g}" for bound in bounds)
        print(shown + (f"{f'{point.recovered}/{point.planted}':>12}" if learned else ""), flush=True)
    full = [point for point in points if point.is_full]
    _print_law("found", [(point.d, point.found) for point in full], epsilon, "raise --cap")
    if learned:
        whole = [(point.d, point.recovered) for point in full if point.planted == point.found]
        _print_law("recovered", whole, epsilon, "raise --most-planted")
    print()


def _print_law(which: str, counts: list[tuple[int, int]], epsilon: float, remedy: str) -> None:
    counts = [(d, count) for d, count in counts if count > 0]
    if len(counts) < 3:
        print(f"{which}: only {len(counts)} d were not cut: no fit; {remedy} or lower --dimensions.")
        return
    d, count = zip(*counts, strict=True)
    fit = fit_exponential(d, count, epsilon)
    print(
        f"{which} = exp({fit.intercept:.2f} + c epsilon² d), c = {fit.c:.3f} (90 %: {fit.c_low:.3f} to"
        f" {fit.c_high:.3f}; the proved bound's: {fit.c_greedy:.3f}) over {len(d)} d;\n"
        f"residual of its log {fit.residual:.3f}, against {fit.linear_residual:.3f} for {which} ∝ d."
    )


def _print_dictionary(given: argparse.Namespace) -> None:
    directions = sae.load(given.dictionary).directions.to(given.device)
    alive = directions[directions.norm(dim=1) > 0]
    n, d = alive.shape
    null = random_rows(n, d, torch.Generator().manual_seed(given.seed)).to(given.device)
    print(f"{n:,} directions in {d} dimensions\n{'':>24}{'dictionary':>14}{'random':>14}")
    learned, random = geometry_of(alive), geometry_of(null)
    for name in (
        "nearest_mean",
        "coherence",
        "welch",
        "frame_potential",
        "effective_rank",
        "antipodal_pairs",
    ):
        print(f"{name:>24}{getattr(learned, name):>14.4g}{getattr(random, name):>14.4g}")
    print(f"\nlargest subset found with |cos| < epsilon (a basis: {d})")
    for size in sizes_by_epsilon(alive, given.epsilon, seed=given.seed):
        print(f"{size.epsilon:>24g}{size.found:>14,}{size.random:>14,}")


def _print_stable(given: argparse.Namespace) -> None:
    runs = [open_run(folder, str(given.device), given.name) for folder in given.runs]
    shapes = {tuple(run.dictionary.directions.shape) for run in runs}
    if len(runs) < 2 or len(shapes) > 1:
        raise InputError(f"`--runs` must be two or more that differ by their seed, got shapes {shapes}.")
    alive = [living(run.dictionary, _held_out(run)) for run in runs]
    print(table(stable_sets([run.dictionary.directions for run in runs], alive, given.epsilon)))


def _held_out(run: Run) -> Iterator[torch.Tensor]:
    seen = 0
    for batch in run.cache.batches("held_out", run.hookpoint, _BATCH):
        yield batch.x
        seen += len(batch.x)
        if seen >= _ROWS:
            return


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"`device` must be one that torch knows, such as cpu or cuda, got {name}."
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dictionary", default=None, metavar="RUN", help="A run, or a dictionary's folder.")
    parser.add_argument("--runs", type=Path, nargs="+", help="Runs that differ by their seed.")
    parser.add_argument("--name", default=None, help="Of the dictionary, in runs of several.")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.25], help="Bounds on |cos|.")
    parser.add_argument("--dimensions", type=int, nargs="+", default=list(DIMENSIONS), metavar="D")
    parser.add_argument("--patience", type=int, default=1000, help="Rejections in a row that end a packing.")
    parser.add_argument("--cap", type=int, default=20_000, help="The most directions of a packing.")
    parser.add_argument("--learn", choices=list(LEARNERS), help="Plants them too, and learns them back.")
    parser.add_argument("--most-planted", type=int, default=4096, help="The most that are planted at one d.")
    parser.add_argument("--k", type=int, default=4, help="Planted directions in a row, in the mean.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=_device, default=torch.device("cpu"))
    return parser


if __name__ == "__main__":
    exit_on_input_error(main)
