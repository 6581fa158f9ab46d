"""Models and settings for onnxruntime's provider for Qualcomm's accelerators."""

from qwrap.ort.execution_providers.qnn.preparation import qnn_preprocess_model

__all__ = ["qnn_preprocess_model"]
