"""qwrap: quantize any ONNX model in PyTorch, exactly as onnxruntime will run it."""

from qwrap.config import QConfig, QuantSpec
from qwrap.errors import QwrapError
from qwrap.export.exporter import export
from qwrap.model.build import load
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.calibrate import calibrate, calibrating
from qwrap.quant.exact import exact
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import prepare

__all__ = [
    "QConfig",
    "QuantPlan",
    "QuantSpec",
    "QwrapError",
    "WrappedModel",
    "calibrate",
    "calibrating",
    "exact",
    "export",
    "load",
    "prepare",
]
