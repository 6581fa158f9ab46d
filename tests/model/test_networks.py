"""Well-known networks from both exporters: same numbers, same gradients, modules like any other.

The networks are small, with random weights, and have every kind of layer of the real ones.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from networks import NETWORKS, Network, export
from networks.catalogue import Inputs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qwrap.model import Block, WrappedModel, load

CASES = [(name, exporter) for name in NETWORKS for exporter in ("torchscript", "dynamo")]
every_case = pytest.mark.parametrize(("name", "exporter"), CASES)
# Largest difference over largest value. Both sides sum float32 products in an order of their own:
# some 1e-7 a layer, through the ten or twenty layers of these networks, and back for gradients.
TOLERANCE = 3e-6
GRADIENT_TOLERANCE = 2e-5


@dataclass
class Case:
    """A network, its exported file, and inputs of two sizes."""

    network: Network
    native: nn.Module
    path: Path
    inputs: list[Inputs]

    def load(self) -> WrappedModel:
        return load(self.path).eval()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    """``case(name, exporter)``; every file is exported once."""
    made: dict[tuple[str, str], Case] = {}

    def make(name: str, exporter: str) -> Case:
        if (name, exporter) not in made:
            network = NETWORKS[name]
            native = network.make(small=True)
            first, second = network.small_sizes
            # Batches unlike any other size: compilers take equal sizes to be the same one.
            inputs = [network.sample(native, 7, first, 1), network.sample(native, 5, second, 2)]
            path = tmp_path_factory.mktemp("networks") / f"{name}_{exporter}.onnx"
            export(network, native, inputs[0], path, exporter)
            made[name, exporter] = Case(network, native, path, inputs)
        return made[name, exporter]

    return make


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def loss_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A weighted sum of all outputs, so that each element pulls another way."""
    generator = torch.Generator().manual_seed(3)
    parts = [(t * torch.randn(t.shape, generator=generator)).mean() for t in outputs(result)]
    return torch.stack(parts).sum()


