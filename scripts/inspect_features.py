"""Shows what the latents of a run (e.g. runs/quickstart) mean, by tokens and contexts.

    python scripts/inspect_features.py RUN                     the twenty clearest latents
    python scripts/inspect_features.py RUN --top 50
    python scripts/inspect_features.py RUN --latent 17         all that is known of one
    python scripts/inspect_features.py RUN --token " the"      the latents that fire on a token, or raise it
    python scripts/inspect_features.py RUN --text "a b c"      the strongest latents at each token of a text
    python scripts/inspect_features.py RUN --report [FOLDER]   write the report again
    python scripts/inspect_features.py RUN --dictionary NAME   of a run that trained several

Reads the run's dictionary, cache and evidence, and loads its language model. A run under way is shown
as of its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sae.errors import InputError
from sae.exits import exit_on_input_error
from sae.inspection import latent_page, latent_table, text_table, token_tables
from sae.reporting import report_run
from sae.runs import open_run


def main() -> None:
    """Prints what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="run folder (trainer.default_root_dir)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--latent", type=int, help="show everything about this latent")
    what.add_argument("--token", help="list the latents that fire on this token, and those that raise it")
    what.add_argument(
        "--text", help="run the model on this text and list the strongest latents at each token"
    )
    what.add_argument(
        "--report",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="write the report (default: into the run's folder)",
    )
    parser.add_argument("--dictionary", metavar="NAME", help="which one, where the run trained several")
    parser.add_argument("--top", type=int, help="how many latents to list (20; with --text: 5 per token)")
    parser.add_argument("--model", metavar="FOLDER", help="the run's language model, where it has moved to")
    parser.add_argument("--tokens", type=int, help="rows read for evidence, at most (default: 25 million)")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    args = parser.parse_args()
    for name in ("top", "tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"`--{name}` must be at least 1, got {getattr(args, name)}.")
    run = open_run(args.run, args.device, args.dictionary)
    if run.unfinished:
        print(f"{run.unfinished}\n")
    if args.report is not None:
        print(f"open {report_run(run, model=args.model, folder=Path(args.report) if args.report else None)}")
        return
    reading = run.reading(args.model, args.tokens)
    text = reading.text
    if args.latent is not None:
        reading.check_latent(args.latent)
        reading.measure_ablations([args.latent])
        print(latent_page(reading.latent(args.latent), text))
    elif args.token is not None:
        print(token_tables(reading, text.token_id(args.token), args.top or 20))
    elif args.text is not None:
        print(text_table(reading, reading.on_text(args.text, args.top or 5)))
    else:
        print("the clearest latents, one for each token (the report lists all):")
        print(latent_table(reading.clearest(args.top or 20), text))


if __name__ == "__main__":
    exit_on_input_error(main)
