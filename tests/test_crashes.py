"""Sudden ends: signals, torn and foreign checkpoints, a full disk, numbers that blow up, ranks that die."""

import os
import pickle
import signal
import stat
import time
import zipfile

import pytest
import torch
from support.laws import differing, left_by, write_run
from support.ranks import DIED, run_ranks

import sae
from sae.activations import ActivationDataModule
from sae.activations.exchange.imported import import_rows
from sae.checkpoints import WholeCheckpoints, is_whole, newest_whole, read_checkpoint
from sae.errors import DivergedError, InputError, RunError
from sae.exits import exit_on_input_error
from sae.launch import check_launch, explained
from sae.signals import STOP_SIGNALS, Stopped
from sae.training import SparseAutoencoderModule, host_reading
from train import main

pytestmark = pytest.mark.shapes_unchecked


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    torch.manual_seed(0)
    rows = torch.randn(3000, 16) @ torch.randn(16, 16)
    return import_rows(rows, tmp_path_factory.mktemp("law") / "cache", held_out=0.1).location


@pytest.fixture(scope="module")
def unbroken(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    main(["--config", write_run(folder, cache, baselines=False)])
    return left_by(folder / "run")


@pytest.fixture(autouse=True)
def _signals_as_before():
    """A test that is signalled leaves no trace in the process that runs the tests."""
    handlers = {
        signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    STOP_SIGNALS.received, STOP_SIGNALS.steps_are_taken = None, False


def _at_step(monkeypatch, step, happening):
    """Lets something happen in the middle of a step."""
    real = SparseAutoencoderModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            happening()
        return real(self, batch, batch_idx)

    monkeypatch.setattr(SparseAutoencoderModule, "training_step", training_step)


def _status(run):
    """Exit status of the command."""
    with pytest.raises(SystemExit) as ended:
        exit_on_input_error(lambda: main(["--config", run]))
    return ended.value.code


@pytest.mark.parametrize(("signum", "status"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130)])
def test_a_signal_ends_the_step_saves_and_exits_and_the_same_command_continues(
    cache, unbroken, tmp_path, monkeypatch, capsys, signum, status
):
    run = write_run(tmp_path, cache, baselines=False)
    with monkeypatch.context() as patch:
        _at_step(patch, 16, lambda: os.kill(os.getpid(), signal.Signals[signum]))
        assert _status(run) == status
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    # The request rides on the gradients of the step after the one in which it came.
    assert checkpoint["global_step"] == 18
    assert f"stopped by {signum} after step 18; checkpoint saved" in capsys.readouterr().err
    STOP_SIGNALS.received = None
    main(["--config", run])
    assert differing(unbroken, left_by(tmp_path / "run")) == []


def test_a_signal_during_validation_ends_the_run_before_another_step(cache, unbroken, tmp_path, monkeypatch):
    run = write_run(tmp_path, cache, baselines=False)
    real = SparseAutoencoderModule.validation_step

    def signalled(self, batch, batch_idx):
        if self.global_step == 20 and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SparseAutoencoderModule, "validation_step", signalled)
        assert _status(run) == 143
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 20
    STOP_SIGNALS.received = None
    main(["--config", run])
    assert differing(unbroken, left_by(tmp_path / "run")) == []


