"""Every format at every granularity: codes and values against runtimes that know them.

onnxruntime is the oracle wherever it has kernels, at the lowest opset that carries a format and in
com.microsoft's form; ml_dtypes and numpy where it has none: bfloat16, float4 and scales of
float8e8m0. ``test_onnxruntime_lacks_what_it_is_not_asked_for`` keeps that list honest.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qwrap.config import QuantSpec
from qwrap.dtypes import FLOAT4E2M1, FLOATS, INTEGERS, QuantType
from qwrap.errors import ConfigError
from qwrap.export.quantizers import as_array
from qwrap.export.runtime import has_kernel
from qwrap.numerics import (
    QParams,
    block_extremes,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
    spread,
)
from qwrap.quant.placement.forms import (
    CONTRIB,
    DEQUANTIZE,
    QUANTIZE,
    Format,
    carried_by_contrib,
    lowest_opset,
    scaled_as,
)

FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
SHAPE = (3, 10, 7)
LAYOUTS = (
    {},
    {"axis": 0},
    {"axis": 1},
    {"axis": 2},
    {"axis": 1, "block_size": 4},  # blocks of 4, 4 and 2
    {"axis": 2, "block_size": 7},
    {"axis": 0, "block_size": 2},
    {"axis": 2, "block_size": 1},
)
OPTIONS = (
    {"symmetric": True},
    {"symmetric": False},
    {"symmetric": True, "narrow_range": True},
    {"symmetric": True, "reduce_range": True},
    {"symmetric": False, "reduce_range": True},
    {"symmetric": False, "restricted": True},
    {"symmetric": True, "power_of_two": True},
    {"symmetric": False, "power_of_two": True, "min_real_range": 50.0},
)


def specs() -> list[QuantSpec]:
    """Every combination that is not refused."""
    every = itertools.product((*INTEGERS, *FLOATS), LAYOUTS, OPTIONS)
    found = (spec_or_none(dtype=dtype, **layout, **option) for dtype, layout, option in every)
    return [spec for spec in dict.fromkeys(found) if spec is not None]


def spec_or_none(**settings: object) -> QuantSpec | None:
    try:
        return QuantSpec(**settings)
    except ConfigError:
        return None


@dataclass
class Case:
    """One tensor with its qparams."""

    spec: QuantSpec
    real: ir.DataType
    x: Tensor
    qparams: QParams

    @property
    def format(self) -> Format:
        return Format.of(self.spec, self.real)

    @property
    def grid(self) -> QuantSpec:
        return self.spec.as_computed()


def extremes(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    if spec.block_size is not None:
        return block_extremes(x, spec)
    if spec.axis is None:
        return x.amin(), x.amax()
    others = [i for i in range(x.ndim) if i != spec.axis]
    return x.amin(others), x.amax(others)


TORCH = {FLOAT: torch.float32, HALF: torch.float16, BFLOAT: torch.bfloat16}
SPECIAL = [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e30, -1e30, 3.4e38, 1e-30, 1e-42, -1e-45, 6e-8]


def make_case(spec: QuantSpec, real: ir.DataType, seed: int) -> Case:
    """Ordinary values, ties between two codes, values beyond the type, and special ones."""
    rng = np.random.default_rng(seed)
    spec = scaled_as(spec, real)
    ordinary = torch.from_numpy(rng.normal(0.5, 2, SHAPE).astype(np.float32))
    qparams = choose_qparams(*extremes(ordinary, spec), spec)
    scale = spread(qparams.scale, SHAPE, qparams)
    reach = min(spec.dtype.qmax - spec.dtype.qmin, 600)
    ties = (rng.integers(-reach, reach, SHAPE) * 2 + 1) / 4
    if not spec.dtype.is_integer:
        levels = np.array(spec.dtype.levels)
        middles = (levels[1:] + levels[:-1]) / 2
        ties = rng.choice(middles, SHAPE)
    tied = torch.from_numpy((ties * scale.double().numpy()).astype(np.float32))
    x = torch.where(torch.from_numpy(rng.random(SHAPE) < 0.5), tied, ordinary).flatten()
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return Case(spec, real, x.reshape(SHAPE).to(TORCH[real]), qparams)


def to_numpy(x: Tensor) -> np.ndarray:
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


SCALE_TYPES = {"float32": FLOAT, "float16": HALF, "bfloat16": BFLOAT}


def run_in_onnxruntime(
    cases: list[Case], opset: int, domain: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Codes, as floats, and values of all cases, from one model."""
    nodes, constants, outputs = [], [], []
    for i, case in enumerate(cases):
        spec, form = case.spec, case.format
        scalar = spec.axis is None
        scale = case.qparams.scale.reshape(()) if scalar else case.qparams.scale
        zero = case.qparams.zero_point.reshape(()) if scalar else case.qparams.zero_point
        for name, array in (
            (f"x{i}", to_numpy(case.x)),
            (f"s{i}", as_array(scale, SCALE_TYPES[spec.scale_type])),
            (f"z{i}", as_array(zero, spec.dtype.onnx_type)),
        ):
            constants.append(numpy_helper.from_array(array, name))
        wanted = {"axis": spec.axis, "block_size": spec.block_size}
        layout = {k: v for k, v in wanted.items() if v is not None}
        nodes += [
            helper.make_node(QUANTIZE, [f"x{i}", f"s{i}", f"z{i}"], [f"q{i}"], **layout),
            helper.make_node(DEQUANTIZE, [f"q{i}", "one"], [f"c{i}"]),
            helper.make_node(DEQUANTIZE, [f"q{i}", f"s{i}", f"z{i}"], [f"y{i}"], **layout),
        ]
        for name, kind in ((f"c{i}", FLOAT), (f"y{i}", form.real)):
            outputs.append(helper.make_tensor_value_info(name, kind, SHAPE))
    for node in nodes:
        node.domain = domain
    constants.append(numpy_helper.from_array(np.float32(1), "one"))
    graph = helper.make_graph(nodes, "cases", [], outputs, constants)
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, 1)] if domain else []
    model = helper.make_model(graph, opset_imports=imports, ir_version=13)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    arrays = session.run(None, {})
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def differing(ours: Tensor, theirs: np.ndarray) -> int:
    """Count elements that differ in any bit; NaN equals NaN."""
    a, b = to_numpy(ours), theirs
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    same = (a == b) & (np.signbit(a) == np.signbit(b)) | (np.isnan(a) & np.isnan(b))
    return int((~same).sum())


