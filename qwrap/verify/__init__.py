"""The exported file in onnxruntime against the simulation in torch.

Imports neither ``quant`` nor ``export``: an oracle shares no code with what it judges.
"""

from qwrap.verify.compare import verify
from qwrap.verify.files import verify_files
from qwrap.verify.report import (
    FilesReport,
    LevelReport,
    OutputReport,
    SkippedTensor,
    TensorReport,
    VerifyReport,
)

__all__ = [
    "FilesReport",
    "LevelReport",
    "OutputReport",
    "SkippedTensor",
    "TensorReport",
    "VerifyReport",
    "verify",
    "verify_files",
]
