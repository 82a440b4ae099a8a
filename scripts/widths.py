"""What width buys: FVU against the number of latents, and against how nearly orthogonal they must be.

    python train.py --config widths.yaml --report=false && python scripts/widths.py runs/widths

Two laws: of FVU against the number of latents, and of the FVU that is left where rows are coded with nothing
but a set of latents with all |cos| < epsilon, against epsilon and the width that the set was chosen from.
Writes widths.md, widths.json, widths.svg and, where the run's cache is at hand, epsilons.svg into its folder.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from sae.errors import InputError
from sae.exits import exit_on_input_error
from sae.files import write_atomically, write_json
from sae.inspection.comparison_figures import epsilon_tradeoff, width_tradeoff
from sae.inspection.figures import to_page
from sae.runs import Run, finished_metrics, open_run
from sae.studies import tradeoff
from sae.studies.stable_sets import living
from sae.studies.tradeoff import Subset, subsets
from sae.studies.widths import Width, law_of, table, widths_of

_BATCH = 1024


def main(args: list[str] | None = None) -> None:
    """Prints and writes the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="Of dictionaries that differ in width alone.")
    parser.add_argument("--rows", type=int, default=8192, help="Held-out rows that the sets are to code.")
    given = parser.parse_args(args)
    if given.rows < 1:
        raise InputError(f"`--rows` must be at least 1, got {given.rows}.")
    run = given.run
    metrics = finished_metrics(run)
    widths = widths_of(metrics)
    sets = _sets(run, widths, given.rows)
    d_model = widths[0].d_model
    law, texts = law_of(widths), [table(widths)]
    told = {"law": law._asdict(), "widths": [width._asdict() for width in widths]}
    if sets:
        texts.append(tradeoff.table(sets, d_model))
        told["sets"] = [one._asdict() for one in sets]
        told["tradeoff"] = _draw_sets(run, sets, d_model)
    text = "\n\n".join(texts)
    write_atomically(run / "widths.md", f"{text}\n".encode())
    write_json(run / "widths.json", told)
    _draw_widths(run, widths)
    print(f"{text}\n\n{run} holds widths.md, widths.json, widths.svg{' and epsilons.svg' if sets else ''}.")


def _sets(folder: Path, widths: list[Width], n_rows: int) -> list[Subset]:
    """Of every width, at the epsilons of its geometry; none where the rows are not at hand."""
    found = []
    for width in widths:
        try:
            run = open_run(folder, dictionary=width.name)
        except InputError as error:  # no reason to lose the rest
            print(f"No set was coded: {error}", file=sys.stderr)
            return []
        rows, mean = partial(_held_out, run, n_rows), run.cache.moments(run.hookpoint).mean
        alive, k = living(run.dictionary, rows()), max(1, round(width.l0))
        found += subsets(run.dictionary, alive, list(width.found), k, rows, mean)
    return found


def _held_out(run: Run, n_rows: int) -> Iterator[Tensor]:
    batches = run.cache.batches("held_out", run.hookpoint, _BATCH)
    return (batch.x for batch in itertools.islice(batches, -(-n_rows // _BATCH)))


def _draw_sets(run: Path, sets: list[Subset], d_model: int) -> dict[str, float] | str:
    law = tradeoff.law_of(sets, d_model)
    fvu: dict[int, list[tuple[float, float]]] = {}
    for one in sets:
        fvu.setdefault(one.n_latents, []).append((one.epsilon, one.fvu))
    if isinstance(law, str):
        figure = epsilon_tradeoff(fvu, [], "")
    else:
        drawn = [(epsilon, law.at(epsilon, d_model, d_model)) for epsilon, _ in next(iter(fvu.values()))]
        figure = epsilon_tradeoff(fvu, drawn, f"exp(-{law.c:.2g} ε² d_model)")
    write_atomically(run / "epsilons.svg", to_page(figure))
    return law if isinstance(law, str) else law._asdict()


def _draw_widths(run: Path, widths: list[Width]) -> None:
    law = law_of(widths)
    fvu = [(width.n_latents, width.fvu) for width in widths]
    sizes = {
        epsilon: [(width.n_latents, width.found[epsilon], width.random[epsilon]) for width in widths]
        for epsilon in widths[0].found
    }
    drawn = f"{law.floor:.2g} + {law.scale:.2g} n^-{law.exponent:.2g}"
    figure = width_tradeoff(fvu, [(n, law.at(n)) for n, _ in fvu], drawn, sizes, widths[0].d_model)
    write_atomically(run / "widths.svg", to_page(figure))


if __name__ == "__main__":
    exit_on_input_error(main)