def groups(real: ir.DataType) -> dict[tuple[int, str], list[Case]]:
    """(opset, domain) -> the cases that onnxruntime runs there, each at its lowest opset."""
    found: dict[tuple[int, str], list[Case]] = defaultdict(list)
    for seed, spec in enumerate(specs()):
        form = Format.of(scaled_as(spec, real), real)
        case = make_case(spec, real, seed)
        lowest = max(lowest_opset(form, op) for op in (QUANTIZE, DEQUANTIZE))
        if has_kernel(form, QUANTIZE, "", lowest):
            found[lowest, ""].append(case)
        if carried_by_contrib(form):
            found[10, CONTRIB].append(case)
    return found


GROUPS = {real: groups(real) for real in (FLOAT, HALF)}


def within(case: Case) -> Tensor:
    """Where onnxruntime's kernels of blocks, of few bits and of float16 do not overflow.

    They cast steps to int32 and add the zero point before they clamp: what is 2^31 steps or more
    from 0, and NaN, becomes some code at either end there. Its other kernels saturate, as ONNX
    says.
    """
    steps = case.x.double() / spread(case.qparams.scale, SHAPE, case.qparams)
    return (steps.abs() < 2**31 - 2**16) | (not case.spec.dtype.is_integer)


@pytest.mark.parametrize(
    ("real", "opset", "domain"),
    [
        pytest.param(real, *key, id=f"{real.name}-{key[1]}{key[0]}")
        for real in GROUPS
        for key in GROUPS[real]
    ],
)
def test_codes_and_values_are_onnxruntimes(real: ir.DataType, opset: int, domain: str) -> None:
    cases, wrong = GROUPS[real][opset, domain], []
    for case, (codes, values) in zip(cases, run_in_onnxruntime(cases, opset, domain), strict=True):
        ours = quantize(case.x, case.qparams, case.grid)
        back = dequantize(ours, case.qparams).to(TORCH[real])
        fake = fake_quantize(case.x, case.qparams.scale, case.qparams.zero_point, case.grid)
        held = within(case)
        known = held & ~case.x.isnan()
        counts = (
            differing(ours.to(torch.float32)[held], codes[held.numpy()]),
            differing(back[held], values[held.numpy()]),
            differing(fake[known], values[known.numpy()]),
        )
        if any(counts):
            wrong.append((str(case.format), case.spec, counts))
    assert not wrong


@pytest.mark.ort("G74")
def test_the_matrix_is_whole() -> None:
    cases = itertools.chain.from_iterable(GROUPS[FLOAT].values())
    types = {(case.spec.dtype, case.format.granularity) for case in cases}
    assert {t for t, _ in types} == {*INTEGERS, *FLOATS} - {FLOAT4E2M1}
    assert len(types) == 12 * 3
    assert sum(len(cases) for real in GROUPS for cases in GROUPS[real].values()) > 1100


