"""Weights that learn one after the other: behind quantized ones, judged by rows held back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nbits_files import Array, constants, drawn, matrix, model_of, run, tensor, walk
from onnx import helper
from torch import Tensor

import qwrap
from qwrap.nbits.blocks import BlockFormat, Blocks
from qwrap.nbits.correction import corrected, output_error
from qwrap.nbits.lessons import Lesson
from qwrap.nbits.rtn import round_to_nearest
from qwrap.ort.report import Report
from qwrap.quant.unfold import Unfold


def alike(seed: int, rows: int = 60, inputs: int = 64) -> Array:
    """Inputs that share what a few numbers cause."""
    mixing = drawn(6, inputs, seed=77) * np.linspace(0.3, 6, inputs, dtype=np.float32)
    return drawn(rows, 6, seed=seed) @ mixing + 0.2 * drawn(rows, inputs, seed=seed + 500)


def chain(depth: int = 4) -> onnx.ModelProto:
    nodes, weights = [], {}
    for i in range(depth):
        nodes += [
            helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"p{i}"]),
            helper.make_node("Tanh", [f"p{i}"], [f"h{i + 1}"]),
        ]
        weights[f"w{i}"] = drawn(64, 64, seed=i)
    return model_of(nodes, weights, {"h0": ["B", 64]}, [f"h{depth}"])


def quantized(source: onnx.ModelProto, **settings: Any) -> onnx.ModelProto:
    given = {"bits": 3, "block_size": 32, "method": "gptq", "progress": False} | settings
    made = qwrap.quantize_weights(source, **given)
    assert made is not None
    return made


BATCHES = [alike(seed) for seed in range(16)]


def error(source: onnx.ModelProto, made: onnx.ModelProto, name: str = "h0") -> float:
    feeds = {name: alike(900, 400)}
    exact, found = (run(m, feeds)[0] for m in (source, made))
    return float(np.square(found - exact).sum() / np.square(exact).sum())


def test_each_step_brings_a_deep_chain_closer() -> None:
    source = chain()
    nearest = error(source, quantized(source, method="rtn"))
    alone, behind, both = (
        error(source, quantized(source, batches=BATCHES, sequential=s, asymmetric=a))
        for s, a in ((False, False), (True, False), (True, True))
    )
    assert both < 0.8 * behind
    assert max(alone, behind) < 0.8 * nearest


def test_the_same_data_makes_the_same_file() -> None:
    files = [quantized(chain(), batches=BATCHES).SerializeToString() for _ in range(2)]
    assert files[0] == files[1]


def lesson_of(seen: Tensor, exact: Tensor) -> Lesson:
    lesson = Lesson.of(Unfold())
    lesson.taught.add(seen, exact)
    lesson.held.add(Unfold(), seen, exact, 10**6)
    return lesson


def test_what_makes_good_is_the_least_squares_solution() -> None:
    exact = torch.from_numpy(alike(3, 500))
    seen = exact + 0.3 * torch.from_numpy(drawn(500, 64, seed=8)) + 0.1 * exact.roll(1, 1)
    weight = torch.from_numpy(drawn(24, 64, seed=9))
    found, share = corrected(weight, lesson_of(seen, exact), 1e-12)
    wanted = torch.linalg.lstsq(seen.double(), (exact @ weight.T).double()).solution.T
    assert share == pytest.approx(1, abs=1e-4)  # sums in float32: the best on its own rows is all
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


def test_no_more_of_it_is_taken_than_held_back_rows_ask_for() -> None:
    exact, noise = torch.from_numpy(alike(3, 40)), torch.from_numpy(drawn(40, 64, seed=8))
    weight = torch.from_numpy(drawn(24, 64, seed=9))
    lesson = Lesson.of(Unfold())
    lesson.taught.add(exact + noise, exact)  # 40 rows for 64 inputs: learned by heart
    judge = torch.from_numpy(alike(4, 200))
    other = judge + torch.from_numpy(drawn(200, 64, seed=10))
    lesson.held.add(Unfold(), other, judge, 1000)
    found, share = corrected(weight, lesson, 0.01)
    assert 0 < share < 1
    whole = weight + (found - weight) / share
    errors = {
        factor: output_error(weight, weight + factor * (whole - weight), lesson.held)
        for factor in (0.0, share - 0.05, share, share + 0.05, 1.0)
    }
    assert min(errors, key=lambda factor: errors[factor]) == share


def test_without_drift_nothing_is_corrected() -> None:
    weight, x = torch.from_numpy(drawn(24, 64)), torch.from_numpy(alike(3))
    assert corrected(weight, lesson_of(x, x), 0.01) == (pytest.approx(weight), 0.0)


def test_a_method_that_is_worse_than_nearest_is_rolled_back_and_said_so() -> None:
    def harm(weight: Tensor, form: BlockFormat, statistics: Any) -> Blocks:
        assert statistics.second.shape == (64, 64)
        return round_to_nearest(weight * 0.5, form)

    source, report = chain(2), Report()
    made = quantized(source, method=harm, batches=BATCHES, report=report)
    plain = quantized(source, method="rtn")
    assert made.SerializeToString() == plain.SerializeToString()
    reasons = [node.reason for node in report.nodes if node.quantized]
    assert all(reason.endswith("rounded to nearest") for reason in reasons)


def test_the_report_gives_the_error_on_rows_that_did_not_teach() -> None:
    source, report = chain(1), Report()
    made = quantized(source, batches=BATCHES, report=report)
    held = np.concatenate([BATCHES[7], BATCHES[15]])
    weight, meant = drawn(64, 64), matrix(made.graph.node[0], constants(made.graph))
    exact = held @ weight
    wanted = np.square(held @ meant - exact).sum() / np.square(exact).sum()
    text = report.nodes[0].reason
    assert text.startswith("MatMulNBits, 3 bits stored in 4, blocks of 32; error ")
    assert float(text.split("error ")[1].split()[0]) == pytest.approx(wanted, rel=6e-3)  # 3 digits


def loop(times: int = 3) -> onnx.ModelProto:
    """``h = tanh(h @ w)``, some times, then ``h @ v``."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["s", "w"], ["p"], name="inside"),
            helper.make_node("Tanh", ["p"], ["t"]),
            helper.make_node("Identity", ["go"], ["more"]),
        ],
        "body",
        [info("i", 7, []), info("go", 9, []), info("s", 1, ["B", 64])],
        [info("more", 9, []), info("t", 1, ["B", 64])],
    )
    nodes = [
        helper.make_node("Loop", ["n", "", "h0"], ["h"], name="loop", body=body),
        helper.make_node("MatMul", ["h", "v"], ["y"], name="after"),
    ]
    weights = {"w": drawn(64, 64), "v": drawn(64, 64, seed=1), "n": np.array(times)}
    return model_of(nodes, weights, {"h0": ["B", 64]}, ["y"])