def test_a_second_ctrl_c_ends_at_once(cache, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    _at_step(monkeypatch, 16, twice)
    assert _status(write_run(tmp_path, cache, baselines=False)) in (1, 130)  # Lightning exits with 1
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 14


@pytest.mark.parametrize("array", [False, True])
def test_sigusr1_puts_the_slurm_job_back_into_the_queue(cache, tmp_path, monkeypatch, array):
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")

    def killed():
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        if array:
            monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
        os.kill(os.getpid(), signal.SIGUSR1)

    _at_step(monkeypatch, 5, killed)
    assert _status(write_run(tmp_path, cache, baselines=False)) == 138
    assert (tmp_path / "asked").read_text().split() == ["requeue", "12_3" if array else "17"]


def test_a_signal_outside_of_training_ends_at_once():
    STOP_SIGNALS.install()
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def _tear(path):
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.unlink()  # best.ckpt may be the same file
    path.write_bytes(half)


def test_of_a_torn_checkpoint_the_one_before_is_used(cache, unbroken, tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path, cache, baselines=False)
    with monkeypatch.context() as patch:
        _at_step(patch, 31, _power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            main(["--config", run])
    folder = tmp_path / "run" / "checkpoints"
    assert newest_whole(folder) == folder / "last.ckpt"
    _tear(folder / "last.ckpt")
    assert not is_whole(folder / "last.ckpt")
    main(["--config", run])
    assert "last.ckpt is torn; continuing from previous.ckpt" in capsys.readouterr().err
    assert differing(unbroken, left_by(tmp_path / "run")) == []


def _power_cut():
    raise RuntimeError("power cut")


def test_one_flipped_byte_is_seen_and_two_torn_checkpoints_are_refused(cache, tmp_path, monkeypatch):
    run = write_run(tmp_path, cache, baselines=False)
    with monkeypatch.context() as patch:
        _at_step(patch, 31, _power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            main(["--config", run])
    folder = tmp_path / "run" / "checkpoints"
    for name in ("last.ckpt", "previous.ckpt"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=r"last.ckpt and previous.ckpt in .* torn. `--fresh` starts over"):
        main(["--config", run])
    main(["--config", run, "--fresh"])


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(cache, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    run = write_run(tmp_path, cache, baselines=False, max_steps=8)
    main(["--config", run])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with zipfile.ZipFile(last) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in contents if name.endswith("data.pkl"))
    contents[pickled] = pickle.dumps(Evil())
    last.unlink()
    with zipfile.ZipFile(last, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match="is not a checkpoint of ours: .*Nothing of it was run"):
        main(["--config", run, "--trainer.max_steps=12"])
    assert not (tmp_path / "ran").exists()


def test_the_checkpoint_of_another_dictionary_is_refused(cache, tmp_path):
    small, large = (write_run(tmp_path / name, cache, baselines=False, max_steps=8) for name in "ab")
    main(["--config", small, "--model.dictionary.init_args.n_latents=64"])
    main(["--config", large])
    (tmp_path / "b/run/checkpoints/last.ckpt").unlink()
    os.link(tmp_path / "a/run/checkpoints/last.ckpt", tmp_path / "b/run/checkpoints/last.ckpt")
    with pytest.raises(
        InputError, match=r"checkpoint is of TopK\(.*n_latents=64, .* trains TopK\(.*n_latents=96"
    ):
        main(["--config", large, "--trainer.max_steps=12"])


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    cache, unbroken, tmp_path, monkeypatch, capsys
):
    run = write_run(tmp_path, cache, baselines=False)
    folder = tmp_path / "run" / "checkpoints"
    kept = {}

    def fill():
        kept["bytes"] = (folder / "last.ckpt").read_bytes()
        (folder / "last.ckpt.tmp").symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        _at_step(patch, 16, fill)
        assert _status(run) == 1
    told = capsys.readouterr().err
    assert "could not be written: " in told and "the last checkpoint is intact" in told
    assert (folder / "last.ckpt").read_bytes() == kept["bytes"]
    assert not (folder / "last.ckpt.tmp").is_symlink()
    main(["--config", run])
    assert differing(unbroken, left_by(tmp_path / "run")) == []


def test_a_checkpoint_is_never_seen_half_written(tmp_path, monkeypatch):
    files, path = WholeCheckpoints(), tmp_path / "last.ckpt"
    whole = dict.fromkeys(("state_dict", "loops", "dictionary", "generators", "pytorch-lightning_version"))
    files.save_checkpoint({**whole, "a": torch.arange(5)}, path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with pytest.raises(RunError, match="could not be written: .*I/O error"):
        files.save_checkpoint({**whole, "a": torch.arange(6)}, path)
    assert files.load_checkpoint(path)["a"].tolist() == [0, 1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_loss_that_is_not_finite_ends_with_status_1_and_keeps_the_weights_before(cache, tmp_path, capsys):
    run = write_run(tmp_path, cache, baselines=False, gradient_clip_val=0.0)
    with pytest.raises(SystemExit) as ended:
        exit_on_input_error(lambda: main(["--config", run, "--model.lr=1e25", "--checkpoint_every=1"]))
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "is not finite at step" in told and "lower `model.lr`" in told and "before_divergence" in told
    kept = sae.load(tmp_path / "run" / "before_divergence")
    assert all(tensor.isfinite().all() for tensor in kept.saved_tensors().values())
    assert is_whole(tmp_path / "run" / "checkpoints" / "last.ckpt")


def test_seen_a_step_late_as_on_a_gpu_the_weights_are_those_of_the_same_step(cache, tmp_path, monkeypatch):
    def weights(late):
        real = host_reading.HostReading.__init__
        with monkeypatch.context() as patch:
            patch.setattr(host_reading.HostReading, "__init__", lambda self, **_: real(self, late=late))
            run = write_run(tmp_path / str(late), cache, baselines=False, gradient_clip_val=0.0)
            with pytest.raises(DivergedError) as error:
                main(["--config", run, "--model.lr=1e25"])
        return str(error.value), sae.load(tmp_path / str(late) / "run" / "before_divergence").saved_tensors()

    (told, at_once), (told_late, later) = weights(late=False), weights(late=True)
    assert told == told_late
    for name, tensor in at_once.items():
        torch.testing.assert_close(later[name], tensor)  # unit rows are made unit once more


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("step", "saved"), [(13, 10), (49, 49)])  # before a checkpoint; the last of the run
def test_of_one_bad_step_nothing_is_saved_however_late_it_is_seen(
    cache, tmp_path, monkeypatch, step, saved, late
):
    init, real = host_reading.HostReading.__init__, SparseAutoencoderModule.training_step

    def once(self, batch, batch_idx):
        loss = real(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == step else loss

    monkeypatch.setattr(host_reading.HostReading, "__init__", lambda self, **_: init(self, late=late))
    monkeypatch.setattr(SparseAutoencoderModule, "training_step", once)
    run = write_run(tmp_path, cache, baselines=False)
    for _ in range(2):  # the same command again comes to the same end
        with pytest.raises(DivergedError, match=rf"not finite at step {step + 1} \(batch {step} "):
            main(["--config", run])
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == saved
    assert all(weight.isfinite().all() for weight in last["state_dict"].values())


@pytest.mark.parametrize("clip", [{"gradient_clip_val": 0.0}, {"gradient_clip_algorithm": "value"}])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(cache, tmp_path, monkeypatch, clip):
    real = SparseAutoencoderModule.on_before_optimizer_step

    def spoil(self, optimizer):
        real(self, optimizer)
        if self.global_step == 16:
            self.dictionary.b_enc.grad[3] = float("nan")

    monkeypatch.setattr(SparseAutoencoderModule, "on_before_optimizer_step", spoil)
    run = write_run(tmp_path, cache, baselines=False, **clip)
    with pytest.raises(DivergedError, match="not finite at step 17 "):
        main(["--config", run])
    kept = sae.load(tmp_path / "run" / "before_divergence").saved_tensors()
    assert all(tensor.isfinite().all() for tensor in kept.values())


def _train_and_exit(config, die_at=None):
    if die_at is not None and torch.distributed.is_available() and os.environ["RANK"] == "1":
        real = SparseAutoencoderModule.training_step

        def dies(self, batch, batch_idx):
            if self.global_step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, batch, batch_idx)

        SparseAutoencoderModule.training_step = dies
    exit_on_input_error(lambda: main(["--config", config]))


def test_the_death_of_one_rank_ends_the_other(cache, tmp_path, capfd):
    run = write_run(tmp_path, cache, baselines=False, devices=2)
    begin = time.monotonic()
    assert run_ranks(2, _train_and_exit, run, 20) == [1, DIED]
    assert time.monotonic() - begin < 60
    assert "another rank has gone" in capfd.readouterr().err


def _train_and_signal(config, rank, signum, step):
    real = SparseAutoencoderModule.training_step

    def signalled(self, batch, batch_idx):
        if self.global_step == step and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signum)
        return real(self, batch, batch_idx)

    SparseAutoencoderModule.training_step = signalled
    exit_on_input_error(lambda: main(["--config", config]))


@pytest.mark.parametrize("step", [20, 49])  # on the way, and in the last step
def test_one_rank_that_is_signalled_ends_both_after_the_same_step(cache, tmp_path, capfd, step):
    run = write_run(tmp_path, cache, baselines=False, devices=2)
    assert run_ranks(2, _train_and_signal, run, 1, signal.SIGUSR1, step) == [138, 138]
    assert f"stopped by SIGUSR1 after step {min(step + 2, 50)}; checkpoint saved" in capfd.readouterr().err
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == min(step + 2, 50)


def _train_with_own(config, what):
    rank, extra = int(os.environ["RANK"]), []
    if what == "configuration":
        extra = [f"--model.lr={1e-3 * (1 + rank)}"]
    elif rank == 1:  # its node has another cache at the same path
        setup = ActivationDataModule.setup

        def other(self, stage=None):
            setup(self, stage)
            self.cache.manifest["fingerprint"] = "another"

        ActivationDataModule.setup = other
    exit_on_input_error(lambda: main(["--config", config, *extra]))


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("configuration", "model.lr: 0.001 on rank 0, 0.002 on rank 1"),
        ("cache", "'another' on rank 1"),
    ],
)
def test_ranks_that_disagree_are_refused_by_name_and_once(cache, tmp_path, capfd, what, named):
    run = write_run(tmp_path, cache, baselines=False, devices=2)
    assert run_ranks(2, _train_with_own, run, what) == [2, 2]
    told = capfd.readouterr().err
    assert told.count("ranks disagree") == 1 and named in told
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_batch_that_ranks_do_not_divide_is_refused(cache, tmp_path, capfd):
    run = write_run(tmp_path, cache, baselines=False, devices=2)
    assert run_ranks(2, _train_odd, run)[0] == 2
    assert "`batch_size`=121 must be a multiple of the 2 ranks" in capfd.readouterr().err


def _train_odd(config):
    exit_on_input_error(lambda: main(["--config", config, "--data.batch_size=121"]))


def test_a_port_in_use_is_said():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError) as error:
            torch.distributed.TCPStore(
                "127.0.0.1", taken.getsockname()[1], 1, is_master=True, use_libuv=False
            )
    assert "Set MASTER_PORT to a free one" in str(explained(error.value))
    assert explained(RuntimeError("shapes differ")) is None


def test_processes_that_nobody_starts_are_not_waited_for(monkeypatch):
    with pytest.raises(InputError, match="`trainer.num_nodes` is 2, and neither srun nor torchrun"):
        check_launch(2)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(InputError, match="this SLURM job has 4 tasks, and this .* not started by srun"):
        check_launch(1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    check_launch(2)
