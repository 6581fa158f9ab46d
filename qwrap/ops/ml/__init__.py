"""Operators of the domain ai.onnx.ml: what classical machine learning exports."""

from qwrap.ops.ml import features, labels, linear, svm, tree_classifier, tree_ensemble

__all__ = ["features", "labels", "linear", "svm", "tree_classifier", "tree_ensemble"]
