"""Key-value caches of exported decoders as codes of 8 or 4 bits."""

from qwrap.kv_cache.cache import KVCache, KVCaches
from qwrap.kv_cache.quantize import quantize_kv_cache

__all__ = ["KVCache", "KVCaches", "quantize_kv_cache"]
