"""Tables of ranges."""

from qwrap.quant.tables.forms import FORMS
from qwrap.quant.tables.range_table import RangeTable
from qwrap.quant.tables.tensor_range import TensorRange

__all__ = ["FORMS", "RangeTable", "TensorRange"]
