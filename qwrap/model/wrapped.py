"""The root of the module tree: binds inputs, holds what sits on the points, switches programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qwrap.errors import InputError, ModelError
from qwrap.graph.index import OnnxGraph, ValueType
from qwrap.model import extra_state
from qwrap.model.block import Block, Elsewhere, hold
from qwrap.model.codegen import Code, generate
from qwrap.model.layout import Layout, Slot
from qwrap.model.points import Point, Program
from qwrap.model.scopes import Path, Region
from qwrap.model.settings import LoadSettings
from qwrap.model.signature import check_input
from qwrap.model.substitute import Substitute
from qwrap.model.tensors import WeightReader, converted

EMPTY: Mapping[str, Tensor] = MappingProxyType({})


class WrappedModel(Block):
    """An ONNX graph as a trainable module.

    Call it with graph inputs in order or by name; see ``forward``. Parameters keep the
    initialiser's name where that is a dotted path, else ``<scope>.<OpType>.weight|bias``;
    ``tensor_names`` maps ``state_dict`` keys to initialisers. Scopes of nodes are submodules. It
    can be copied, pickled and moved as any module.

    Attributes:
        graph: the model it was built from; never modified.
        loaded_opset: what that imported of ai.onnx at first; ``prepare`` may raise it.
        layout: where its tensors and nodes are in the module tree.
        programs: name -> makes the ``Program`` of that name ("exact" once prepared).
        plan: what ``prepare`` decided, None before.
        config: what it was asked for, None before.
        samples: what calibration kept of its data, None before; not part of a copy or pickle.
        kernels: node key -> what ``attach`` was given to compute it, unless a program runs.
        replaced: node key -> where its ``Substitute`` is, if it has one.
        remade: value key of what a ``Substitute`` makes -> which input of which node it is.
        origin: what knows the quantized file that it came from, None for others.
        before_loading: called with a ``state_dict`` before it is loaded; may attach other taps.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        settings: LoadSettings | None = None,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Build the module tree.

        Args:
            graph: what it computes.
            settings: how it is built; by default as ``load`` does.
            shared: value key -> parameter or buffer of another module, to be this one's too.
        """
        super().__init__()
        self.register_state_dict_post_hook(extra_state.pack)  # type: ignore[no-untyped-call]  # torch has no stub
        self.graph = graph
        self.loaded_opset = graph.opset
        self.programs: dict[str, Callable[[], Program]] = {}
        self.plan: object = None
        self.config: object = None
        self.samples: object = None
        self.origin: object = None
        self.before_loading: Callable[[WrappedModel, Mapping[str, Any]], None] | None = None
        self.attached: dict[Point, tuple[Path, str]] = {}
        self.kernels: dict[str, Callable[..., Any]] = {}
        self.replaced: dict[str, tuple[Path, str]] = {}
        self.remade: dict[str, tuple[str, int]] = {}
        self._program: Program | None = None
        self._written: dict[Path, Code] = {}  # what the Blocks run now
        self.layout = Layout(graph, settings or LoadSettings())
        self._build({}, shared or {})

    # --- structure -----------------------------------------------------------------------------

    @property
    def input_names(self) -> list[str]:
        """Graph inputs in order, those with an initialiser left out."""
        return [v.name or "" for v in self.graph.inputs]

    @property
    def output_names(self) -> list[str]:
        """Graph outputs in order."""
        return [v.name or "" for v in self.graph.outputs]

    @property
    def tensor_names(self) -> dict[str, str]:
        """``state_dict`` key -> name of the initialiser (or Constant output) it came from."""
        return {slot.key: key for key, slot in self.layout.slots.items()}

    def stored(self, value: str) -> Tensor | None:
        """Return the parameter or buffer that holds initialiser ``value``, None if none does."""
        slot = self.layout.slots.get(value)
        return None if slot is None else self._get(slot)

    @torch.no_grad()
    def deployed(self, value: str) -> Tensor | None:
        """Return initialiser ``value`` as the graph would have it now, None if none is stored.

        It is what is ``stored``, or what a ``Substitute`` makes of that.
        """
        tensor, (key, index) = self.stored(value), self.remade.get(value, ("", 0))
        return self.substitute(key).made(index, tensor) if key and tensor is not None else tensor

    @torch.no_grad()
    def assign(self, value: str, tensor: Tensor) -> None:
        """Let ``deployed(value)`` be ``tensor``, in place, to rounding where a substitute is."""
        stored, (key, index) = self.stored(value), self.remade.get(value, ("", 0))
        if stored is None:
            raise ModelError(f"{value!r}: the model stores no such initialiser")
        stored.copy_(self.substitute(key).unmade(index, tensor) if key else tensor)

    def rewrite(self, graph: OnnxGraph, keep: Collection[str]) -> None:
        """Become the module of another graph, in place.

        The initialisers in ``keep`` stay the parameters they are; what sat on points is gone.
        """
        layout = Layout(graph, self.layout.settings)  # first of all, for it may refuse the graph
        slots = {key: slot for key, slot in self.layout.slots.items() if key in keep}
        self.become(layout, {key: self._get(slot) for key, slot in slots.items()})

    def become(self, layout: Layout, kept: Mapping[str, Tensor]) -> None:
        """Become the module of another layout, in place; what sat on points is gone.

        Args:
            layout: of the new graph.
            kept: initialiser -> the parameter or buffer that holds it; the others are read anew.
        """
        for name in [*self._modules, *self._parameters, *self._buffers]:
            delattr(self, name)
        self.graph, self.layout = layout.graph, layout
        self.attached, self._program, self.programs, self._written = {}, None, {}, {}
        self.kernels, self.replaced, self.remade = {}, {}, {}
        self.plan = self.config = self.samples = self.origin = self.before_loading = None
        self._build(kept)

    def _get(self, slot: Slot) -> Tensor:
        tensor = getattr(self.get_submodule(".".join(slot.path)), slot.name)
        assert isinstance(tensor, Tensor)
        return tensor

    def _build(self, kept: Mapping[str, Tensor], shared: Mapping[str, Tensor] = EMPTY) -> None:
        self._signature = [(v.name or "", self.graph.type_of(v)) for v in self.graph.inputs]
        self._add_blocks(self.layout.region)
        reader = WeightReader()
        for key, slot in self.layout.slots.items():
            if key in shared:
                _register(self._module_at(slot.path), slot.name, shared[key])
                continue
            tensor = kept.get(key)
            if tensor is None:
                tensor = self._computed(reader.read(self.layout.values.stored[key]))
            parent = self._module_at(slot.path)
            if not slot.trainable:
                parent.register_buffer(slot.name, tensor.detach())
            elif isinstance(tensor, nn.Parameter):
                parent.register_parameter(slot.name, tensor)
            else:
                parent.register_parameter(slot.name, nn.Parameter(tensor))
        self.train(self.training)  # new Blocks too
        self._generate()

    def _computed(self, tensor: Tensor) -> Tensor:
        """Return a float32 tensor in the type that the model computes in."""
        dtype = self.layout.settings.dtype
        if dtype is None or tensor.dtype != torch.float32:
            return tensor
        return converted(tensor, dtype)

    def _add_blocks(self, region: Region) -> None:
        for item in region.items:
            if isinstance(item, Region):
                parent = self._module_at(item.path[:-1])
                if item.path[-1] not in parent._modules:
                    parent.add_module(item.path[-1], Block(item.path))
                self._add_blocks(item)

    def _module_at(self, path: Path) -> nn.Module:
        module: nn.Module = self
        for depth, part in enumerate(path, 1):
            if part not in module._modules:
                module.add_module(part, Block(path[:depth]))
            module = getattr(module, part)
        return module

    # --- points and programs ---------------------------------------------------------------------

    def attach(
        self,
        taps: Mapping[Point, nn.Module],
        kernels: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        """Put ``taps`` on points of the graph, in place; those there before are removed.

        Each becomes a submodule under ``taps`` of the Block that runs it. One that sits on several
        points is one submodule, of the first; its tensors are in the ``state_dict`` once.

        Args:
            taps: point -> module that is called with the tensor.
            kernels: node key -> called with the node's inputs instead of its operator.
        """
        homes = self.layout.points
        for point in taps:
            if point not in homes:
                raise ModelError(f"{point}: the graph has no such place")
        self._detach()
        held: dict[nn.Module, tuple[Path, str]] = {}
        for point, module in sorted(taps.items(), key=lambda item: str(item[0])):
            path = homes[point]
            if module not in held or held[module][0] != path:
                tap = Elsewhere(module) if module in held else module
                place = path, hold(self._module_at(path), "taps", point.text, tap)
                self.attached[point] = place
                held.setdefault(module, place)
            else:
                self.attached[point] = held[module]
        self.kernels = dict(kernels or {})
        self._generate()

    def _detach(self) -> None:
        for path in {path for path, _ in self.attached.values()}:
            del self._module_at(path)._modules["taps"]
        self.attached, self.kernels = {}, {}

    def tap(self, point: Point) -> nn.Module:
        """Return the module attached to ``point``."""
        path, name = self.attached[point]
        found = self.get_submodule(".".join((*path, "taps", name)))
        return found.module if isinstance(found, Elsewhere) else found

    def put_substitutes(self, substitutes: Mapping[str, Substitute]) -> None:
        """Let ``substitutes`` compute the nodes with these keys, in place, and none any others.

        What is stored for the inputs they make is not changed. Each becomes a submodule under
        ``substitutes`` of the Block that runs it.
        """
        for path in {path for path, _ in self.replaced.values()}:
            del self._module_at(path)._modules["substitutes"]
        self.replaced, self.remade = {}, {}
        for key, module in sorted(substitutes.items()):
            node = self.graph.nodes[key]
            path = self.layout.homes[node]
            self.replaced[key] = path, hold(self._module_at(path), "substitutes", key, module)
            for index in module.indices:
                value = node.inputs[index] if len(node.inputs) > index else None
                if value is not None:
                    self.remade[self.graph.key(value)] = key, index
        self._generate()

    def substitute(self, node: str) -> Substitute:
        """Return the substitute for a node that has one."""
        path, name = self.replaced[node]
        found = self.get_submodule(".".join((*path, "substitutes", name)))
        assert isinstance(found, Substitute)
        return found

    @contextmanager
    def running(self, program: str | Program) -> Iterator[None]:
        """Run another program inside the ``with`` block: one of ``programs``, or a new one."""
        if isinstance(program, str):
            if program not in self.programs:
                raise ModelError(f"the model has no program {program!r}; prepare and calibrate it")
            program = self.programs[program]()
        before, self._program = self._program, program
        layout, written = self.layout, dict(self._written)
        self._generate()
        try:
            yield
        finally:
            self._program = before
            self._generate(written if self.layout is layout else None)

    @contextmanager
    def watching(self, watchers: Mapping[str, Callable[[Tensor], object]]) -> Iterator[None]:
        """Call ``watchers[value]`` with that value, as its consumers see it, at every forward.

        Inside the ``with`` block; values of loop bodies are passed in every iteration.

        Raises:
            ModelError: a name is not among ``graph.values``.
        """
        unknown = sorted(set(watchers) - set(self.graph.values))
        if unknown:
            raise ModelError(f"no tensors {unknown} in the graph")
        current = self.program
        with self.running(Program(current.taps, current.kernels, {**current.watchers, **watchers})):
            yield

    @property
    def program(self) -> Program:
        """What a forward runs now: by default the operators, with all that was attached."""
        if self._program is not None:
            return self._program
        return Program({point: self.tap(point) for point in self.attached}, self.kernels)

    def _generate(self, known: Mapping[Path, Code] | None = None) -> None:
        """Let the Blocks run what is to run now; ``known`` code is used where it is that."""
        program = self.program
        names = {
            point: name
            for point, (_, name) in self.attached.items()
            if program.taps.get(point) is self.tap(point)
        }
        replaced = {key: (name, self.substitute(key)) for key, (_, name) in self.replaced.items()}
        for code in generate(self.layout, program, names, known or self._written, replaced):
            if self._written.get(code.path) is code:
                continue
            block = self._module_at(code.path)
            assert isinstance(block, Block)
            for name, tensor in code.buffers.items():
                if name not in block._buffers:
                    block.register_buffer(name, tensor.to(self._device()), persistent=False)
            block.set_code(code.source, code.namespace)
            self._written[code.path] = code

    def __getstate__(self) -> dict[str, Any]:
        # The Blocks keep what a copy needs, and nobody expects data in a saved model.
        return {**super().__getstate__(), "_written": {}, "samples": None}

    def _device(self) -> torch.device:
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        extra_state.unpack(state_dict, prefix)
        if self.before_loading is not None:
            own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
            self.before_loading(self, own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # --- running ---------------------------------------------------------------------------------

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Compute the graph outputs from graph inputs in order or by name.

        Args:
            *args: for each graph input a tensor of the graph's rank, in its element type or, if
                that is a float type, in another one; numpy arrays of text for strings, lists for
                sequences, None for an empty optional. Types that torch lacks travel in larger
                ones: 4- and 2-bit integers in int8 and uint8, float4 and float6 in float32.
            **kwargs: the same by the name of the input.

        Returns:
            The output, or a tuple of them in the order of the graph.

        Raises:
            InputError: an input is missing, unknown, or of another rank or kind of type.
        """
        tensors = self._bind(args, kwargs)
        given = (tensor.device for tensor in tensors if isinstance(tensor, Tensor))
        device = next(given, None) or self._device()
        return self._run(self, *tensors, device)

    def _bind(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> list[Tensor]:
        names = [name for name, _ in self._signature]
        if len(args) > len(names):
            raise InputError(f"got {len(args)} inputs; the graph has {len(names)}: {names}")
        given = dict(zip(names, args, strict=False))
        wrong = [name for name in kwargs if name not in names or name in given]
        missing = [name for name in names if name not in given and name not in kwargs]
        if wrong or missing:
            raise InputError(f"graph inputs are {names}; missing {missing}, unexpected {wrong}")
        given.update(kwargs)
        for name, expected in self._signature:
            check_input(name, given[name], expected)
        return [self._fitting(given[name], kind) for name, kind in self._signature]

    def _fitting(self, value: Any, expected: ValueType) -> Any:
        if self.layout.settings.dtype is None or expected.dtype != ir.DataType.FLOAT:
            return value
        if isinstance(value, list):
            return [self._fitting(item, expected) for item in value]
        return value.to(self.layout.settings.dtype) if isinstance(value, Tensor) else value


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let ``module`` have ``tensor`` itself as its parameter or buffer ``name``, in place."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)
