"""Whatever is put in place of whatever a file says, it is read or refused, and nothing else."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwrap.dtypes import INT4, INT8, UINT8
from qwrap.errors import TableError
from qwrap.quant.tables import FORMS, TensorRange
from qwrap.quant.tables.contents import Contents
from qwrap.quant.tables.forms import decode_table, encode_table

ONES = np.ones((2, 3), np.float32)
ENTRIES = {
    "x": TensorRange(-1, 3, scale=0.5, zero_point=2, dtype=UINT8),
    "s": TensorRange(-1, 3, scale=0.5, dtype=INT8),
}
CHANNELS = TensorRange([-1, -2], [1, 2], scale=[1, 2], dtype=INT8, axis=0, stored=True)
BLOCKS = TensorRange(-ONES, ONES, scale=ONES, dtype=INT4, axis=0, block_size=4, stored=True)
LPBQ = {
    "aimet-1.0.0": {
        "version": "1.0.0",
        "param_encodings": [
            {"name": "x", "enc_type": "LPBQ", "bw": 8, "compressed_bw": 4, "block_size": 64}
            | {"is_sym": True, "scale": [0.5, 1], "per_block_int_scale": [1, 2, 3, 4]}
        ],
    },
    "aimet-2.0.0": {
        "version": "2.0.0",
        "encodings": [
            {"name": "x", "output_dtype": "int4", "axis": 0, "block_size": 8}
            | {"per_block_int_scale": [[1, 2]], "per_channel_float_scale": [[0.5, 0.1]]}
        ],
    },
}
JUNK = [
    *(None, True, 0, -1, 1, -128, 0.5, 2**63, 10**30, 1e300, 1e-300, float("nan"), float("inf")),
    *("", "x", "1", "True", "int8", "uint99", "float", [], [[]], {}, [None], ["a"], [1, [2]]),
    *([[1], [2, 3]], [True, 1.0], [1e300] * 3, {"a": 1}),
    *({"CLS": "numpy.array", "data": d, "dtype": t} for d in ([1, 2], "x") for t in ("int8", [])),
]


def files(form: str) -> list[Any]:
    """Parsed files of a form that say all that it can hold."""
    ranges = dict(ENTRIES)
    if form.startswith(("aimet", "qnn")):
        ranges["w"] = CHANNELS
    if form in LPBQ:
        ranges["b"] = BLOCKS
    written = json.loads(encode_table(Contents(ranges=ranges), form))
    return [written, LPBQ[form]] if form in LPBQ else [written]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every (container, key) in a JSON value."""
    for key in range(len(value)) if isinstance(value, list) else list(value):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


@pytest.mark.parametrize(
    "form", [form for form in FORMS if form == "onnxruntime" or "tensorrt" not in form]
)
def test_a_changed_file_is_read_or_refused(form: str) -> None:
    rng = random.Random(0)
    read = refused = 0
    for document in files(form) * 200:
        changed = copy.deepcopy(document)
        container, key = rng.choice(list(places(changed)))
        container[key] = copy.deepcopy(rng.choice(JUNK))
        if is_refused(json.dumps(changed).encode(), form):
            refused += 1
        else:
            read += 1
    assert read
    assert refused > read


def is_refused(data: bytes, form: str) -> bool:
    try:
        decode_table(data, form)
    except TableError:
        return True
    return False
