"""Networks with batch normalizations, in torch and as ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import qwrap

LIVE = {"scope": "kernels", "bn": "live"}


class Layers(nn.Module):
    """Layer after layer, each with a batch normalization, then what pools and a linear one."""

    def __init__(self, *layers: nn.Module, features: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        counts = [_outputs(layer) for layer in layers]
        self.norms = nn.ModuleList(_norm(layer, n) for layer, n in zip(layers, counts, strict=True))
        self.head = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu()
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


def _outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _norm(layer: nn.Module, count: int) -> nn.Module:
    norm = (nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d)(count)
    generator = torch.Generator().manual_seed(count)
    with torch.no_grad():  # of both signs
        norm.weight.copy_(torch.randn(count, generator=generator))
        norm.bias.copy_(torch.randn(count, generator=generator))
    return norm


def conv_net() -> Layers:
    """Plain, depthwise, grouped and transposed convolutions, with and without a bias."""
    return Layers(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2, bias=False),
        nn.ConvTranspose2d(8, 6, 3, padding=1),
    )


def seeded(make: Callable[[], Layers], shape: tuple[int, ...] = (8, 3, 8, 8)) -> Layers:
    """A network whose running statistics have seen something."""
    torch.manual_seed(0)
    net = make().train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(shape))
    return net


def to_onnx(net: Layers) -> onnx.ModelProto:
    """The network with its normalizations as nodes; node ``/c2`` is ``net.layers[2]``."""
    weights = {k: v.numpy() for k, v in net.state_dict().items() if "batches" not in k}
    nodes, x = [], "x"
    for i, (layer, norm) in enumerate(zip(net.layers, net.norms, strict=True)):
        names = [f"layers.{i}.weight", f"layers.{i}.bias"][: 1 + (layer.bias is not None)]
        settings = _settings(layer)
        nodes.append(helper.make_node(KINDS[type(layer)], [x, *names], [f"c{i}"], **settings))
        parts = [f"norms.{i}.{p}" for p in ("weight", "bias", "running_mean", "running_var")]
        settings = {"epsilon": norm.eps, "momentum": 1 - norm.momentum}
        nodes.append(
            helper.make_node("BatchNormalization", [f"c{i}", *parts], [f"n{i}"], **settings)
        )
        nodes.append(helper.make_node("Relu", [f"n{i}"], [f"r{i}"]))
        x = f"r{i}"
    flat = isinstance(net.layers[0], nn.Linear)
    if not flat:
        nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"]))
        nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
        x = "flat"
    nodes.append(helper.make_node("Gemm", [x, "head.weight", "head.bias"], ["y"], transB=1))
    for node in nodes:
        node.name = f"/{node.output[0]}"
    size = ["N", net.layers[0].in_features] if flat else ["N", 3, 8, 8]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])


KINDS = {nn.Conv2d: "Conv", nn.ConvTranspose2d: "ConvTranspose", nn.Linear: "Gemm"}


def _settings(layer: nn.Module) -> dict[str, object]:
    if isinstance(layer, nn.Linear):
        return {"transB": 1}
    return {"group": layer.groups, "strides": layer.stride, "pads": [*layer.padding] * 2}


def live(net: Layers, **settings: object) -> qwrap.WrappedModel:
    model = qwrap.load(to_onnx(net))
    qwrap.prepare(model, qwrap.QConfig(**{**LIVE, **settings}))
    return model


def batches(count: int = 4, shape: tuple[int, ...] = (8, 3, 8, 8), seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def calibrated(net: Layers, **settings: object) -> qwrap.WrappedModel:
    model = live(net, **settings)
    qwrap.calibrate(model, batches(), progress=False)
    return model


def trained(model: qwrap.WrappedModel, steps: int = 3) -> qwrap.WrappedModel:
    """The model after some steps with live statistics, back in evaluation mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x in batches(steps, seed=2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def linear_net() -> Layers:
    return Layers(nn.Linear(5, 8, bias=False), nn.Linear(8, 6))


NETS = {"convolutions": (conv_net, (8, 3, 8, 8)), "products": (linear_net, (8, 5))}


def same_output(a: nn.Module, b: nn.Module) -> bool:
    (x,) = batches(1, seed=11)
    return torch.equal(a.eval()(x), b.eval()(x)) and torch.equal(a.train()(x), b.train()(x))
