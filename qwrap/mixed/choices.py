"""What a search chooses between, and for which parts of a model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import onnx_ir as ir

from qwrap.config import FLOATS, QConfig, QuantSpec
from qwrap.dtypes import quant_type
from qwrap.errors import ConfigError
from qwrap.model.wrapped import WrappedModel
from qwrap.quant.placement.eligibility import Eligibility
from qwrap.quant.placement.regions import Types
from qwrap.quant.plan import QuantPlan
from qwrap.quant.prepare import config_of, plan_of, prepare
from qwrap.targets import Scope, Target, find_target

By = Literal["layer", "node", "block"]
Asked = str | QuantSpec
_JOINED = ("Concat",)  # what joins several branches belongs to none of them


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """Types that the nodes of a group may have.

    Attributes:
        activation: of the tensors between nodes, such as "uint8", "uint16", "float16", "float32".
        weight: of stored weights, such as "int8", "int4", "float32".
    """

    activation: str
    weight: str

    def __post_init__(self) -> None:
        for name in (self.activation, self.weight):
            if name not in FLOATS:
                quant_type(name)
        if "float16" in (self.activation, self.weight) and self.activation != self.weight:
            raise ConfigError(
                f"choice {self.activation}/{self.weight}: what computes in float16 has weights of "
                "float16, and nothing else has; choose float16/float16"
            )

    @property
    def is_float(self) -> bool:
        """Whether nothing is quantized."""
        return self.activation in FLOATS and self.weight in FLOATS

    def __str__(self) -> str:
        same = self.activation == self.weight and self.activation in FLOATS
        return self.activation if same else f"{self.activation}/{self.weight}"

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Return the choice that ``str`` writes as ``text``: "uint8/int8", or "float32".

        Raises:
            ConfigError: it is not of that form, or a type is unknown.
        """
        activation, _, weight = text.strip().partition("/")
        if not weight and activation not in FLOATS:
            raise ConfigError(
                f"choice {text!r}: give the types of activations and weights, as in 'uint8/int8'"
            )
        return cls(activation.strip(), weight.strip() or activation.strip())


FLOAT = Choice("float32", "float32")
CHOICES = (Choice("uint8", "int8"), Choice("uint16", "int8"), FLOAT)


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that share one choice.

    Attributes:
        name: of the group: that of its first node with a weight, else of its first node.
        nodes: keys of the nodes, in the order they run.
        choices: what there is to choose from.
    """

    name: str
    nodes: tuple[str, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor that is converted where its producer and a reader have unlike types.

    Attributes:
        tensor: key of the tensor.
        producer: name of the group that makes it, perhaps through nodes that only move values;
            None for a graph input and for what is made by a node in no group: in float32.
        consumers: names of the groups that read it, None among them for what reads float32.
        costs: (type of the producer, type of a reader) -> what the conversion costs, once for
            all readers of that type. What is missing costs nothing.
    """

    tensor: str
    producer: str | None
    consumers: tuple[str | None, ...]
    costs: Mapping[tuple[str, str], float]


Assignment = Mapping[str, Choice]
"""Name of a group to its choice."""


def groups_of(
    model: WrappedModel,
    config: QConfig | None = None,
    choices: Iterable[Choice] = CHOICES,
    by: By = "layer",
) -> list[Group]:
    """Return groups of nodes such that each node that can be quantized is in exactly one.

    Nodes that only move values are in none: they take the types of their neighbours. Nodes that
    read the same stored weight share a group.

    Args:
        model: a wrapped model; a copy is prepared.
        config: what else the model will be quantized with; what it excludes, and what a region of
            it speaks of, is in no group.
        choices: of each group with a stored weight, as far as ``config.target`` runs its operators
            in these types. Where there is none, choices that differ in the type of weights alone
            are the same, and the first of them stands for all.
        by: "layer": an operator with a stored weight, with what follows it up to the next such
            operator (activation functions, a residual Add, a pool), because it fuses with them or
            would cost a conversion apart from them; a Concat begins a group of its own. "node":
            each node, with the activation function that its kernel absorbs. "block": the part
            of the module tree up to its first number, as in ``encoder.layer.0``; layers outside
            any Block as in "layer".

    Raises:
        ConfigError: there is nothing to choose between or for, or ``by`` is none of these.
    """
    choices = tuple(dict.fromkeys(choices))
    if len(choices) < 2:
        raise ConfigError(f"choices={[str(c) for c in choices]}: give two or more to choose from")
    if by not in get_args(By):
        raise ConfigError(f"by={by!r}: choose one of {get_args(By)}")
    groups = _Grouping(all_quantized(model, config)).groups(choices, by)
    if not groups:
        raise ConfigError(
            "there is nothing to choose for: no node can be quantized that config does not exclude "
            "and no region of it speaks of; qwrap.prepare(model).summary() says why"
        )
    return groups