def assert_close(mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert mine.shape == theirs.shape
    assert float((mine - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


Case_ = Callable[[str, str], Case]
Run = Callable[..., list[np.ndarray]]


@every_case
def test_output_equals_onnxruntime_at_two_sizes(
    name: str, exporter: str, case: Case_, run_ort: Run, run_qwrap: Run
) -> None:
    this = case(name, exporter)
    model = this.load()
    for inputs in this.inputs:
        feed = {key: tensor.numpy() for key, tensor in inputs.items()}
        for mine, theirs in zip(run_qwrap(model, feed), run_ort(str(this.path), feed), strict=True):
            assert_close(torch.from_numpy(mine), torch.from_numpy(theirs), TOLERANCE)


def folded(native: nn.Module) -> nn.Module:
    """A copy with each normalisation in the convolution before it, as exporters write it."""
    module = copy.deepcopy(native)
    before, convolution = "", None
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            module.set_submodule(before, fuse_conv_bn_eval(convolution, layer))
            module.set_submodule(name, nn.Identity())
        before, convolution = name, layer
    return module.requires_grad_()


def pairs(model: WrappedModel, native: nn.Module) -> Iterator[tuple[nn.Parameter, bool, Tensor]]:
    """Yield each parameter of ``native`` behind the one in ``model`` that holds it.

    Exporters rename weights, and transpose some (the flag); the values tell which is which.
    """
    for name, theirs in native.named_parameters():
        found = [(p, False) for p in model.parameters() if _equal(p, theirs)]
        if theirs.dim() == 2:
            found += [(p, True) for p in model.parameters() if _equal(p, theirs.t())]
        assert len(found) == 1, f"{len(found)} parameters hold {name}"
        yield (*found[0], theirs)


def _equal(a: Tensor, b: Tensor) -> bool:
    # Folding batch normalisation rounds once more.
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@every_case
def test_a_training_step_is_that_of_the_network(name: str, exporter: str, case: Case_) -> None:
    this = case(name, exporter)
    model, native = this.load(), folded(this.native)
    first, second = (list(inputs.values()) for inputs in this.inputs)
    for module in (model, native):
        loss_of(module(*first)).backward()
    # Some gradients are zero but for rounding, as that of the bias of keys: softmax ignores it.
    largest = max(float(p.grad.abs().max()) for p in native.parameters() if p.grad is not None)
    same = list(pairs(model, native))
    for mine, is_transposed, theirs in same:
        assert mine.grad is not None
        assert theirs.grad is not None
        gradient = mine.grad.t() if is_transposed else mine.grad
        assert float((gradient - theirs.grad).abs().max()) <= GRADIENT_TOLERANCE * largest
    # The frequencies of rotary positions are parameters of the model: the file does not tell.
    torch.optim.SGD([mine for mine, _, _ in same], lr=0.1).step()
    torch.optim.SGD(native.parameters(), lr=0.1).step()
    with torch.no_grad():
        for a, b in zip(outputs(model(*second)), outputs(native(*second)), strict=True):
            assert_close(a, b, GRADIENT_TOLERANCE)


@every_case
def test_one_compiled_graph_serves_all_sizes(name: str, exporter: str, case: Case_) -> None:
    this = case(name, exporter)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = this.load()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for inputs in this.inputs:
            for key, tensor in inputs.items():
                fixed = set(range(tensor.dim())) - set(this.network.axes(key))
                torch._dynamo.mark_static(tensor, sorted(fixed))
            for a, b in zip(outputs(compiled(**inputs)), outputs(model(**inputs)), strict=True):
                assert torch.equal(a, b)
    assert counter.frame_count == 1


@every_case
def test_an_exported_program_serves_all_sizes(name: str, exporter: str, case: Case_) -> None:
    this = case(name, exporter)
    model, first = this.load(), this.inputs[0]
    varying = [dict.fromkeys(this.network.axes(key), torch.export.Dim.AUTO) for key in first]
    with torch.no_grad():
        program = torch.export.export(
            model, tuple(first.values()), dynamic_shapes=(tuple(varying),)
        ).module()
        for inputs in this.inputs:
            got = program(*inputs.values())
            for a, b in zip(outputs(got), outputs(model(**inputs)), strict=True):
                assert torch.equal(a, b)


@every_case
def test_a_copy_and_a_pickle_compute_the_same(name: str, exporter: str, case: Case_) -> None:
    this = case(name, exporter)
    model, fresh = this.load(), this.load()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    fresh.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        expected = outputs(model(**this.inputs[0]))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
            for a, b in zip(outputs(other(**this.inputs[0])), expected, strict=True):
                assert torch.equal(a, b)


@every_case
@pytest.mark.parametrize("how", ["load", "autocast"])
def test_bfloat16_is_close(name: str, exporter: str, how: str, case: Case_) -> None:
    this = case(name, exporter)
    model = load(this.path, dtype=torch.bfloat16 if how == "load" else None).eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            mine = outputs(model(**this.inputs[0]))
        theirs = outputs(this.native(*this.inputs[0].values()))
    for a, b in zip(mine, theirs, strict=True):
        # Eight bits: half a percent a layer. The network itself in bfloat16 is off by 0.015.
        assert_close(a.float(), b, 0.03)


BLOCKS = {
    "resnet18": ("layer1.0", "layer1.0.conv1", "layer2.0.downsample"),
    "resnet50": ("layer1.0", "layer1.0.conv1", "layer2.0.downsample"),
    "mobilenet_v2": ("features.1.conv", "features.2.conv.1", "classifier.1"),
    "efficientnet_b0": ("features.1.0.block.1", "features.2.1.block", "classifier.1"),
    "vit_b_16": ("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_0.mlp"),
    "bert_base": ("encoder.layer.1", "encoder.layer.0.attention.self.query", "pooler.dense"),
    "llama": ("layers.1", "layers.0.self_attn", "layers.1.mlp.gate_proj"),
}


@every_case
def test_modules_have_the_paths_of_the_network(name: str, exporter: str, case: Case_) -> None:
    this = case(name, exporter)
    model = this.load()
    for path in BLOCKS[name]:
        block = model.get_submodule(path)
        assert isinstance(block, Block)
        assert block.source, path
        assert any(True for _ in block.parameters()), path


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """All ranks of a group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def layers(model: WrappedModel, name: str) -> nn.Module:
    """The module whose children are the layers, or the blocks of the first stage."""
    return model.get_submodule(BLOCKS[name][0].rpartition(".")[0])


def gradients(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    loss_of(model(**inputs)).backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


@every_case
def test_a_layer_computed_again_for_its_gradient_gives_the_same(
    name: str, exporter: str, case: Case_
) -> None:
    this = case(name, exporter)
    model, again = this.load(), this.load()
    parent = layers(again, name)
    for key, layer in list(parent.named_children()):
        parent.register_module(key, checkpoint_wrapper(layer))
    pairs = zip(gradients(again, this.inputs[0]), gradients(model, this.inputs[0]), strict=True)
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)


@every_case
def test_layers_can_be_sharded_one_by_one(
    name: str, exporter: str, case: Case_, mesh: DeviceMesh
) -> None:
    this = case(name, exporter)
    model, sharded = this.load(), this.load()
    for layer in layers(sharded, name).children():
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    mine, theirs = gradients(sharded, this.inputs[0]), gradients(model, this.inputs[0])
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b, GRADIENT_TOLERANCE)