@pytest.mark.parametrize("spec", [s for s in specs() if s.dtype.is_integer], ids=str)
def test_what_no_code_reaches_gets_the_last_one(spec: QuantSpec) -> None:
    case = make_case(spec, FLOAT, 0)
    beyond = ~within(case)
    assert beyond.sum() >= 4
    codes = quantize(case.x, case.qparams, case.grid).int()[beyond]
    ends = torch.where(case.x[beyond] > 0, spec.dtype.qmax, spec.dtype.qmin)  # NaN: the smallest
    assert torch.equal(codes, ends.int())


def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values in numpy and ml_dtypes, where onnxruntime has no kernel."""
    dtype, real = case.spec.dtype, case.real.numpy()
    with np.errstate(all="ignore"):
        scale = spread(case.qparams.scale, SHAPE, case.qparams).numpy().astype(np.float32)
        steps = to_numpy(case.x).astype(np.float32) / scale
        if dtype.is_integer:
            zero = spread(case.qparams.zero_point, SHAPE, case.qparams).numpy().astype(np.float32)
            codes = np.clip(np.rint(steps) + zero, np.float32(dtype.qmin), np.float32(dtype.qmax))
            codes = np.where(np.isnan(codes), np.float32(dtype.qmin), codes)
            return codes, ((codes - zero) * scale).astype(real)
        largest = np.float32(dtype.qmax)
        kind = ir.DataType(dtype.onnx_type).numpy()
        codes = np.clip(steps, -largest, largest).astype(kind).astype(np.float32)
        return codes, (codes * scale).astype(real)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS], ids=str)
def test_bfloat16_is_divided_in_float32_and_rounded_once(dtype: QuantType) -> None:
    for spec in (s for s in specs() if s.dtype == dtype):
        case = make_case(spec, BFLOAT, 3)
        codes, values = expected(case)
        ours = quantize(case.x, case.qparams, case.grid)
        known = ~case.x.isnan()
        assert differing(ours.to(torch.float32)[known], codes[known.numpy()]) == 0
        back = dequantize(ours, case.qparams).to(torch.bfloat16)
        assert differing(back[known], values[known.numpy()]) == 0


@pytest.mark.parametrize("real", [FLOAT, HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("scale_type", ["float32", "float16", "float8e8m0", "float8e4m3fn"])
def test_float4_codes_are_those_of_ml_dtypes(real: ir.DataType, scale_type: str) -> None:
    for spec in (s for s in specs() if s.dtype == FLOAT4E2M1):
        case = make_case(replace(spec, scale_type=scale_type), real, 5)
        codes, values = expected(case)
        ours, known = quantize(case.x, case.qparams, case.grid), ~case.x.isnan()
        assert differing(ours[known], codes[known.numpy()]) == 0  # NaN is 0 with either sign
        assert ours[~known].eq(0).all()
        back = dequantize(ours, case.qparams).to(TORCH[real])
        assert differing(back[known], values[known.numpy()]) == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_float4_values_are_those_of_the_reference_evaluator(layout: dict[str, int]) -> None:
    case = make_case(QuantSpec(dtype=FLOAT4E2M1, **layout), FLOAT, 7)
    finite = case.x.nan_to_num(0.0).clamp(-1e3, 1e3)  # numpy warns of what overflows
    scale = case.qparams.scale.reshape(()) if not layout else case.qparams.scale
    quantizer = helper.make_node(
        QUANTIZE, ["x", "s"], ["q"], output_dtype=FLOAT4E2M1.onnx_type, **layout
    )
    dequantizer = helper.make_node(DEQUANTIZE, ["q", "s"], ["y"], **layout)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [quantizer, dequantizer],
        "float4",
        [info("x", FLOAT, SHAPE), info("s", FLOAT, scale.shape)],
        [info("y", FLOAT, SHAPE)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    feed = {"x": finite.numpy(), "s": scale.numpy()}
    values = ReferenceEvaluator(model).run(None, feed)[0]
    ours = fake_quantize(finite, case.qparams.scale, case.qparams.zero_point, case.grid)
    np.testing.assert_array_equal(ours.numpy(), values)


def test_onnxruntime_lacks_what_it_is_not_asked_for() -> None:
    newest = 26  # what onnxruntime 1.31 opens
    for op in (QUANTIZE, DEQUANTIZE):
        for dtype in (*INTEGERS, *FLOATS):
            codes = ir.DataType(dtype.onnx_type)
            assert has_kernel(Format(codes=codes), op, "", newest) == (dtype != FLOAT4E2M1)
            assert not has_kernel(Format(codes=codes, real=BFLOAT, scale=BFLOAT), op, "", newest)
            powers = Format(codes=codes, scale=ir.DataType.FLOAT8E8M0)
            assert not has_kernel(powers, op, "", newest)
