"""The targets that placement goes by."""

from qwrap.targets import ORT_CPU, Target

__all__ = ["ORT_CPU", "Target"]