def test_a_weight_in_a_loop_learns_from_every_turn() -> None:
    source = loop()
    nearest = error(source, quantized(source, method="rtn"))
    made = quantized(source, batches=BATCHES)
    assert [n.op_type for n in walk(made.graph)].count("MatMulNBits") == 2
    assert error(source, made) < 0.7 * nearest


def test_a_weight_of_two_layers_learns_from_both() -> None:
    nodes = [
        helper.make_node("MatMul", ["h0", "w"], ["a"]),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    source = model_of(nodes, {"w": drawn(64, 64)}, {"h0": ["B", 64]}, ["y"])
    made = quantized(source, batches=BATCHES)
    assert len(made.graph.initializer) == 3
    assert error(source, made) < 0.7 * error(source, quantized(source, method="rtn"))


def test_what_no_data_reaches_is_rounded_to_nearest() -> None:
    info = helper.make_tensor_value_info

    def body(name: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Tanh", ["h0"], [f"t_{name}"]),
            helper.make_node("MatMul", [f"t_{name}", f"w_{name}"], [f"y_{name}"], name=name),
        ]
        inside = [tensor(drawn(64, 64), f"w_{name}")]
        return helper.make_graph(nodes, name, [], [info(f"y_{name}", 1, None)], inside)

    node = helper.make_node("If", ["c"], ["y"], then_branch=body("one"), else_branch=body("two"))
    source = model_of([node], {}, {"h0": ["B", 64]}, ["y"])
    source.graph.input.append(info("c", onnx.TensorProto.BOOL, []))
    report = Report()
    batches = [{"h0": x, "c": np.array(True)} for x in BATCHES]
    quantized(source, batches=batches, report=report)
    reasons = {node.name: node.reason for node in report.nodes}
    assert "no data reached it: rounded to nearest" in reasons["two"]
    assert "error" in reasons["one"]


@pytest.mark.parametrize("memory", [0, 20_000, 10**9])
def test_where_tensors_are_kept_changes_nothing(memory: int) -> None:
    source = chain(3)
    kept = quantized(source, batches=BATCHES, memory=memory)
    assert kept.SerializeToString() == quantized(source, batches=BATCHES).SerializeToString()


def test_one_batch_teaches_and_judges() -> None:
    source = chain(2)
    made = quantized(source, batches=[np.concatenate(BATCHES)])
    assert error(source, made) < 0.8 * error(source, quantized(source, method="rtn"))


def test_random_numbers_of_the_caller_are_not_drawn() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    quantized(chain(1), batches=BATCHES[:2])
    assert torch.equal(torch.get_rng_state(), before)


def test_damping_below_zero_is_refused() -> None:
    with pytest.raises(qwrap.errors.ConfigError, match="damping=0"):
        qwrap.quantize_weights(chain(1), method="gptq", batches=BATCHES, damping=0)
