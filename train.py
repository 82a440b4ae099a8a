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
from contextlib import AbstractContextManager, nullcontext
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
from sae.run_lock import RunLock
from sae.runs import (
    checkpoint_to_resume,
    dictionary_names,
    discard_run,
    is_finished,
    open_run,
    read_config,
    report_folder,
)
from sae.summary import summary
from sae.training.names import SINGLE


def main(args: list[str] | None = None) -> None:
    """Runs one experiment; `args` as on the command line."""
    cli = SaeCLI(args)
    if cli.config.plan.show:
        gpus = cli.config.plan.gpus or cli.trainer.world_size
        plan = plan_run(cli.model, cli.datamodule, cli.trainer, gpus, cli.config.plan.memory)
        print(plan)
        if cli.model.target_l0.is_open:
            print(cli.model.target_l0.note)
        plan.check()
        return
    with owned(cli.run_folder):
        run(cli)


def run(cli: SaeCLI) -> None:
    """Trains, or goes on where the folder's run stands, or shows the one that is finished; then reports."""
    folder, config = cli.run_folder, cli.config_values
    checkpoint = None if cli.config.fresh else checkpoint_to_resume(folder, config)
    if not cli.config.fresh and is_finished(folder, config):
        print(f"{folder} is finished; --fresh starts over, a larger trainer.max_steps continues it.")
    else:
        cli.datamodule.prepare_data()  # makes the cache, by all ranks that torchrun or srun started
        check_data(cli)
        train(cli, checkpoint)
    report(folder, cli.config.report)


@rank_zero_only
def check_data(cli: SaeCLI) -> None:
    """Checks that training can start, before anything of an earlier run is touched."""
    cli.datamodule.setup()
    cli.datamodule.train_dataloader()
    cli.datamodule.teardown("fit")


def owned(folder: Path) -> AbstractContextManager[object]:
    """The run folder as this process's own; the first rank's, for all of them."""
    return nullcontext() if getattr(rank_zero_only, "rank", 0) else RunLock(folder)


def train(cli: SaeCLI, checkpoint: Path | None) -> None:
    """Trains from the checkpoint, or from the start, and scores."""
    if checkpoint is None:
        rank_zero_only(discard_run)(cli.run_folder)
    else:
        rank_zero_only(print)(f"resuming from {checkpoint}")
    cli.agreement.also["the checkpoint"] = str(checkpoint)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    cli.run_files.finish()


@rank_zero_only
def report(folder: Path, latents: bool) -> None:
    """Prints the comparison, and with `latents` also the clearest ones, and writes reports that are due."""
    print(f"\n{summary(folder)}\n")
    names = dictionary_names(read_config(folder))
    for name in names if latents else ():
        report_one(folder, None if name == SINGLE else name)
    made = "dictionary/" if names == [SINGLE] else f"dictionaries/{{{','.join(names)}}}/"
    print(f"{folder} holds metrics.json, {made}, and curves for `tensorboard --logdir {folder}`.")


def report_one(folder: Path, name: str | None) -> None:
    """Prints the clearest latents of a dictionary, and writes its report where it is due."""
    try:
        run = open_run(folder, dictionary=name)
        reading = None
        try:
            reading = run.reading()
        except InputError as error:  # a cache may be trained on where its language model is not
            print(f"Latents were not read: {error}")
        else:
            of = f" of {name}" if name else ""
            print(f"The clearest latents{of} at {run.hookpoint} of {run.model}, one for each token:")
            print(latent_table(reading.clearest(20), reading.text))
        page = report_folder(run) / "index.html"
        print(f"\nopen {page if is_reported(run) else report_run(run, reading)}")
    except InputError as error:
        print(f"The report was not written: {error}")


if __name__ == "__main__":
    exit_on_input_error(main)
