"""From the graph of a quantized file to a prepared model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator

import onnx_ir as ir
import torch

from qwrap.config import QConfig
from qwrap.errors import ConfigError
from qwrap.export.functions import DOMAIN
from qwrap.export.write_back import Origin, Part
from qwrap.graph.constants import label
from qwrap.graph.index import OnnxGraph, ValueType, bodies, walk_nodes
from qwrap.importing.biases import take_biases
from qwrap.importing.calls import is_call
from qwrap.importing.chains import find_chains
from qwrap.importing.clamps import restore_clamps
from qwrap.importing.plan import FilePlan
from qwrap.importing.propagate import propagate
from qwrap.importing.reading import Reading, Source, UnreadableError, is_quantizer
from qwrap.importing.strip import Stripper
from qwrap.importing.stripped import Stripped
from qwrap.model.layout import Layout
from qwrap.model.points import Point, UsePoint, ValuePoint
from qwrap.model.settings import LoadSettings
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.placement.forms import DEQUANTIZE, QUANTIZE
from qwrap.quant.placement.overrides import apply_overrides, has_range, qparams_of
from qwrap.quant.placement.trainable import choose_training
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import install, set_mode, stub_at
from qwrap.quant.scales import limit_of


def import_quantized(
    graph: OnnxGraph,
    settings: LoadSettings,
    config: QConfig | None = None,
    notes: Iterable[str] = (),
) -> WrappedModel | None:
    """Return a prepared model that simulates a quantized file, None if it quantizes nothing.

    The pairs of the file become stubs with their scales, and its codes become floats. What cannot
    become a stub stays a node, and a note of the plan says why.

    Args:
        graph: of the file.
        settings: what to load it with.
        config: how scales are trained and found anew; types and placement are those of the file.
        notes: for the plan, beside those on what was found here.

    Raises:
        UnreadableError: a call of a function that is left in the graph cannot become a stub.
        ConfigError: it is to compute in another type than float32, or a selector of ``config``
            fits nothing.
    """
    if not any(map(_is_of_interest, walk_nodes(graph.model.graph))):
        return None
    draft = graph.model.clone()
    twins = Twins(graph, draft)
    found = find_chains(draft, twins.types)
    if found.calls:
        raise UnreadableError("; ".join(found.calls))
    if not (found.computed or found.floats or found.stored):
        return None
    if settings.dtype not in (None, torch.float32):
        raise ConfigError(
            f"dtype={settings.dtype}: the scales of a quantized file are those of the types it "
            "says; load it without dtype, or with quantized='nodes'"
        )
    stripper = Stripper(draft, found)
    stripped = stripper.strip()
    propagate(stripped, draft)
    restored = restore_clamps(draft, stripped)
    take_biases(stripper)
    stripper.clean_up()
    if draft.functions:
        draft.functions.clear()
        draft.graph.opset_imports.pop(DOMAIN, None)
    floats = OnnxGraph(draft, graph.source)
    model = WrappedModel(floats, settings)
    _leave_out_unseen(stripped, model.layout, found.notes)
    file = FilePlan(model.layout, stripped, [*notes, *found.notes])
    file.plan.changes += restored
    config = _config(file.plan, config)
    apply_overrides(file.plan, model.layout, config)
    choose_training(file.plan, floats, config)
    install(model, file.plan, config)
    _set_scales(model, stripped, file)
    set_mode(model, "quantize")
    model.origin = Origin(
        graph=graph,
        parts=tuple(_parts(floats, stripped, file, twins)),
        kept=dict(_kept(floats, twins)),
    )
    return model


def _is_of_interest(node: ir.Node) -> bool:
    return any(is_quantizer(node, kind) for kind in (QUANTIZE, DEQUANTIZE)) or is_call(node)


class Twins:
    """What the nodes and values of a clone were before.

    Attributes:
        types: what is known of the values of the clone.
    """

    def __init__(self, graph: OnnxGraph, clone: ir.Model) -> None:
        self.graph = graph
        self._nodes: dict[ir.Node, ir.Node] = {}
        self._values: dict[ir.Value, ir.Value] = {}
        self._match(clone.graph, graph.model.graph)
        self.types: dict[ir.Value, ValueType] = {
            value: graph.type_of(original) for value, original in self._values.items()
        }

    def _match(self, clone: ir.Graph, original: ir.Graph) -> None:
        self._values |= zip(_made(clone), _made(original), strict=True)
        for node, twin in zip(clone, original, strict=True):
            self._nodes[node] = twin
            for (_, body), (_, other) in zip(bodies(node), bodies(twin), strict=True):
                self._match(body, other)

    def node_key(self, node: ir.Node) -> str:
        """Return the key in the file of a node of the clone."""
        return self.graph.node_key(self._nodes[node])

    def key(self, value: ir.Value) -> str | None:
        """Return the key in the file of a value of the clone, None if it is new."""
        original = self._values.get(value)
        return None if original is None else self.graph.key(original)


def _made(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from (value for value in graph.initializers.values() if not value.is_graph_input())
    for node in graph:
        yield from (value for value in node.outputs if value.name)


def _leave_out_unseen(stripped: Stripped, layout: Layout, notes: list[str]) -> None:
    """Forget, in place, what sits where no tensor passes: in branches that never run."""
    graph = layout.graph
    unseen = [t for v, t in stripped.taps.items() if ValuePoint(graph.key(v)) not in layout.points]
    for tap in unseen:
        del stripped.taps[tap.value]
    points = {use: UsePoint(graph.node_key(use[0]), use[1]) for use in stripped.converted}
    for use in [use for use, point in points.items() if point not in layout.points]:
        conversion = stripped.converted.pop(use)
        if layout.is_host_use(*use):
            notes.append(
                f"{label(use[0])} reads {conversion.value.name!r} as numbers: they are those of "
                "the tensor, not of what the file converts it to"
            )
    unseen += [t for t in stripped.conversions if not t.outputs and not stripped.uses_of(t)]
    stripped.conversions = [tap for tap in stripped.conversions if tap not in unseen]
    stripped.moved = {v: tap for v, tap in stripped.moved.items() if tap not in unseen}
    for uses in (stripped.constants, stripped.biases):
        points = {use: UsePoint(graph.node_key(use[0]), use[1]) for use in uses}
        for use in [use for use, point in points.items() if point not in layout.points]:
            del uses[use]


def _config(plan: QuantPlan, config: QConfig | None) -> QConfig:
    """Return the settings of a model that has the types of its file."""
    result = copy.deepcopy(config) if config else QConfig()
    activations = [tensor.spec for tensor in plan.sources().values()]
    weights = [constant.spec for constant in plan.constants.values()]
    result.activation = activations[0] if activations else None
    if weights:
        result.weight, result.per_channel = weights[0], weights[0].axis is not None
    return result


def _set_scales(model: WrappedModel, stripped: Stripped, file: FilePlan) -> None:
    """Give every stub the scale of the file, or what the user says instead, in place."""
    scales = file.plan.scales()
    for tap, key in file.keys.items():
        stub, override = stub_at(model, file.plan.point_of(key)), scales[key].override
        qparams = tap.reading.qparams
        if override is not None and has_range(override):
            qparams = qparams_of(key, override, stub.spec)
        is_base = key in file.plan.tensors
        stub.set_qparams(qparams, limit_of(model, key, qparams) if is_base else math.inf)
    for (node, index), stored in stripped.constants.items():
        point = UsePoint(model.graph.node_key(node), index)
        stub_at(model, point).set_qparams(stored.reading.qparams)


# --- the way back --------------------------------------------------------------------------------


def _parts(graph: OnnxGraph, stripped: Stripped, file: FilePlan, twins: Twins) -> Iterator[Part]:
    """Yield what the stubs know of the file."""
    for tap, key in file.keys.items():
        yield from _of_readings(file.plan.point_of(key), tap.readings, twins)
    done = set()
    for (node, index), stored in stripped.constants.items():
        if stored not in done:
            done.add(stored)
            point = UsePoint(graph.node_key(node), index)
            yield from _of_readings(point, stored.readings, twins)
            yield from _of_codes(point, stored.codes, graph.key(stored.value), twins)
    for (node, index), (stored, _, _) in stripped.biases.items():
        point = UsePoint(graph.node_key(node), index)
        yield from _of_readings(point, stored.readings, twins)
        yield from _of_codes(point, stored.codes, graph.key(stored.value), twins)


def _of_readings(
    point: Point, readings: Iterator[Reading] | list[Reading], twins: Twins
) -> Iterator[Part]:
    for reading in readings:
        for source in reading.sources:
            yield _part(point, source, twins)


def _of_codes(point: Point, codes: list[Source], value: str, twins: Twins) -> Iterator[Part]:
    for source in codes:
        yield _part(point, source, twins, value)


def _part(point: Point, source: Source, twins: Twins, value: str | None = None) -> Part:
    return Part(
        kind=source.kind,
        point=point,
        node=twins.node_key(source.node),
        index=source.index,
        key=None if source.value is None else twins.key(source.value),
        value=value,
    )


def _kept(graph: OnnxGraph, twins: Twins) -> Iterator[tuple[str, str]]:
    """Yield the key of each constant that the file has too, with its key there."""
    for key, value in graph.values.items():
        original = twins.key(value)
        if original is not None and (value.is_initializer() or _is_constant(value)):
            yield key, original


def _is_constant(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Constant"
