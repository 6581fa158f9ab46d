"""Every public name of onnxruntime.quantization is where it was, with the same parameters."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from enum import Enum
from typing import Any

import onnxruntime.quantization as incumbent
import pytest

QNN = "execution_providers.qnn"  # whose folder is no package, so that walking passes it by
RENAMED = {
    # called by position: what the one argument is called differs from enumeration to enumeration
    "from_string",
    # and from pattern to pattern; the base class calls it
    "fuse",
    "add_bias",  # a step of ConvInteger
    # steps of AWQ, which here take arrays of numpy and so no device
    "make_model_input",
    "get_calib_inputs",
}
FOREIGN = {"neural_compressor.onnx_model"}  # of which what the package itself calls is here


def modules() -> Iterator[str]:
    """Return the incumbent's modules, relative to its package."""
    yield from ("", QNN)
    yield from (f"{QNN}.{n}" for n in ("fusion_lpnorm", "fusion_spacetodepth"))
    yield from (f"{QNN}.{n}" for n in ("mixed_precision_overrides_utils", "preprocess"))
    yield f"{QNN}.quant_config"
    prefix = incumbent.__name__ + "."
    for found in pkgutil.walk_packages(incumbent.__path__, prefix):
        yield found.name.removeprefix(prefix)


def loaded(package: str, name: str) -> Any:
    return importlib.import_module(f"{package}.{name}" if name else package)


def public(module: Any) -> Iterator[tuple[str, Any]]:
    """Return functions and classes that a module makes, and what a package hands on."""
    for name, value in vars(module).items():
        made = getattr(value, "__module__", None)
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        handed_on = hasattr(module, "__path__") and str(made).startswith(incumbent.__name__)
        if made == module.__name__ or handed_on:
            yield name, value


def surface() -> Iterator[Any]:
    for name in modules():
        module = loaded(incumbent.__name__, name)
        for what, value in public(module):
            yield pytest.param(name, what, value, id=f"{name}.{what}")


def parameters(value: Any) -> list[inspect.Parameter]:
    if inspect.isclass(value) and issubclass(value, Enum):
        return []
    return list(inspect.signature(value).parameters.values())


def alike(ours: Any, theirs: Any) -> bool:
    """Return whether two defaults mean the same: enumerations and functions by name."""
    if isinstance(theirs, Enum):
        return isinstance(ours, Enum) and (ours.name, ours.value) == (theirs.name, theirs.value)
    if inspect.isfunction(theirs):
        return ours.__name__ == theirs.__name__
    if theirs is None:
        return ours is None
    if isinstance(theirs, (list, tuple, dict)):
        return list(ours or ()) == list(theirs)  # None for what would be shared between calls
    return bool(ours == theirs)


def assert_called_alike(ours: Any, theirs: Any, where: str) -> None:
    """Each parameter has its place, its name and its default; more may follow by keyword."""
    found, expected = parameters(ours), parameters(theirs)
    by_name = {parameter.name: parameter for parameter in found}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for place, parameter in enumerate(expected):
        if parameter.kind in variadic:
            continue
        own = by_name.get(parameter.name)
        assert own is not None, f"{where} has no parameter {parameter.name}"
        if parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert found[place] is own, f"{where}: {parameter.name} is not number {place}"
        if parameter.default is not parameter.empty:
            same = alike(own.default, parameter.default)
            assert same, f"{where}: {parameter.name}={own.default!r} for {parameter.default!r}"
    for parameter in found[len(expected) :]:
        optional = parameter.default is not parameter.empty or parameter.kind in variadic
        assert optional, f"{where} demands {parameter.name}"


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    for base in cls.__mro__:
        if base.__module__.startswith(incumbent.__name__):
            for name, value in vars(base).items():
                if not name.startswith("_"):
                    yield name, value


@pytest.mark.ort(362, 165, 180, 364, 365)
@pytest.mark.parametrize(("module", "name", "theirs"), list(surface()))
def test_a_public_name_is_where_it_was(module: str, name: str, theirs: Any) -> None:
    ours = getattr(loaded("qwrap.ort", module), name)
    where = f"{module}.{name}"
    assert_called_alike(ours, theirs, where)
    if not inspect.isclass(theirs) or module in FOREIGN:
        return
    for method, _ in methods(theirs):
        assert hasattr(ours, method), f"{where} has no {method}"
        if method in RENAMED:
            continue
        if inspect.isfunction(inspect.unwrap(getattr(theirs, method))):
            assert_called_alike(getattr(ours, method), getattr(theirs, method), f"{where}.{method}")
