"""From a budget to a verified file."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import qwrap
from qwrap.errors import ConfigError, InputError, StatisticsError
from qwrap.mixed.choices import CHOICES, FLOAT
from qwrap.mixed.search import evaluate, prices
from qwrap.mixed.search.budget import Budget
from qwrap.mixed.search.report import SearchResult
from qwrap.mixed.search.search import search

INT8, INT16, _ = CHOICES
NET = """
    c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<pads=[1,1,1,1]>(r1, w2)
    a = Add(c2, r1)
    r2 = Relu(a)
    c3 = Conv<strides=[4,4]>(r2, w3)
    f = Flatten(c3)
    y = Gemm(f, w4, b4)
"""
WEIGHTS = {
    "w1": (8, 3, 3, 3),
    "b1": (8,),
    "w2": (8, 8, 3, 3),
    "w3": (8, 8, 4, 4),
    "w4": (32, 5),
    "b4": (5,),
}


@pytest.fixture(scope="module")
def net(small: Any) -> onnx.ModelProto:
    return small.build(NET, WEIGHTS, outputs="float[N,M] y")


@pytest.fixture(scope="module")
def data(small: Any) -> list[np.ndarray]:
    return small.batches(6, (8, 3, 8, 8))


@pytest.fixture(scope="module")
def result(net: onnx.ModelProto, data: list[np.ndarray]) -> SearchResult:
    return search(net, data, budget="bytes=50%", points=4, progress=False)


def assignments(result: SearchResult) -> list[dict[str, str]]:
    return [{name: str(c) for name, c in p.assignment.items()} for p in result.points]


def size_of(path: Path) -> int:
    """Bytes of all initialisers but the scales of activations, one number and one code each."""
    tensors = onnx.load(path).graph.initializer
    return sum(len(t.raw_data) for t in tensors)


def test_the_file_is_within_the_budget(
    result: SearchResult, net: onnx.ModelProto, data: list[np.ndarray], tmp_path: Path
) -> None:
    model = qwrap.load(net)
    plan = result.apply(model, data, progress=False)
    qwrap.export(model, tmp_path / "q.onnx")
    float_size = sum(len(t.raw_data) for t in net.graph.initializer)
    assert result.chosen.costs["bytes"] <= 0.5 * float_size
    activations = 8 * (len(plan.sources()) + len(list(plan.conversions())))
    assert size_of(tmp_path / "q.onnx") <= result.chosen.costs["bytes"] + activations


def test_the_measured_loss_is_that_of_the_exported_file_in_onnxruntime(
    result: SearchResult, net: onnx.ModelProto, data: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "q.onnx"
    qwrap.export(result.model, path)
    held = held_out(data)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    quantized = onnxruntime.InferenceSession(path, options)
    wanted = onnxruntime.InferenceSession(net.SerializeToString())
    losses = []
    for batch in held:
        q, p = (softmax(s.run(None, {"x": batch})[0]) for s in (quantized, wanted))
        losses.append((p * (np.log(p) - np.log(q))).sum(-1))
    # Unoptimised onnxruntime and the simulation differ by a code here and there.
    assert result.chosen.measured.loss == pytest.approx(np.concatenate(losses).mean(), rel=0.05)


def held_out(data: list[np.ndarray]) -> list[np.ndarray]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    return [data[i] for i in sorted(order[: round(len(data) * 0.25)])]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_same_data_give_the_same_search(
    result: SearchResult, net: onnx.ModelProto, data: list[np.ndarray]
) -> None:
    again = search(net, iter(data), budget="bytes=50%", points=4, progress=False)
    # An iterator is kept as a list, so that the same batches are held out.
    assert again.to_dict() == result.to_dict()


def test_all_choices_everywhere_are_among_the_points(result: SearchResult) -> None:
    for choice in CHOICES:
        assert any(set(p.assignment.values()) == {choice} for p in result.points)
    assert result.front[-1].measured.loss == 0.0


def test_the_model_simulates_what_was_chosen(result: SearchResult) -> None:
    assert result.model is not None
    assert result.plan is result.model.plan
    kinds = {group.name: result.plan.nodes[group.name].dtype for group in result.groups}
    assert kinds == {
        name: "" if choice == FLOAT else choice.activation
        for name, choice in result.chosen.assignment.items()
    }


def test_a_search_that_was_killed_goes_on(
    net: onnx.ModelProto,
    data: list[np.ndarray],
    result: SearchResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "state.json"
    judge, judged = evaluate.Evaluator.judge, []

    def failing(self: Any, model: Any) -> Any:
        if len(judged) == 3:
            raise KeyboardInterrupt
        judged.append(model)
        return judge(self, model)

    ask = {"budget": "bytes=50%", "points": 4, "resume": path, "progress": False}
    monkeypatch.setattr(evaluate.Evaluator, "judge", failing)
    with pytest.raises(KeyboardInterrupt):
        search(net, data, **ask)
    counted = []
    monkeypatch.setattr(
        evaluate.Evaluator, "judge", lambda self, model: counted.append(1) or judge(self, model)
    )
    assert search(net, data, **ask).to_dict() == result.to_dict()
    assert len(counted) == len(result.points) - 3
    counted.clear()
    assert search(net, data, **ask).to_dict() == result.to_dict()
    assert not counted


def test_the_state_of_another_search_is_refused(
    net: onnx.ModelProto, data: list[np.ndarray], tmp_path: Path
) -> None:
    path = tmp_path / "state.json"
    ask: dict[str, Any] = {"budget": "bytes=50%", "points": 2, "progress": False}
    search(net, data, resume=path, **ask)
    with pytest.raises(StatisticsError, match="of another search, by data"):
        search(net, data[1:], resume=path, **ask)
    with pytest.raises(StatisticsError, match="of another search, by samples"):
        search(net, data, resume=path, samples=8, **ask)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(StatisticsError, match="cannot be taken up again"):
        search(net, data, resume=path, **ask)


def test_the_metric_decides(net: onnx.ModelProto, data: list[np.ndarray]) -> None:
    def metric(model: qwrap.WrappedModel) -> float:
        plan = model.plan
        if plan is None:
            return 10.0
        return 10.0 - sum(node.dtype == "uint8" for node in plan.nodes.values())

    found = search(net, data, max_drop=2, along="bytes", metric=metric, points=4, progress=False)
    assert found.of_float.metric == 10.0
    assert found.chosen.measured.metric is not None
    assert found.chosen.measured.metric >= 8.0
    cheaper = [p for p in found.points if p.costs["bytes"] < found.chosen.costs["bytes"]]
    assert all(p.measured.metric is not None and p.measured.metric < 8.0 for p in cheaper)


def test_a_target_without_float_kernels_gets_what_it_runs(
    net: onnx.ModelProto, data: list[np.ndarray]
) -> None:
    config = qwrap.QConfig.for_target("qnn")
    choices = ["uint8/int8", "uint16/int8", "float32/int8"]
    found = search(
        net, data, max_drop=1e-2, choices=choices, config=config, points=2, progress=False
    )
    assert found.along == "bit_ops"
    assert found.plan is not None
    kinds = {node.dtype for node in found.plan.nodes.values() if node.role != "moves"}
    assert kinds <= {"uint8", "uint16"}


def test_latency_is_predicted_and_timed(
    net: onnx.ModelProto, data: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One round each: how well it predicts is tested where it is measured.
    table, once = prices.LatencyTable.measure, {"rounds": 1}
    monkeypatch.setattr(prices.LatencyTable, "measure", partial(table, mixes=1, **once))
    monkeypatch.setattr(prices, "measured_latencies", partial(prices.measured_latencies, **once))
    found = search(
        net, data, budget="latency=10 s", choices=[INT8, FLOAT], points=2, threads=1, progress=False
    )
    assert found.chosen.measured.loss == 0.0  # everything is within ten seconds
    assert all(p.latency is not None and p.latency > 0 for p in found.front)


def test_training_brings_the_chosen_model_closer(
    net: onnx.ModelProto, data: list[np.ndarray]
) -> None:
    found = search(
        net,
        data,
        budget="bytes=40%",
        choices=["uint8/int4", "float32"],
        points=2,
        finetune=40,
        progress=False,
    )
    assert found.tuned is not None
    assert found.tuned.loss < found.chosen.measured.loss


def test_a_result_is_read_as_it_was_written(
    result: SearchResult, net: onnx.ModelProto, data: list[np.ndarray], tmp_path: Path
) -> None:
    result.save(tmp_path / "result.json")
    read = SearchResult.load(tmp_path / "result.json")
    assert read.to_dict() == result.to_dict()
    assert read.summary() == result.summary()
    model = qwrap.load(net).eval()
    read.apply(model, data, progress=False)
    assert model.plan.to_dict()["nodes"] == result.plan.to_dict()["nodes"]


def test_a_damaged_result_is_refused(result: SearchResult, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    content = result.to_dict()
    for name, wrong in (("chosen", 999), ("groups", [["a"]]), ("points", [{}]), ("float", None)):
        path.write_text(json.dumps({**content, name: wrong}))
        with pytest.raises(StatisticsError, match="is damaged"):
            SearchResult.load(path)
    path.write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(StatisticsError, match="version 2"):
        SearchResult.load(path)
    path.write_text("{}")
    with pytest.raises(StatisticsError, match="no result of a search"):
        SearchResult.load(path)


def test_the_summary_marks_what_was_chosen(result: SearchResult) -> None:
    lines = str(result).splitlines()
    assert (
        lines[0]
        == f"bytes=50%: {len(result.points)} assignments evaluated; * is chosen, - dominated"
    )
    (row,) = [line for line in lines if line.startswith("*")]
    assert f"{result.chosen.costs['bytes']:.0f}" in row
    assert f"{result.chosen.measured.loss:.4g}" in row


def test_the_front_is_drawn(result: SearchResult, tmp_path: Path) -> None:
    result.plot(tmp_path / "front.svg")
    assert "evaluated" in (tmp_path / "front.svg").read_text()
    with pytest.raises(ConfigError, match="no image form 'txt'"):
        result.plot(tmp_path / "front.txt")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give a budget"),
        ({"budget": Budget()}, "limits nothing"),
        ({"budget": "bytes=1 B"}, r"no choice of types is within bytes of 1; the nearest"),
        ({"budget": "bytes=50%", "along": "weight"}, "along='weight'"),
        ({"max_drop": -1}, "max_drop=-1"),
        (
            {"budget": "latency=1 ms", "config": qwrap.QConfig.for_target("qnn")},
            "on this CPU, and the target is 'qnn'",
        ),
        ({"budget": "bytes=50%", "points": 1}, "points=1"),
        ({"budget": "bytes=50%", "samples": 0}, "samples=0"),
        ({"budget": "bytes=50%", "finetune": 0}, "finetune=0"),
        ({"budget": "bytes=50%", "measure": "sqnr"}, "losses have to add up"),
        ({"budget": "bytes=50%", "held_out": 0}, "held_out=0"),
        ({"budget": "bytes=50%", "choices": ["uint8/int8"]}, "two or more"),
    ],
)
def test_what_makes_no_sense_is_refused_before_work_is_done(
    net: onnx.ModelProto, data: list[np.ndarray], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(net, data, progress=False, **given)


def test_a_quantized_model_is_refused(net: onnx.ModelProto, data: list[np.ndarray]) -> None:
    model = qwrap.load(net)
    qwrap.prepare(model)
    with pytest.raises(ConfigError, match="prepared or quantized already"):
        search(model, data, budget="bytes=50%", progress=False)


def test_a_metric_that_is_no_number_is_refused(
    net: onnx.ModelProto, data: list[np.ndarray]
) -> None:
    with pytest.raises(InputError, match="the float model: the metric is nan"):
        search(
            net, data, budget="bytes=50%", metric=lambda _: float("nan"), points=2, progress=False
        )
