"""Trains a sparse dictionary on the activations of a language model, beside PCA and NMF.

    python train.py --config quickstart.yaml
    python train.py --config quickstart.yaml --model.dictionary.init_args.k 8 \\
        --trainer.default_root_dir runs/k8

The steps: build everything from the configuration, make the activation cache where it is missing,
train, score on held-out documents, print what was found, and write the report. The same command again
resumes an unfinished run and shows a finished one; `--fresh` starts over. `--plan` prints what a run
takes of memory, disk and time, and starts nothing.
"""

from __future__ import annotations

import signal
from pathlib import Path

# The imports below take seconds. A signal in that time waits until somebody handles it: by default SIGUSR1,
# which a cluster sends before it takes the node away, would kill the process and with it the job.
if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})

from lightning.pytorch.utilities import rank_zero_only

from sae.cli import SaeCLI
from sae.errors import InputError
from sae.exits import exit_on_input_error
from sae.inspection import latent_table
from sae.planning import plan_run
from sae.reporting import is_reported, report_run
from sae.runs import checkpoint_to_resume, discard_run, is_finished, open_run, summary


def main(args: list[str] | None = None) -> None:
    """Runs one experiment; `args` as on the command line."""
    cli = SaeCLI(args)
    if cli.config.plan.show:
        plan = plan_run(cli.model, cli.datamodule, cli.trainer, cli.config.plan.gpus, cli.config.plan.memory)
        print(plan)
        plan.check()
        return
    folder, config = cli.run_folder, cli.config_values
    checkpoint = None if cli.config.fresh else checkpoint_to_resume(folder, config)
    if not cli.config.fresh and is_finished(folder, config):
        print(f"{folder} is finished; --fresh starts over, a larger trainer.max_steps continues it.")
    else:
        cli.datamodule.prepare_data()  # makes the cache, by all ranks that torchrun or srun started
        check_and_discard(cli, starts_over=checkpoint is None)
        cli.agreement.also["the checkpoint"] = str(checkpoint)
        if checkpoint:
            rank_zero_only(print)(f"resuming from {checkpoint}")
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    report(folder)


@rank_zero_only
def check_and_discard(cli: SaeCLI, starts_over: bool) -> None:
    """Checks that training can start; only then a run that starts over is discarded."""
    cli.datamodule.setup()
    cli.datamodule.train_dataloader()
    cli.datamodule.teardown("fit")
    if starts_over:
        discard_run(cli.run_folder)


@rank_zero_only
def report(folder: Path) -> None:
    """Prints the comparison and the clearest latents, and writes the report where it is due."""
    print(f"\n{summary(folder)}\n")
    try:
        run = open_run(folder)
        reading = None
        try:
            reading = run.reading()
        except InputError as error:  # a cache may be trained on where its language model is not
            print(f"Latents were not read: {error}")
        else:
            print(f"The clearest latents at {run.hookpoint} of {run.model}, one for each token:")
            print(latent_table(reading.clearest(20), reading.text))
        page = folder / "report" / "index.html"
        print(f"\nopen {page if is_reported(run) else report_run(run, reading)}")
    except InputError as error:
        print(f"The report was not written: {error}")
    print(f"{folder} holds metrics.json, dictionary/, and curves for `tensorboard --logdir {folder}`.")


if __name__ == "__main__":
    exit_on_input_error(main)
