"""The two ONNX exporters of torch, called as their users call them."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from networks.catalogue import Inputs, Network


def export(network: Network, module: nn.Module, inputs: Inputs, path: Path, exporter: str) -> None:
    """Write ``module`` to ``path``; ``exporter`` is one of ``EXPORTERS``."""
    with quiet():  # under no_grad nn.MultiheadAttention would run what ONNX cannot express
        EXPORTERS[exporter](network, module, inputs, path)


def _torchscript(network: Network, module: nn.Module, inputs: Inputs, path: Path) -> None:
    torch.onnx.export(
        module,
        tuple(inputs.values()),
        path,
        input_names=list(inputs),
        dynamic_axes={name: dict(network.axes(name)) for name in inputs},
        opset_version=17,
        dynamo=False,
    )


def _dynamo(opset: int) -> Callable[[Network, nn.Module, Inputs, Path], None]:
    def run(network: Network, module: nn.Module, inputs: Inputs, path: Path) -> None:
        sizes: dict[str, torch.export.Dim] = {}
        axes = []
        for name in inputs:
            named = network.axes(name)
            axes.append({
                axis: sizes.setdefault(size, torch.export.Dim(size)) for axis, size in named.items()
            })
        shapes = (axes[0], tuple(axes[1:])) if "past" in network.dynamic else tuple(axes)
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            dynamic_shapes=shapes,
            opset_version=opset,
            dynamo=True,
            external_data=False,
            verbose=False,
        )

    return run


EXPORTERS: dict[str, Callable[[Network, nn.Module, Inputs, Path], None]] = {
    "torchscript": _torchscript,
    "dynamo": _dynamo(20),
    "dynamo23": _dynamo(23),  # has Attention, RMSNormalization and RotaryEmbedding
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what exporters say of themselves, not of the network."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
