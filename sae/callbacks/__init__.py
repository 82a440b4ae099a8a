"""Lightning callbacks: baselines beside the autoencoder, throughput, the run folder, TensorBoard."""

from sae.callbacks.agreement import Agreement
from sae.callbacks.baseline_kinds import (
    DictionaryLearningBaseline,
    ICABaseline,
    KMeansBaseline,
    NaturalBaseline,
    NMFBaseline,
    PCABaseline,
    RandomBaseline,
    SemiNMFBaseline,
)
from sae.callbacks.checkpoints import Checkpoints
from sae.callbacks.code_scores import CodeScores
from sae.callbacks.geometry import DirectionGeometry
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
    "CodeScores",
    "DictionaryLearningBaseline",
    "DirectionGeometry",
    "ICABaseline",
    "KMeansBaseline",
    "NMFBaseline",
    "NaturalBaseline",
    "PCABaseline",
    "ProgressFile",
    "RandomBaseline",
    "RunFolder",
    "SemiNMFBaseline",
    "SplicedLoss",
    "TensorBoardPanels",
    "Throughput",
    "TrainingBar",
]
