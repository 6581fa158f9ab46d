"""Weights that lie in files beside the model: mapped once a file, read when used.

A file stays readable through what was opened when the model was loaded, even if another file takes
its name: an export may replace the data that the model came from.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

Array = npt.NDArray[Any]

BLOCK = 1 << 24  # bytes copied or compared at once
PAGEMAP = Path("/proc/self/pagemap")  # Linux: one word a page of this process
WORD = 8  # bytes
PRESENT, SWAPPED, OF_FILE = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61))


class DataFile:
    """One file of weights, open for as long as something of it is in use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._mapped: Array | None = None
        self._copies: list[weakref.ref[Array]] = []

    @property
    def is_current(self) -> bool:
        """Whether the path still names the file that was opened."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except OSError:
            return False

    def bytes_at(self, offset: int, size: int) -> Array:
        """Return a read-only view of ``size`` bytes."""
        if self._mapped is None:
            self._mapped = self._map(mmap.ACCESS_READ)
        return self._mapped[offset : offset + size]

    def blocks(self, offset: int, size: int) -> Iterator[bytes]:
        """Yield ``size`` bytes in blocks, each in memory only while it is used."""
        for start in range(0, size, BLOCK):
            yield self._read(offset + start, min(BLOCK, size - start))

    def _read(self, offset: int, size: int) -> bytes:
        if not hasattr(os, "pread"):  # Windows
            return self.bytes_at(offset, size).tobytes()
        return read_exactly(self._descriptor, offset, size)

    def private_copy(self) -> Array:
        """Return the whole file as bytes that may be written to; the file never changes.

        Pages are read when used and copied when written to.
        """
        copy = self._map(mmap.ACCESS_COPY)
        self._copies = [known for known in self._copies if known() is not None]
        self._copies.append(weakref.ref(copy))
        return copy

    def is_private_copy(self, address: int, offset: int) -> bool:
        """Whether ``address`` is where one of the private copies has byte ``offset``."""
        alive = (known() for known in self._copies)
        return any(copy is not None and copy.ctypes.data + offset == address for copy in alive)

    def _map(self, access: int) -> Array:
        return np.frombuffer(mmap.mmap(self._descriptor, 0, access=access), np.uint8)


def read_exactly(descriptor: int, offset: int, size: int) -> bytes:
    """Return ``size`` bytes from ``offset`` on, however many calls that takes.

    Raises:
        OSError: the file ends before.
    """
    parts: list[bytes] = []
    while size:
        part = os.pread(descriptor, size, offset)
        if not part:
            raise OSError("the file was cut off while it was read")
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class FileTensor(ir.ExternalTensor):
    """An external tensor that is read through a ``DataFile`` it shares with its neighbours.

    onnx_ir's own opens and maps the whole file again for every tensor, and by name, whichever file
    has that name by then.
    """

    def __init__(self, tensor: ir.ExternalTensor, file: DataFile) -> None:
        super().__init__(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
            base_dir=tensor.base_dir,
        )
        self.file = file

    @property
    def start(self) -> int:
        """Where its data begins in the file, in bytes."""
        return self.offset or 0

    def numpy(self) -> Array:
        """Return its values; those stored as they are count as memory only when looked at."""
        if self._array is None:
            raw = self.file.bytes_at(self.start, self.nbytes)
            self._array = _as_array(raw, self)
        return self._array

    def __array__(self, dtype: Any = None) -> Array:
        return self.numpy().__array__(dtype)

    def tobytes(self) -> bytes:
        """Return its data as stored."""
        return b"".join(self.file.blocks(self.start, self.nbytes))

    def tofile(self, file: BinaryIO) -> None:
        """Write its data as stored to an open file."""
        for block in self.file.blocks(self.start, self.nbytes):
            file.write(block)

    @property
    def is_plain(self) -> bool:
        """Whether an array can be a view of the file: whole bytes, aligned, in this byte order."""
        dtype = self.dtype
        whole = dtype != ir.DataType.STRING and dtype.bitwidth % 8 == 0
        aligned = whole and self.start % max(1, dtype.bitwidth // 8) == 0
        return aligned and sys.byteorder == "little" and self.size > 0


def _as_array(raw: Array, tensor: ir.ExternalTensor) -> Array:
    """Decode the bytes of a tensor; whole bytes stay a view of them."""
    shape = tensor.shape.numpy()
    if tensor.dtype.bitwidth % 8 == 0:
        kind = np.dtype(tensor.dtype.numpy()).newbyteorder("<")
        return raw.view(kind).reshape(shape) if raw.size else np.empty(shape, kind)
    packed = onnx.TensorProto(dims=shape, data_type=int(tensor.dtype), raw_data=raw.tobytes())
    return ir.tensor(packed).numpy()


def written_to(address: int, size: int) -> bool:
    """Say whether memory of a private copy may have been written to.

    A page of a private mapping is the file's until its first write. A page that was never looked
    at is neither present nor swapped out. Where the system cannot tell, it may.

    Source: Linux, Documentation/admin-guide/mm/pagemap.rst.
    """
    first, last = address // mmap.PAGESIZE, -(-(address + size) // mmap.PAGESIZE)
    try:
        with PAGEMAP.open("rb", buffering=0) as table:
            words = read_exactly(table.fileno(), first * WORD, (last - first) * WORD)
    except OSError:
        return True
    flags = np.frombuffer(words, np.uint64)
    resident = (flags & (PRESENT | SWAPPED)) != 0
    return bool((resident & ((flags & OF_FILE) == 0)).any())
