"""Models and settings for onnxruntime's provider for Qualcomm's accelerators."""

from qwrap.ort.execution_providers.qnn.preparation import qnn_preprocess_model
from qwrap.ort.execution_providers.qnn.quant_config import get_qnn_qdq_config

__all__ = ["get_qnn_qdq_config", "qnn_preprocess_model"]
