"""Ranges as tables for TensorRT."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from qwrap.graph import replace_file
from qwrap.ort.calibration.cache import CalibrationCacheEncoder
from qwrap.ort.calibration.tensor_data import TensorData, TensorsData
from qwrap.ort.errors import QuantizationError

_LOG = logging.getLogger(__name__)


def write_calibration_table(
    calibration_cache: TensorsData | Mapping[str, TensorData],
    dir: str | Path = ".",  # noqa: A002  # onnxruntime's
) -> None:
    """Write ranges to three files: ``calibration.json``, ``.flatbuffers`` and ``.cache``.

    The first holds all that is known of each tensor, the others the larger magnitude of its ends,
    which TensorRT takes for the range: of ``[-200, 10]`` it is 200.

    Args:
        calibration_cache: what ``compute_data`` returned, or ranges by tensor.
        dir: an existing folder.

    Raises:
        QuantizationError: a tensor has no range, or its name holds a line break, which the
            ``.cache`` cannot tell from the end of a line (a ``ValueError``).
        ExportError: the folder does not exist or cannot be written to.
        ModuleNotFoundError: the package flatbuffers is missing.
    """
    folder = Path(dir)
    ranges = dict(calibration_cache.items())
    values = {name: str(_magnitude(name, ranges[name])) for name in sorted(ranges)}
    table = _flatbuffer(values)
    whole = calibration_cache if isinstance(calibration_cache, TensorsData) else ranges
    text = json.dumps(whole, cls=CalibrationCacheEncoder)
    lines = "".join(f"{name} {value}\n" for name, value in values.items())
    for file, data in (("json", text.encode()), ("flatbuffers", table), ("cache", lines.encode())):
        replace_file(folder / f"calibration.{file}", partial(_write, data))
    if os.environ.get("QUANTIZATION_DEBUG", "0") == "1":
        _log_entries(table)


def _write(data: bytes, draft: Path) -> None:
    draft.write_bytes(data)


def _magnitude(name: str, data: TensorData) -> float:
    """Return the larger magnitude of the ends of all channels."""
    if "\n" in name or "\r" in name:
        raise QuantizationError(f"tensor {name!r}: a calibration table has one line for a tensor")
    try:
        ends = data.range_value
    except AttributeError as error:
        raise QuantizationError(f"tensor {name!r} has no range: {error}") from error
    return float(max(np.abs(end).max() for end in ends))


def _flatbuffer(values: Mapping[str, str]) -> bytes:
    import flatbuffers  # only writers of tables need it

    from qwrap.ort.CalTableFlatBuffers import KeyValue, TrtTable

    builder = flatbuffers.Builder(1024)
    entries = []
    for name, value in values.items():
        key, text = builder.CreateString(name), builder.CreateString(value)
        KeyValue.Start(builder)
        KeyValue.AddKey(builder, key)
        KeyValue.AddValue(builder, text)
        entries.append(KeyValue.End(builder))
    TrtTable.StartDictVector(builder, len(entries))
    for entry in entries:
        builder.PrependUOffsetTRelative(entry)
    vector = builder.EndVector()
    TrtTable.Start(builder)
    TrtTable.AddDict(builder, vector)
    builder.Finish(TrtTable.End(builder))
    return bytes(builder.Output())


def _log_entries(table: bytes) -> None:
    from qwrap.ort.CalTableFlatBuffers.TrtTable import TrtTable

    read = TrtTable.GetRootAsTrtTable(table, 0)
    for index in range(read.DictLength()):
        entry = read.Dict(index)
        assert entry is not None
        _LOG.info("%s %s", (entry.Key() or b"").decode(), (entry.Value() or b"").decode())
