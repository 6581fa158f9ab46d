"""Which graph inputs and outputs are caches, by name, by the way through the graph, or as told."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qwrap
from qwrap.errors import ConfigError, InputError, ModelError, NotCalibratedError
from qwrap.kv_cache.names import is_past, is_present, role, slot


@pytest.mark.parametrize(
    ("past", "present", "holds"),
    [
        ("past_key_values.0.key", "present.0.key", "key"),
        ("past_key_values.3.decoder.value", "present.3.decoder.value", "value"),
        ("past_key_values.3.encoder.value", "present.3.encoder.value", "value"),
        ("past_key_self_0", "present_key_self_0", "key"),
        ("past_key_cross_0", "present_key_cross_0", "key"),
        ("past_0", "present_0", ""),
        ("past_key_values_1_value", "present_key_values.1.value", "value"),
        ("cache_k_3", "new_cache_k_3", "key"),
        ("k_cache_0", "k_cache_out_0", "key"),
        ("kvCacheIn2", "kvCacheOut2", ""),
    ],
)
def test_names_of_inputs_and_outputs_meet(past: str, present: str, holds: str) -> None:
    assert is_past(past)
    assert is_present(present)
    assert slot(past) == slot(present)
    assert role(past) == role(present) == holds


def test_layers_keys_and_encoders_are_kept_apart() -> None:
    names = [
        f"past_key_values.{i}.{a}.{b}"
        for i in "01"
        for a in ("encoder", "decoder")
        for b in ("key", "value")
    ]
    assert len({slot(name) for name in names}) == len(names)
    assert not is_present("logits")


def ends(report: Any) -> list[tuple[str | None, str | None]]:
    return [(c.past, c.present) for c in report.caches]


def test_caches_are_found_whatever_they_are_called(kv: Any, tmp_path: Path) -> None:
    names = {"past_0_key": "a", "past_0_value": "b", "present_0_key": "c", "present_0_value": "d"}
    report = qwrap.quantize_kv_cache(
        kv.model(names=names), tmp_path / "q.onnx", kv.batches(), progress=False
    )
    assert ends(report) == [("a", "c"), ("b", "d")]
    assert [c.role for c in report.caches] == ["", ""]


def test_patterns_and_pairs_choose(kv: Any, tmp_path: Path) -> None:
    def chosen(*caches: Any) -> Any:
        path = tmp_path / "q.onnx"
        report = qwrap.quantize_kv_cache(
            kv.model(), path, kv.batches(), caches=caches, progress=False
        )
        assert kv.decoder(path).types["past_0_value"] == (
            "tensor(int8)" if len(report) > 1 else "tensor(float)"
        )
        return ends(report)

    assert chosen("*key") == [("past_0_key", "present_0_key")]
    both = [("past_0_key", "present_0_key"), ("past_0_value", "present_0_value")]
    assert chosen(*both) == both


def test_what_is_not_there_is_named(kv: Any, tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"

    def refused(error: type[Exception], match: str, model: Any = None, **changes: Any) -> None:
        arguments = {"batches": kv.batches(), "progress": False, **changes}
        with pytest.raises(error, match=match):
            qwrap.quantize_kv_cache(model or kv.model(), path, **arguments)
        assert not path.exists()

    refused(ConfigError, "nothing fits 'layer\\*'; found \\['past_0_key'", caches=["layer*"])
    refused(ConfigError, "called 'past_0_keys'; 'past_0_key'", caches=[("past_0_keys", None)])
    refused(ConfigError, "dtype='int16'", dtype="int16")
    refused(ConfigError, "keys='token'", keys="token")
    odd_size = kv.model(past="float[batch,2,past,7]")
    refused(ConfigError, "'past_0_key': 7 channels", model=odd_size, dtype="int4")
    refused(ConfigError, "give batches, or like=", batches=None)
    refused(InputError, "no batches", batches=[])
    refused(InputError, "batch 0: .*input_ids", batches=[{"ids": kv.tokens()}])
    refused(NotCalibratedError, "past_0_key", batches=[{"input_ids": kv.tokens(0)}])
    odd = kv.model("y = Relu(x)")
    del odd.graph.input[:], odd.graph.output[:]
    odd.graph.input.append(onnx.helper.make_tensor_value_info("x", 1, ["b", 3]))
    odd.graph.output.append(onnx.helper.make_tensor_value_info("y", 1, ["b", 3]))
    refused(ModelError, r"found no cache: .* inputs are x float\['b', 3\]", model=odd)


def test_a_prompt_and_a_step_in_files_of_their_own_share_scales(kv: Any, tmp_path: Path) -> None:
    prompt = kv.model(
        kv.projected
        + "present_0_key = Identity(k) present_0_value = Identity(v)"
        + kv.attended
        + kv.merged
    )
    del prompt.graph.input[1:]
    step = kv.model()
    first = qwrap.quantize_kv_cache(prompt, tmp_path / "p.onnx", kv.batches(), progress=False)
    assert ends(first) == [(None, "present_0_key"), (None, "present_0_value")]
    both = qwrap.quantize_kv_cache(step, tmp_path / "s.onnx", like=first, progress=False)
    ids = kv.tokens()
    one, two = kv.decoder(tmp_path / "p.onnx"), kv.decoder(tmp_path / "s.onnx")
    _, *past = one.session.run(None, {"input_ids": ids[:, :12]})
    logits, caches = two.run(ids[:, 12:], past=dict(zip(two.caches, past, strict=True)))
    expected, same = two.run(ids)
    np.testing.assert_allclose(logits, expected[:, 12:], atol=1e-5)  # sums of another order
    np.testing.assert_array_equal(caches["past_0_key"], same["past_0_key"])
    with pytest.raises(ConfigError, match="int8 per head there, and uint8 per head here"):
        qwrap.quantize_kv_cache(step, tmp_path / "s.onnx", like=first, dtype="uint8")
    assert both["past_0_key"].form == "codes"


def test_chunks_and_whole_sequences_see_the_same(kv: Any, tmp_path: Path) -> None:
    scales = [
        qwrap.quantize_kv_cache(
            kv.model(), tmp_path / "q.onnx", kv.batches(), chunk=chunk, progress=False
        )["past_0_key"].scale
        for chunk in (None, 1, 7)
    ]
    np.testing.assert_allclose(scales[0], scales[1], rtol=1e-6)  # sums of another order
    np.testing.assert_allclose(scales[0], scales[2], rtol=1e-6)


def test_the_same_data_gives_the_same_file(kv: Any, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.onnx", "b.onnx")]
    for file in files:
        qwrap.quantize_kv_cache(kv.model(), file, kv.batches(), keys="channel", progress=False)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_weights_stay_outside_and_a_failure_leaves_the_file(kv: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "float.onnx", tmp_path / "q.onnx"
    onnx.save(kv.model(), source, save_as_external_data=True, size_threshold=0)
    qwrap.quantize_kv_cache(source, target, kv.batches(), external_data=True, progress=False)
    assert (tmp_path / "q.onnx.data").exists()
    before = target.read_bytes()
    with pytest.raises(InputError):
        qwrap.quantize_kv_cache(source, target, [{}], progress=False)
    assert target.read_bytes() == before
    kv.decoder(target).run(kv.tokens())
