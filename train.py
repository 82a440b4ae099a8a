"""Trains a sparse dictionary on the activations of a language model, beside PCA and NMF.

    python train.py --config quickstart.yaml
    python train.py --config quickstart.yaml --model.dictionary.init_args.k 8 \\
        --trainer.default_root_dir runs/k8

The steps: build everything from the configuration, make the activation cache where it is missing,
train, score on held-out documents, and print what was found. The same command again resumes an
unfinished run and shows a finished one; `--fresh` starts over.
"""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_only

from sae.cli import SaeCLI, exit_on_input_error
from sae.errors import InputError
from sae.runs import is_finished, open_run, prepare_folder, summary


def main(args: list[str] | None = None) -> None:
    """Runs one experiment; `args` as on the command line."""
    cli = SaeCLI(args)
    folder = cli.run_folder
    checkpoint = prepare_folder(folder, cli.config_values, fresh=cli.config.fresh)
    if is_finished(folder, cli.trainer.max_steps):
        print(f"{folder} is finished; --fresh starts over, a larger trainer.max_steps continues it.")
    else:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    report(cli)


@rank_zero_only
def report(cli: SaeCLI) -> None:
    """Prints the comparison and the clearest latents."""
    run = open_run(cli.run_folder)
    print(f"\n{summary(cli.run_folder)}\n")
    try:
        reading = run.reading()
    except InputError as error:  # a cache may be trained on where its language model is not
        print(f"Latents were not read: {error}")
    else:
        print(f"The clearest latents at {run.hookpoint} of {run.model}:")
        print(reading.table(reading.clearest(20)))
    print(f"\n{cli.run_folder} holds metrics.json, dictionary/, and curves for `tensorboard --logdir`.")


if __name__ == "__main__":
    exit_on_input_error(main)
