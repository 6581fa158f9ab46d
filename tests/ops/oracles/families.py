"""All generators: importing a family registers its own."""

from oracles import elementwise, flow, indexing, quantized, reductions, shapes, states, windows
from oracles.variants import GENERATORS, revisions

FAMILIES = (elementwise, flow, indexing, quantized, reductions, shapes, states, windows)
REVISIONS = [(s.name, s.since_version) for s in revisions() if s.name in GENERATORS]
