"""What modules save besides tensors, packed as a tensor."""

import json

import pytest
import torch
from safetensors import SafetensorError

from qwrap.model.extra_state import from_tensor, to_tensor

STATE = {
    "text": "a_0",
    "numbers": [1, -2.5, float("inf"), 2**53, True, None],
    "tensors": {
        "counts": torch.arange(6).reshape(2, 3),
        "none": torch.zeros(0, 2),
        "x": [torch.ones(())],
    },
    "tensor": "the name of a key",
    "items": {},
}


def test_a_state_comes_back_with_types_shapes_and_values() -> None:
    packed = to_tensor(STATE)
    assert (packed.dtype, packed.dim()) == (torch.uint8, 1)
    found = from_tensor(packed)
    assert found.keys() == STATE.keys()
    for key in ("text", "numbers", "tensor", "items"):
        assert found[key] == STATE[key]
    for name in ("counts", "none"):
        assert found["tensors"][name].dtype == STATE["tensors"][name].dtype
        assert torch.equal(found["tensors"][name], STATE["tensors"][name])
    assert torch.equal(found["tensors"]["x"][0], torch.ones(()))


def test_a_number_that_grows_keeps_the_size() -> None:
    assert to_tensor({"seen": 1}).shape == to_tensor({"seen": 10**12}).shape


def test_a_state_without_memory_stays_as_it_is() -> None:
    state = {"x": torch.ones(2, device="meta")}
    assert to_tensor(state) is state


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises((SafetensorError, json.JSONDecodeError)):
        from_tensor(torch.zeros(64, dtype=torch.uint8))
