"""What width buys: FVU against the number of latents, and the almost-orthogonal sets among them.

    python train.py --config widths.yaml --report=false && python scripts/widths.py runs/widths

Writes widths.md, widths.json and widths.svg into the run's folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sae.exits import exit_on_input_error
from sae.files import write_atomically, write_json
from sae.inspection.comparison_figures import width_tradeoff
from sae.inspection.figures import to_page
from sae.runs import finished_metrics
from sae.studies.widths import law_of, table, widths_of


def main(args: list[str] | None = None) -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="Of dictionaries that differ in width alone.")
    run = parser.parse_args(args).run
    widths = widths_of(finished_metrics(run))
    law, text = law_of(widths), table(widths)
    write_atomically(run / "widths.md", f"{text}\n".encode())
    write_json(run / "widths.json", {"law": law._asdict(), "widths": [width._asdict() for width in widths]})
    fvu = [(width.n_latents, width.fvu) for width in widths]
    sizes = {
        epsilon: [(width.n_latents, width.found[epsilon], width.random[epsilon]) for width in widths]
        for epsilon in widths[0].found
    }
    drawn = f"{law.floor:.2g} + {law.scale:.2g} n^-{law.exponent:.2g}"
    figure = width_tradeoff(fvu, [(n, law.at(n)) for n, _ in fvu], drawn, sizes, widths[0].d_model)
    write_atomically(run / "widths.svg", to_page(figure))
    print(f"{text}\n\n{run} holds widths.md, widths.json and widths.svg.")


if __name__ == "__main__":
    exit_on_input_error(main)
