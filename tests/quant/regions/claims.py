"""What has to hold for any model in any mixture of types, read off the exported file."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import onnx
import onnxruntime
import torch
from fewest import Fewest, computed_floats
from onnx import helper
from random_models import RandomModel, random_config

import qwrap
from qwrap.quant.placement.target import ORT_CPU
from qwrap.quant.placement.weights_only import ROUNDED
from qwrap.quant.prepare import stubs


@dataclass
class Made:
    """A random model after calibration, and the file exported from it."""

    source: RandomModel
    config: qwrap.QConfig
    model: qwrap.WrappedModel
    path: Path
    unfused: bool = False

    @property
    def plan(self) -> qwrap.QuantPlan:
        assert isinstance(self.model.plan, qwrap.QuantPlan)
        return self.model.plan


def make(random: Random, folder: Path, count: int | None = None) -> Made | None:
    """Return a random model, quantized and exported; None where a region has no way to its end."""
    source = RandomModel(random, count or random.randrange(2, 13))
    config = random_config(random, source)
    model = qwrap.load(source.proto).eval()
    try:
        qwrap.prepare(model, config)
    except qwrap.QwrapError as error:
        assert "no way leads" in str(error)  # noqa: PT017
        return None
    qwrap.calibrate(model, list(source.batches()), progress=False)
    path = folder / "random.onnx"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        qwrap.export(model, path)
    unfused = any("opens the file only" in str(warning.message) for warning in told)
    return Made(source, config, model, path, unfused)


# --- the file ------------------------------------------------------------------------------------


def kind_of(node: onnx.NodeProto) -> str:
    return node.op_type if node.op_type in ("QuantizeLinear", "DequantizeLinear") else ""


class File:
    """The nodes of an exported file, those of bodies too; all names of its tensors differ."""

    def __init__(self, path: Path) -> None:
        self.proto = onnx.load(path)
        self.nodes = list(_walk(self.proto.graph))
        self.maker = {name: node for node in self.nodes for name in node.output if name}
        self.types = {i.name: i.data_type for g in _graphs(self.proto.graph) for i in g.initializer}

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if name in node.input]

    def type_of(self, node: onnx.NodeProto) -> str:
        """Return the type of the codes that a Q or DQ node writes or reads."""
        if len(node.input) > 2:
            kind = self.types[node.input[2]]
        elif kind_of(node) == "DequantizeLinear" and node.input[0] in self.maker:
            return self.type_of(self.maker[node.input[0]])
        elif kind_of(node) == "DequantizeLinear":
            kind = self.types[node.input[0]]
        else:
            kind = next(a.i for a in node.attribute if a.name == "output_dtype")
        return helper.tensor_dtype_to_string(kind).split(".")[1].lower()

    def read_as(self, name: str) -> str:
        """Return the type of the codes that a tensor was made of, empty if it is float."""
        node = self.maker.get(name)
        if node is not None and node.op_type == "Max" and node.name not in ("", None):
            node = self.maker.get(node.input[0], node)  # keeps operators apart from the pair
        return (
            self.type_of(node) if node is not None and kind_of(node) == "DequantizeLinear" else ""
        )

    def written_as(self, name: str) -> set[str]:
        """Return the types that a tensor is quantized to; "" for readers of the floats."""
        found = set()
        for node in self.readers(name):
            if node.op_type == "Max":
                found |= self.written_as(node.output[0])
            else:
                found.add(self.type_of(node) if kind_of(node) == "QuantizeLinear" else "")
        return found

    def conversions(self) -> set[tuple[str, str]]:
        """Return what is quantized once more in another type, each with that type."""
        found = set()
        for node in self.nodes:
            if kind_of(node) == "QuantizeLinear" and self.read_as(node.input[0]):
                base = self.maker[node.input[0]]
                assert self.type_of(base) != self.type_of(node), f"{node.name} converts to the same"
                found.add((base.input[0], self.type_of(node)))
        return found


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _walk(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for part in _graphs(graph):
        yield from part.node


# --- claims --------------------------------------------------------------------------------------


def types_agree(made: Made) -> None:
    """What a quantized node reads and writes is of its type, in the file."""
    file, plan, graph = File(made.path), made.plan, made.model.graph
    nodes = {node.name: node for node in file.nodes}
    for key, planned in plan.nodes.items():
        if not planned.dtype:
            continue
        node, origin = nodes[graph.nodes[key].name], graph.nodes[key]
        where = f"{key} {planned}"
        absorbed = planned.role == "absorbed"
        computed = [] if absorbed else list(computed_floats(made.model, key))
        for index in computed:
            assert file.read_as(node.input[index]) == planned.dtype, f"{where} input {index}"
        for index, value in enumerate(origin.inputs):
            constant = plan.constants.get((key, index))
            if constant is not None and value is not None and not _is_weight(node, index):
                assert file.read_as(node.input[index]) == planned.dtype, f"{where} input {index}"
        for output, value in zip(node.output, origin.outputs, strict=False):
            if not output or not graph.type_of(value).is_float:
                continue
            written = file.written_as(output)
            behind = [u.op_type for u in file.readers(output)]
            if any(u in ("Relu", "Clip") for u in behind) and len(behind) == 1 and written == {""}:
                key_behind = _key_of(made, file.readers(output)[0].name)
                if plan.nodes[key_behind].role == "absorbed":
                    continue
            is_float = planned.role in ("integer", "pairs") and node.op_type in ORT_CPU.float_output
            unread = planned.role == "moves" and graph.key(value) not in plan.tensors
            if (is_float and planned.dtype not in written) or unread:
                assert graph.key(value) not in plan.tensors, where
                continue
            assert written == {planned.dtype}, f"{where} output {output}: {written}"


def _key_of(made: Made, name: str) -> str:
    return next(k for k, n in made.model.graph.nodes.items() if n.name == name)


def _is_weight(node: onnx.NodeProto, index: int) -> bool:
    return index == 1 and node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")


def is_opened(made: Made) -> None:
    """onnxruntime takes the file and runs it, whatever it optimises."""
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        if made.unfused:  # export said so
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        opened = onnxruntime.InferenceSession(made.path, options)
        for batch in made.source.batches():
            opened.run(None, batch)


def conversions_are_fewest(made: Made) -> None:
    """No choice of types for what only moves values needs fewer conversions than the file has."""
    assert len(File(made.path).conversions()) == Fewest(made.model, made.config).count()


def simulations_agree(made: Made) -> None:
    """Both simulations compute what onnxruntime does, each in its mode."""
    batches = list(made.source.batches())
    report = qwrap.verify(made.model, made.path, batches, isolated=True, progress=False)
    rounded = ROUNDED in made.plan.notes
    for level in (report.specification, *([] if rounded else [report.deployed])):
        for tensor in level.tensors:
            where = f"{level.name} {tensor}"
            share = _share(tensor.dtype)
            # What is inside of bodies is not isolated: there a difference travels on.
            assert tensor.worst_step <= 1 or made.source.has_bodies, where
            assert tensor.differing <= max(2, share * tensor.elements), where
        for output in level.outputs:
            assert output.sqnr > LEAST_SQNR, f"{level.name} {output}"
    if made.plan.fused and _all_have_kernels(made):
        assert report.deployed.differing == 0, str(report)


def _share(dtype: str) -> float:
    """Return what share of the codes of a type may differ, by a step, for float rounding alone.

    Float operators differ by 1.8e-7 of a value, which is 0.01 steps of 16 bits: one code in fifty
    is so near to a tie. Averages of codes of 4 bits are often ties themselves.
    """
    return 0.06 if "16" in dtype else 0.01 if "4" in dtype else 0.0


LEAST_SQNR = 60  # dB of a float output: a step of 8 bits in one element of a few hundred


def _all_have_kernels(made: Made) -> bool:
    roles = {node.role for node in made.plan.nodes.values() if node.dtype}
    kinds = {node.dtype for node in made.plan.nodes.values() if node.dtype}
    constants = {str(c.spec.dtype) for c in made.plan.constants.values()}
    return "pairs" not in roles and kinds | constants <= {"uint8", "int8"}


def comes_back(made: Made) -> None:
    """A file that is read and written again is the same, byte for byte."""
    back = made.path.with_suffix(".back.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qwrap.export(qwrap.load(made.path).eval(), back)
    assert back.read_bytes() == made.path.read_bytes()


def gradients_arrive(made: Made) -> None:
    """A backward pass reaches whatever training can move."""
    model = made.model.train()
    if not any(p.requires_grad for p in model.parameters()):
        return
    model.zero_grad()
    for batch in made.source.batches():
        outputs = model(**{name: torch.from_numpy(array) for name, array in batch.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(output.square().sum() for output in outputs)
        if loss.requires_grad:  # not so in a branch that has nothing to learn
            loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    learning = {str(s.training_by) for _, s in stubs(model) if s.trained()}
    assert learning <= {"lsq"}
    model.eval()


def state_is_restored(made: Made) -> None:
    """What was saved gives another model of the same settings the same outputs."""
    other = qwrap.load(made.source.proto).eval()
    qwrap.prepare(other, made.config)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    other.load_state_dict(made.model.state_dict())
    for batch in made.source.batches():
        inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
        with torch.no_grad():
            expected, found = made.model(**inputs), other(**inputs)
        pairs = (
            zip(expected, found, strict=True) if isinstance(found, tuple) else [(expected, found)]
        )
        assert all(torch.equal(a, b) for a, b in pairs)
