"""What qwrap raises when the user's input, not qwrap, is wrong."""


class QwrapError(Exception):
    """Base of every error that qwrap raises on purpose."""


class QwrapWarning(UserWarning):
    """Base of every warning: something works, but perhaps not as the user thinks."""


class GradientWarning(QwrapWarning):
    """Gradients stop at nodes that onnxruntime computes."""


class ModelError(QwrapError):
    """The file or graph is not a model that qwrap can take."""


class UnsupportedOpError(ModelError):
    """The graph holds operators without an implementation; the message lists all of them."""


class InputError(QwrapError):
    """A batch does not fit the graph inputs, or holds values that cannot be used."""


class ConfigError(QwrapError):
    """A setting contradicts itself, the graph or the target."""


class NotCalibratedError(QwrapError):
    """A quantized tensor has no scale yet: no value has reached its observer."""


class StatisticsError(QwrapError):
    """A file of statistics is damaged, or what it holds was observed in another model."""


class ExportError(QwrapError):
    """The quantized file cannot be written as asked."""


class TableError(QwrapError):
    """A table of ranges is broken, or its form cannot hold what it is to say."""


class TrainingError(QwrapError):
    """Training ran into numbers that cannot be trained on."""