def all_quantized(model: WrappedModel, config: QConfig | None = None) -> WrappedModel:
    """Return a copy of ``model``, prepared so that all is quantized that can be."""
    config = copy.deepcopy(config) if config else QConfig()
    prepared = copy.deepcopy(model)
    prepare(prepared, replace(config, scope=_scope(config)))
    return prepared


def config_with(config: QConfig, groups: Sequence[Group], assignment: Assignment) -> QConfig:
    """Return a copy of ``config`` with one more region for each of ``groups``.

    Raises:
        ConfigError: a group has no choice in ``assignment``, or one that it does not offer; or the
            assignment names a group that there is not.
    """
    check_assignment(groups, assignment)
    result = copy.deepcopy(config)
    result.scope = _scope(config)
    for group in groups:
        activation, weight = _as_asked(config, assignment[group.name])
        result.set(list(group.nodes), activation=activation, weight=weight)
    return result


def _scope(config: QConfig) -> Scope:
    """Return what the groups are made of: the search, not an estimate, says what is worth it."""
    return "all" if config.scope == "all" else "kernels"


def _as_asked(config: QConfig, choice: Choice) -> tuple[Asked, Asked | None]:
    """Return the types of a choice, with all that ``config`` says of them if they are its own."""
    if choice.activation == "float16":
        return choice.activation, None  # so are the weights of what computes in it
    activation: Asked = choice.activation
    weight: Asked = choice.weight
    if config.activation_spec is not None and config.activation_spec.dtype.name == activation:
        activation = config.activation_spec
    if isinstance(config.weight, QuantSpec) and config.weight.dtype.name == weight:
        weight = config.weight
    return activation, weight


def check_assignment(groups: Sequence[Group], assignment: Assignment) -> None:
    """Refuse an assignment that does not give every group one of its choices.

    Raises:
        ConfigError: see ``config_with``.
    """
    names = {group.name for group in groups}
    if unknown := sorted(set(assignment) - names):
        raise ConfigError(f"no group {unknown[0]!r}; there are {', '.join(sorted(names)[:8])} …")
    for group in groups:
        if assignment.get(group.name) not in group.choices:
            offered = ", ".join(map(str, group.choices))
            raise ConfigError(
                f"group {group.name!r}: {assignment.get(group.name)} is none of its choices: "
                f"{offered}"
            )


def everywhere(groups: Sequence[Group], choice: Choice) -> dict[str, Choice]:
    """Return the assignment of ``choice`` to all groups that have it or its type of activations.

    Others stay float, or, where they cannot, take their first choice.

    Raises:
        ConfigError: no group has it; ``FLOAT`` is taken for what comes nearest all the same.
    """
    if choice != FLOAT and not any(choice in group.choices for group in groups):
        offered = dict.fromkeys(str(c) for group in groups for c in group.choices)
        raise ConfigError(f"no group has the choice {choice}; there are {', '.join(offered)}")
    return {group.name: _nearest(group, choice) for group in groups}


def _nearest(group: Group, choice: Choice) -> Choice:
    if choice in group.choices:
        return choice
    alike = [c for c in group.choices if c.activation == choice.activation]
    return (*alike, *(c for c in group.choices if c == FLOAT), *group.choices)[0]


