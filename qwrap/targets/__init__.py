"""What runtimes can run, as data: which operators, in which types, with which scales."""

from qwrap.targets.find import TARGETS, find_target
from qwrap.targets.onnxruntime import ORT_CPU
from qwrap.targets.openvino import OPENVINO
from qwrap.targets.qnn import QNN
from qwrap.targets.target import Kernel, Scope, Target
from qwrap.targets.tensorrt import TENSORRT
from qwrap.targets.vitisai import VITISAI

__all__ = [
    "OPENVINO",
    "ORT_CPU",
    "QNN",
    "TARGETS",
    "TENSORRT",
    "VITISAI",
    "Kernel",
    "Scope",
    "Target",
    "find_target",
]
