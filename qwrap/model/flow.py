"""If, Loop and Scan as Python's own ``if`` and ``for``, in the code of the graph around them.

Captured values are locals, gradients flow, and what sits on values inside works as outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from qwrap.graph.index import bodies, opset_of
from qwrap.model.border import dying, makes, reads
from qwrap.model.expressions import comment, literal
from qwrap.model.writer import Writer

WriteNode = Callable[[ir.Node], None]
BATCHED = 8  # the revision of Scan that runs over a batch of sequences


def write_flow(w: Writer, node: ir.Node, write_node: WriteNode) -> None:
    """Write a control-flow node and its bodies; ``write_node`` writes a node in a body."""
    if node.op_type == "If":
        _if(w, node, write_node)
    elif node.op_type == "Loop":
        _loop(w, node, write_node)
    elif opset_of(w.layout.graph.model, node.domain) == BATCHED:
        _scan_batch(w, node, write_node)
    else:
        _scan(w, node, write_node)


# --- bodies --------------------------------------------------------------------------------------


def _body(w: Writer, body: ir.Graph, write_node: WriteNode) -> None:
    """Write the nodes of a body, freeing what dies in it; its outputs stay."""
    layout = w.layout
    nodes = list(layout.values.live_nodes(body))
    made = {layout.graph.key(v) for v in body.inputs if v.name}
    made |= {key for inner in nodes for key in makes(inner, layout)}
    for value in body.inputs:
        if value.name and layout.graph.key(value) not in layout.values.hosts:
            w.finish_value(layout.graph.key(value))
    touched = (
        [k for k in (*reads(inner, layout), *makes(inner, layout)) if k in made] for inner in nodes
    )
    kept = [layout.graph.key(v) for v in body.outputs]
    dead = dying(touched, kept, layout)
    for i, inner in enumerate(nodes):
        write_node(inner)
        w.free(dead.get(i, ()))


def _free_outputs(w: Writer, body: ir.Graph, kept: Sequence[ir.Value] = ()) -> None:
    """Delete the outputs that a body made, once they were handed on; not those in ``kept``."""
    layout = w.layout
    mine = {key for inner in layout.values.live_nodes(body) for key in makes(inner, layout)}
    keep = {layout.graph.key(v) for v in kept if v.name}
    keys = dict.fromkeys(layout.graph.key(v) for v in body.outputs)
    w.free(k for k in keys if k in mine and k not in keep and not layout.values.is_known(k))


def _hand_over(w: Writer, targets: Sequence[ir.Value], values: Sequence[ir.Value]) -> None:
    """Assign ``values`` to those of ``targets`` that have a name."""
    pairs = [(t, v) for t, v in zip(targets, values, strict=True) if t.name]
    names = (w.local(w.layout.graph.key(t)) for t, _ in pairs)
    w.assign(names, (w.tensor(v) for _, v in pairs))


# --- If ------------------------------------------------------------------------------------------


def _if(w: Writer, node: ir.Node, write_node: WriteNode) -> None:
    (condition,) = node.inputs
    assert condition is not None
    key = w.layout.graph.node_key(node)
    branches = dict(bodies(node))
    taken = w.layout.values.taken.get(key)
    if taken is not None:
        _branch(w, node, branches[taken], write_node)
        return
    with w.block(f"if {w.scalar(condition, 'bool')}:{comment(key)}"):
        _branch(w, node, branches["then_branch"], write_node)
    with w.block("else:"):
        _branch(w, node, branches["else_branch"], write_node)


def _branch(w: Writer, node: ir.Node, body: ir.Graph, write_node: WriteNode) -> None:
    before = len(w.lines)
    _body(w, body, write_node)
    _hand_over(w, node.outputs, body.outputs)
    _free_outputs(w, body)
    if len(w.lines) == before:
        w.line("pass")


# --- Loop ----------------------------------------------------------------------------------------


def _loop(w: Writer, node: ir.Node, write_node: WriteNode) -> None:
    graph = w.layout.graph
    ((_, body),) = bodies(node)
    limit, start, *initial = [*node.inputs, None, None][: max(2, len(node.inputs))]
    iteration, condition, *carried = body.inputs
    again, *results = body.outputs
    size = len(carried)
    collected = list(zip(node.outputs[size:], results[size:], strict=True))
    running = graph.key(condition)
    check = not _always_true(w, start, condition, again)
    _hand_over(w, carried, [v for v in initial if v is not None])
    _open_lists(w, [target for target, _ in collected])
    if check:
        w.line(f"{w.local(running)} = {'True' if start is None else w.scalar(start, 'bool')}")
    elif graph.key(condition) in w.layout.values.hosts:
        w.line(f"{w.local(running)} = True")
    count = w.function(itertools.count) if limit is None else "range"
    steps = f"{count}({'' if limit is None else w.scalar(limit, 'int')})"
    with w.loop(f"for {w.local(graph.key(iteration))} in {steps}:", node):
        if check:
            with w.block(f"if not {w.local(running)}:"):
                w.line("break")
        _body(w, body, write_node)
        if check:
            w.line(f"{w.local(running)} = {w.scalar(again, 'bool')}")
        _collect(w, collected)
        _hand_over(w, carried, results[:size])
        _free_outputs(w, body)
    _hand_over(w, node.outputs[:size], carried)
    w.free(graph.key(v) for v in carried if v.name)
    for target, result in collected:
        _stack(w, target, result, 0, reverse=False)


def _always_true(w: Writer, start: ir.Value | None, condition: ir.Value, again: ir.Value) -> bool:
    """Whether only the trip count ends the loop."""

    def is_true(value: ir.Value) -> bool:
        known = w.layout.values.small_constant(value)
        return known is not None and bool(known.item())

    while (maker := again.producer()) is not None and maker.op_type == "Identity":
        assert maker.inputs[0] is not None
        again = maker.inputs[0]
    return (start is None or is_true(start)) and (again is condition or is_true(again))


def _open_lists(w: Writer, targets: Sequence[ir.Value]) -> None:
    for target in targets:
        if target.name:
            w.line(f"{w.local(w.layout.graph.key(target))} = []")


def _collect(w: Writer, collected: Sequence[tuple[ir.Value, ir.Value]], into: str = "") -> None:
    for target, result in collected:
        if target.name:
            w.line(f"{w.local(w.layout.graph.key(target))}{into}.append({w.tensor(result)})")


def _stack(w: Writer, target: ir.Value, result: ir.Value, axis: int, *, reverse: bool) -> None:
    """Write the tensor of all that was collected in the list of ``target``."""
    if not target.name:
        return
    name = w.local(w.layout.graph.key(target))
    shape = [n if isinstance(n, int) else 0 for n in w.layout.graph.type_of(result).shape or ()]
    w.needs_device = True
    items = f"{name}[::-1]" if reverse else name
    call = f"{w.function(stacked)}({items}, {axis}, {literal(shape)}, {w.dtype(result)}, device)"
    w.line(f"{name} = {call}")


def stacked(
    items: Sequence[Tensor],
    axis: int,
    shape: Sequence[int],
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    """Join the values of all iterations along a new axis; ``shape`` is that of one, if none ran."""
    if items:
        return torch.stack([*items], axis)
    empty = list(shape)
    empty.insert(axis if axis >= 0 else len(empty) + 1 + axis, 0)
    return torch.zeros(empty, dtype=dtype, device=device)


# --- Scan ----------------------------------------------------------------------------------------


class _Scan:
    """The attributes and parts of a Scan node."""

    def __init__(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
        ((_, self.body),) = bodies(node)
        attributes = node.attributes
        count = attributes["num_scan_inputs"].as_int()
        self.states = self.body.inputs[: len(inputs) - count]
        self.slices = self.body.inputs[len(inputs) - count :]
        self.initial = [v for v in inputs[: len(inputs) - count] if v is not None]
        self.sequences = [v for v in inputs[len(inputs) - count :] if v is not None]
        n = len(self.states)
        self.results = list(self.body.outputs[:n])
        self.finals = list(node.outputs[:n])
        self.collected = list(zip(node.outputs[n:], self.body.outputs[n:], strict=True))

        def listed(name: str, size: int) -> list[int]:
            attribute = attributes.get(name)
            return [0] * size if attribute is None else list(attribute.as_ints())

        old = "directions" if "directions" in attributes else "scan_input_directions"
        self.backwards = listed(old, count)
        self.axes = listed("scan_input_axes", count)
        self.out_axes = listed("scan_output_axes", len(self.collected))
        self.out_backwards = listed("scan_output_directions", len(self.collected))


def _scan(w: Writer, node: ir.Node, write_node: WriteNode) -> None:
    scan = _Scan(node, node.inputs)
    _hand_over(w, scan.states, scan.initial)
    _open_lists(w, [target for target, _ in scan.collected])
    sources = [
        f"{w.function(slices)}({w.tensor(x)}, {axis}, {bool(backwards)})"
        for x, axis, backwards in zip(scan.sequences, scan.axes, scan.backwards, strict=True)
    ]
    _scan_steps(w, node, scan, sources, write_node)
    _hand_over(w, scan.finals, scan.states)
    w.free(w.layout.graph.key(v) for v in scan.states if v.name)
    for (target, result), axis, backwards in zip(
        scan.collected, scan.out_axes, scan.out_backwards, strict=True
    ):
        _stack(w, target, result, axis, reverse=bool(backwards))


def _scan_steps(
    w: Writer,
    node: ir.Node,
    scan: _Scan,
    sources: Sequence[str],
    write_node: WriteNode,
    into: str = "",
) -> None:
    graph = w.layout.graph
    names = "".join(f"{w.local(graph.key(v))}, " if v.name else "_, " for v in scan.slices)
    with w.loop(f"for {names.strip()} in zip({', '.join(sources)}, strict=True):", node):
        _body(w, scan.body, write_node)
        _collect(w, scan.collected, into)
        _hand_over(w, scan.states, scan.results)
        _free_outputs(w, scan.body)


def slices(x: Tensor, axis: int, backwards: bool) -> Sequence[Tensor]:
    """Return ``x`` cut along ``axis``, the last slice first if ``backwards``."""
    parts = x.unbind(axis)
    return parts[::-1] if backwards else parts


def _scan_batch(w: Writer, node: ir.Node, write_node: WriteNode) -> None:
    """Write Scan-8: for each sample a scan over axis 1, as far as its sequence is long."""
    lengths, *inputs = node.inputs
    scan, key = _Scan(node, inputs), w.layout.graph.key
    finals = [w.local(key(v)) for v in scan.finals if v.name]
    collected = [w.local(key(v)) for v, _ in scan.collected if v.name]
    first, given = w.tensor(scan.sequences[0]), "None" if lengths is None else w.tensor(lengths)
    _open_lists(w, [*scan.finals, *(target for target, _ in scan.collected)])
    with w.loop(f"for sample, length in {w.function(samples)}({first}, {given}):", node):
        states = [w.local(key(v)) for v in scan.states]
        w.assign(states, (f"{w.tensor(v)}[sample]" for v in scan.initial))
        for name in collected:
            w.line(f"{name}.append([])")
        sources = [
            f"{w.function(slices)}({w.tensor(x)}[sample, :length], 0, {bool(backwards)})"
            for x, backwards in zip(scan.sequences, scan.backwards, strict=True)
        ]
        _scan_steps(w, node, scan, sources, write_node, into="[-1]")
        for state, target in zip(states, scan.finals, strict=True):
            if target.name:
                w.line(f"{w.local(key(target))}.append({state})")
    for name in finals:
        w.line(f"{name} = {w.function(padded)}({name})")
    for name in collected:
        w.line(f"{name} = {w.function(padded)}([{w.function(padded)}(s) for s in {name}], {first})")


def samples(x: Tensor, lengths: Tensor | None) -> Iterator[tuple[int, int]]:
    """Yield the index of each sample of ``x`` [batch, time, …] and how many steps it has."""
    steps = [x.shape[1]] * x.shape[0] if lengths is None else lengths.tolist()
    yield from enumerate(steps)


def padded(items: Sequence[Tensor], sequences: Tensor | None = None) -> Tensor:
    """Stack tensors; with ``sequences`` [batch, time, …], zeros fill up what is shorter in time."""
    if sequences is None:
        return torch.stack([*items])
    rows = torch.nn.utils.rnn.pad_sequence([*items], batch_first=True)
    missing = sequences.shape[1] - rows.shape[1]
    return torch.cat([rows, rows.new_zeros((len(rows), missing, *rows.shape[2:]))], 1)