class _Grouping:
    """Puts the quantized nodes of a prepared model into groups."""

    def __init__(self, model: WrappedModel) -> None:
        self.layout, self.graph, self.plan = model.layout, model.graph, plan_of(model)
        self.target = find_target(config_of(model).target)
        self.facts = Eligibility(model.layout, self.target, {})
        self.weights = _weights_of(self.plan, self.target)
        self.leader: dict[ir.Node, ir.Node] = {}
        self.order = {node: i for i, node in enumerate(self.facts.nodes)}
        self.types = Types(model.layout, config_of(model))
        self.settled = self.types.left_float().keys()

    def groups(self, choices: Sequence[Choice], by: By) -> list[Group]:
        for node in self.facts.nodes:
            if self._is_member(node):
                self.leader[node] = self._joins(node, by)
        self._tie()
        members: dict[ir.Node, list[ir.Node]] = defaultdict(list)
        for node in self.leader:
            members[self._root(node)].append(node)
        if by == "block":
            members = self._by_block(members)
        return [self._group(nodes, choices) for nodes in members.values()]

    def _is_member(self, node: ir.Node) -> bool:
        key = self.graph.node_key(node)
        if key in self.settled or self.types.is_asked(node):
            return False
        role = self.plan.nodes[key].role
        return role in ("integer", "pairs", "weights", "absorbed") or key in self.weights

    def _joins(self, node: ir.Node, by: By) -> ir.Node:
        """Return the node whose group ``node`` joins: an earlier one, or itself."""
        absorbing = self.facts.absorbed_by(node)
        if absorbing in self.leader and absorbing is not None:
            return absorbing
        if by == "node" or node.op_type in _JOINED or self.graph.node_key(node) in self.weights:
            return node
        made = [self._maker(v) for v in node.inputs if v is not None]
        earlier = [m for m in made if m in self.leader and m is not None]
        return max(earlier, key=self.order.__getitem__, default=node)

    def _maker(self, value: ir.Value) -> ir.Node | None:
        """Return the node that computed what ``value`` holds, perhaps moved since."""
        node = value.producer()
        moved = None if node is None or node in self.leader else self.facts.moved_input(node)
        return node if moved is None else self._maker(moved)

    def _root(self, node: ir.Node) -> ir.Node:
        while self.leader[node] is not node:
            node = self.leader[node]
        return node

    def _tie(self) -> None:
        """Join the groups of nodes that read one weight."""
        first: dict[str, ir.Node] = {}
        for node in list(self.leader):
            for value in self.weights.get(self.graph.node_key(node), ()):
                a, b = self._root(first.setdefault(value, node)), self._root(node)
                self.leader[max(a, b, key=self.order.__getitem__)] = min(
                    a, b, key=self.order.__getitem__
                )

    def _by_block(self, members: Mapping[ir.Node, list[ir.Node]]) -> dict[ir.Node, list[ir.Node]]:
        """Join the groups of one Block; those outside stay as they are."""
        first: dict[tuple[str, ...], ir.Node] = {}
        joined: dict[ir.Node, list[ir.Node]] = defaultdict(list)
        for root, nodes in members.items():
            path = _numbered(self.layout.homes[root])
            joined[first.setdefault(path, root) if path else root].extend(nodes)
        return joined

    def _group(self, nodes: list[ir.Node], choices: Sequence[Choice]) -> Group:
        keys = [self.graph.node_key(n) for n in sorted(nodes, key=self.order.__getitem__)]
        weighted = [key for key in keys if key in self.weights]
        if not weighted:
            choices = _by_activation(choices)
        runnable = [choice for choice in choices if self._runs(keys, choice)]
        if not runnable:
            listed = ", ".join(map(str, choices))
            raise ConfigError(
                f"group {(weighted or keys)[0]!r}: target {self.target.name!r} runs it in none of "
                f"{listed}; it runs {self._known(keys)}. Offer such a choice, or exclude the nodes"
            )
        return Group((weighted or keys)[0], tuple(keys), tuple(runnable))

    def _runs(self, keys: Sequence[str], choice: Choice) -> bool:
        """Whether the target runs all nodes of a group in a choice."""
        return all(
            self.target.supports(
                self.plan.nodes[key].op_type,
                choice.activation,
                choice.weight if key in self.weights else FLOAT.weight,
            )
            for key in keys
        )

    def _known(self, keys: Sequence[str]) -> str:
        kinds = dict.fromkeys(self.plan.nodes[key].op_type for key in keys)
        return ", ".join(f"{kind} in {self.target.runs(kind)}" for kind in kinds)


def _weights_of(plan: QuantPlan, target: Target) -> dict[str, list[str]]:
    """Return node key -> the stored weights and tables that it reads."""
    found: dict[str, list[str]] = defaultdict(list)
    tables = {tensor.table for tensor in plan.tensors.values()}
    weights = {bias.weight for bias in plan.biases.values()}
    for (node, index), constant in plan.constants.items():
        if plan.nodes[node].op_type in target.matrix or (node, index) in tables | weights:
            found[node].append(constant.value)
    return dict(found)


def _by_activation(choices: Sequence[Choice]) -> list[Choice]:
    """Return one choice for each type of activation: all float for a float one, if there is."""
    first: dict[str, Choice] = {}
    for choice in sorted(choices, key=lambda c: not c.is_float):
        first.setdefault(choice.activation, choice)
    return [choice for choice in choices if choice in first.values()]


def _numbered(path: Sequence[str]) -> tuple[str, ...]:
    """Return a Block's path up to its first number, all of it if there is none."""
    for depth, part in enumerate(path):
        if part.isdigit():
            return tuple(path[: depth + 1])
    return tuple(path)
