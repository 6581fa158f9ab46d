"""qwrap: quantize any ONNX model in PyTorch, exactly as onnxruntime will run it."""

from qwrap.algorithms.bias_correction import correct_biases
from qwrap.algorithms.gptq import round_weights
from qwrap.algorithms.smooth_quant import Smoothed, smooth_quant
from qwrap.config import QConfig, QuantSpec
from qwrap.dtypes import codebook_type, integer_type
from qwrap.errors import QwrapError, QwrapWarning
from qwrap.export.exporter import export
from qwrap.improve.guard import guard
from qwrap.improve.improve import improve
from qwrap.kv_cache import quantize_kv_cache
from qwrap.load import load
from qwrap.mixed.choices import Choice, Group
from qwrap.mixed.loss.ranking import Sensitivity
from qwrap.mixed.loss.sensitivity import sensitivity
from qwrap.mixed.search.budget import Budget
from qwrap.mixed.search.report import SearchResult
from qwrap.mixed.search.search import search
from qwrap.model.observation import observe
from qwrap.model.wrapped import WrappedModel
from qwrap.nbits.quantize_weights import quantize_weights
from qwrap.ops.extension import register_op
from qwrap.quant.calibrate import calibrate, calibrating
from qwrap.quant.exact import exact
from qwrap.quant.functions import function_type
from qwrap.quant.outcome import Outcome
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import prepare
from qwrap.quant.rescale import rescale
from qwrap.quant.statistics.statistics import Statistics
from qwrap.quant.tables import RangeTable, TensorRange
from qwrap.quantize import quantize
from qwrap.targets import Target
from qwrap.train.distill import Distillation
from qwrap.train.finetune import finetune
from qwrap.train.groups import param_groups
from qwrap.verify import verify

__all__ = [
    "Budget",
    "Choice",
    "Distillation",
    "Group",
    "Outcome",
    "QConfig",
    "QuantPlan",
    "QuantSpec",
    "QwrapError",
    "QwrapWarning",
    "RangeTable",
    "SearchResult",
    "Sensitivity",
    "Smoothed",
    "Statistics",
    "Target",
    "TensorRange",
    "WrappedModel",
    "calibrate",
    "calibrating",
    "codebook_type",
    "correct_biases",
    "exact",
    "export",
    "finetune",
    "function_type",
    "guard",
    "improve",
    "integer_type",
    "load",
    "observe",
    "param_groups",
    "prepare",
    "quantize",
    "quantize_kv_cache",
    "quantize_weights",
    "register_op",
    "rescale",
    "round_weights",
    "search",
    "sensitivity",
    "smooth_quant",
    "verify",
]
