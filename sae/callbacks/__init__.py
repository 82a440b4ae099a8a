"""Lightning callbacks: baselines beside the autoencoder, throughput, the run folder, TensorBoard."""

from sae.callbacks.agreement import Agreement
from sae.callbacks.baselines import NMFBaseline, PCABaseline
from sae.callbacks.checkpoints import Checkpoints
from sae.callbacks.progress import TrainingBar
from sae.callbacks.progress_file import ProgressFile
from sae.callbacks.run_folder import RunFolder
from sae.callbacks.spliced_loss import SplicedLoss
from sae.callbacks.tensorboard import TensorBoardPanels
from sae.callbacks.throughput import Throughput
from sae.callbacks.truth import AgainstTheTruth

__all__ = [
    "AgainstTheTruth",
    "Agreement",
    "Checkpoints",
    "NMFBaseline",
    "PCABaseline",
    "ProgressFile",
    "RunFolder",
    "SplicedLoss",
    "TensorBoardPanels",
    "Throughput",
    "TrainingBar",
]
