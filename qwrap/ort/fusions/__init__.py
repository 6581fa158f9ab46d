"""Patterns of nodes that one operator computes."""

from qwrap.ort.fusions.fusion import Fusion
from qwrap.ort.fusions.fusion_gelu import FusionGelu
from qwrap.ort.fusions.fusion_layernorm import FusionLayerNormalization
from qwrap.ort.fusions.replace_upsample_with_resize import ReplaceUpsampleWithResize

__all__ = ["Fusion", "FusionGelu", "FusionLayerNormalization", "ReplaceUpsampleWithResize"]
