"""What modules save besides tensors, as tensors: many formats of checkpoints hold nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

SUFFIX = "_extra_state"
_TREE = "tree"
_STEP = 512  # sizes are multiples of it, so that a state which has grown a little still fits


def pack(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Make tensors of the extra states below ``prefix``, in place; a ``state_dict`` post-hook."""
    del module, local_metadata
    for key, value in state_dict.items():
        if key.startswith(prefix) and key.endswith(SUFFIX) and isinstance(value, Mapping):
            state_dict[key] = to_tensor(value)


def unpack(state_dict: dict[str, Any], prefix: str) -> None:
    """Make extra states of these tensors again, in place."""
    for key, value in state_dict.items():
        if key.startswith(prefix) and key.endswith(SUFFIX) and isinstance(value, Tensor):
            state_dict[key] = from_tensor(value)


def to_tensor(state: Mapping[str, Any]) -> Tensor | Mapping[str, Any]:
    """Return a state as uint8 ``[N]`` in the form of a safetensors file; a state on meta as it is.

    Args:
        state: numbers, texts, None, tensors, and lists and mappings from text of all these.
    """
    tensors: dict[str, Tensor] = {}

    def without_tensors(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().contiguous()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, Mapping):
            return {"items": {key: without_tensors(item) for key, item in value.items()}}
        return [*map(without_tensors, value)] if isinstance(value, (list, tuple)) else value

    tree = without_tensors(state)
    if any(tensor.is_meta for tensor in tensors.values()):
        return state
    text = json.dumps(tree).encode()
    padded = text + b" " * (-len(text) % _STEP)
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    content = save({**tensors, _TREE: torch.frombuffer(bytearray(padded), dtype=torch.uint8)})
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def from_tensor(packed: Tensor) -> Any:
    """Return the state that ``to_tensor`` was given; nothing in it is executed."""
    tensors = load(packed.cpu().contiguous().numpy().tobytes())

    def with_tensors(value: Any) -> Any:
        if isinstance(value, list):
            return [*map(with_tensors, value)]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: with_tensors(item) for key, item in value["items"].items()}

    return with_tensors(json.loads(tensors[_TREE].numpy().tobytes()))
