"""Trains kinds and baselines on a world of known features, and scores them against the truth.

    python scripts/leaderboard.py --world tiny --seeds 3
    python scripts/leaderboard.py --world small --seeds 1 --entries JumpReLU BatchTopK PCA
    python scripts/leaderboard.py --world tiny --entries TopK:auxk TopK:resample TopK:minfire TopK:none
    python scripts/leaderboard.py --world synthsaebench-16k --n-latents 4096 --l0 25 \\
        --samples 200_000_000 --device cuda

All at equal width, samples and L0; random directions and the true ones (coded by a pursuit that knows how
many fire) frame every score. Writes board.md, board.json and TensorBoard's hparams into --out. What is done
is not done again, what was interrupted goes on: give the same command.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from sae.errors import InputError
from sae.exits import exit_on_input_error
from sae.files import write_atomically, write_json
from sae.studies.board import Board, BoardRunner
from sae.studies.board_table import markdown, rows_of, write_hparams
from sae.studies.entries import ALL, REFERENCES, entry_named


def main(args: list[str] | None = None) -> None:
    """Runs what is missing, and writes the table."""
    given = _parser().parse_args(args)
    if given.seeds < 1:
        raise InputError(f"`seeds` must be at least 1, got {given.seeds}.")
    entries = [entry_named(name) for name in dict.fromkeys([*REFERENCES, *given.entries])]
    board = Board(given.world, given.samples, given.n_latents, given.l0, given.batch_size)
    out = given.out or Path("runs") / f"board-{given.world}"
    runner = BoardRunner(board, out, given.device)
    results = []
    for seed in tqdm(range(given.seeds), desc="seeds", disable=given.seeds == 1):
        for entry in tqdm(entries, desc=f"board of {given.world}", leave=False):
            if seed == 0 or entry.is_trained or entry.kind == REFERENCES[0]:  # the others have no seed
                results.append(runner.result(entry, seed))
    rows = rows_of(results)
    n, d = runner.n_latents, runner.world.config.d_model
    title = (
        f"{given.world}: {runner.world.config.n_features:,} features in {d} dimensions, {n:,} latents,"
        f" {board.samples:,} samples, L0 {runner.l0:.2f}, {given.seeds} seed{'s'[: given.seeds > 1]}"
    )
    text = markdown(title, rows)
    write_json(out / "board.json", {"title": title, "rows": rows})
    write_atomically(out / "board.md", text.encode())
    write_hparams(out, given.world, results)
    print(
        f"\n{text}\n{out} holds board.md, board.json, results/, and hparams for `tensorboard --logdir {out}`."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--world", default="tiny", help="tiny, small or synthsaebench-16k.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--entries", nargs="+", default=list(ALL), metavar="NAME", help="Default: all.")
    parser.add_argument("--samples", type=int, default=2_000_000, help="Rows that each is trained on.")
    parser.add_argument("--n-latents", type=int, default=None, help="Default: as many as features.")
    parser.add_argument("--l0", type=float, default=None, help="Default: that of the world.")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=None, help="Default: runs/board-WORLD.")
    parser.add_argument("--device", default="cpu")
    return parser


if __name__ == "__main__":
    exit_on_input_error(main)
