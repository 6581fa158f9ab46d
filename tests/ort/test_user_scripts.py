"""What public scripts do with onnxruntime's tool beside the usual calls, with both modules."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from calibration_cases import Reader, conv_model, images
from packages import INCUMBENT, OWN, graph_form, part

from qwrap.ort.borrowed import HOMES
from qwrap.ort.errors import QuantizationError


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "float.onnx"
    onnx.save(conv_model(), path)
    return str(path)


# --- readers -------------------------------------------------------------------------------------


class Raising:
    """Ends as ``next`` without a default does."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches: Iterator[Any] = iter(batches)

    def get_next(self) -> Any:
        return next(self._batches)


@pytest.mark.ort(81)
def test_a_reader_may_end_with_stop_iteration(tmp_path: Path, model: str) -> None:
    """The incumbent lets the exception through, with no message."""
    ours, theirs = importlib.import_module(OWN), importlib.import_module(INCUMBENT)
    ours.quantize_static(model, tmp_path / "raising.onnx", Raising(images(3)))
    ours.quantize_static(model, tmp_path / "plain.onnx", Reader(images(3)))
    written = [(tmp_path / f"{name}.onnx").read_bytes() for name in ("raising", "plain")]
    assert written[0] == written[1]
    with pytest.raises(StopIteration):
        theirs.quantize_static(model, tmp_path / "theirs.onnx", Raising(images(3)))


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.ort(6, 23)
@pytest.mark.parametrize("name", ["FusedConv", "QAttention", "SkipLayerNormalization"])
def test_operators_of_onnxruntime_may_be_named_where_a_model_has_none(
    tmp_path: Path, model: str, name: str
) -> None:
    forms = []
    for package in (OWN, INCUMBENT):
        output = tmp_path / f"{package}.onnx"
        quantize_dynamic = importlib.import_module(package).quantize_dynamic
        quantize_dynamic(model, output, op_types_to_quantize=["MatMul", name])
        forms.append(graph_form(output))
    assert forms[0] == forms[1]


@pytest.mark.ort(52)
@pytest.mark.parametrize("package", [OWN, INCUMBENT])
def test_a_flag_may_be_0_or_1(tmp_path: Path, model: str, package: str) -> None:
    module = importlib.import_module(package)
    written = []
    for symmetric in (1, True):
        output = tmp_path / f"{package}{symmetric!r}.onnx"
        options = {"ActivationSymmetric": symmetric}
        module.quantize_static(model, output, Reader(images(2)), extra_options=options)
        written.append(onnx.load(output).SerializeToString(deterministic=True))
    assert written[0] == written[1]


@pytest.mark.ort(54)
def test_a_flag_may_not_be_2(tmp_path: Path, model: str) -> None:
    quantize_dynamic = importlib.import_module(OWN).quantize_dynamic
    with pytest.raises(QuantizationError, match="WeightSymmetric"):
        quantize_dynamic(model, tmp_path / "out.onnx", extra_options={"WeightSymmetric": 2})


@pytest.mark.ort(82)
@pytest.mark.parametrize("name", sorted(HOMES))
@pytest.mark.parametrize("module", ["quantize", "onnx_quantizer", "qdq_quantizer", "calibrate"])
def test_names_that_modules_borrow_can_be_imported_from_them(module: str, name: str) -> None:
    if hasattr(part(INCUMBENT, module), name):
        home = part(OWN, HOMES[name])
        assert getattr(part(OWN, module), name) is getattr(home, name)


@pytest.mark.ort(82)
def test_a_name_that_no_module_has_is_missing() -> None:
    with pytest.raises(AttributeError, match=r"'qwrap.ort.quantize' has no attribute 'nonsense'"):
        _ = part(OWN, "quantize").nonsense


# --- what older versions took --------------------------------------------------------------------


@pytest.mark.ort(23)
@pytest.mark.parametrize("package", [OWN, INCUMBENT])
@pytest.mark.parametrize("name", ["optimize_model", "activation_type", "input_qType"])
def test_keywords_of_older_versions_are_refused_as_such(
    model: str, package: str, name: str
) -> None:
    quantize_dynamic = importlib.import_module(package).quantize_dynamic
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        quantize_dynamic(model, "out.onnx", **{name: True})


@pytest.mark.ort(3, 23)
@pytest.mark.parametrize("package", [OWN, INCUMBENT])
def test_a_missing_output_folder_is_a_missing_file(
    tmp_path: Path, model: str, package: str
) -> None:
    quantize_dynamic = importlib.import_module(package).quantize_dynamic
    with pytest.raises(FileNotFoundError):
        quantize_dynamic(model, tmp_path / "missing" / "out.onnx")


# --- weight-only ---------------------------------------------------------------------------------


@pytest.mark.ort(279)
@pytest.mark.parametrize("package", [OWN, INCUMBENT])
def test_the_logger_of_the_weight_only_module_can_be_set(package: str) -> None:
    module = part(package, "matmul_nbits_quantizer")
    assert module.logger is logging.getLogger(f"{package}.matmul_nbits_quantizer")


@pytest.mark.ort(279)
def test_a_configuration_without_an_algorithm_says_so(model: str) -> None:
    """The incumbent fails with an AttributeError inside."""
    module = part(OWN, "matmul_nbits_quantizer")
    bare = module.WeightOnlyQuantConfig("DEFAULT", module.QuantFormat.QOperator)
    with pytest.raises(QuantizationError, match="says nothing of an algorithm"):
        module.MatMulNBitsQuantizer(onnx.load(model), algo_config=bare).process()
