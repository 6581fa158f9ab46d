"""Well-known networks as plain torch modules with random weights, and their ONNX exports.

Each is written from its paper with the module names of the implementation that people use
(torchvision, Hugging Face transformers), so that exported names look as they do in the wild.
"""

from networks.catalogue import NETWORKS, Network
from networks.exporting import EXPORTERS, export

__all__ = ["EXPORTERS", "NETWORKS", "Network", "export"]
