"""The parts of ``QDQQuantizer``: what is marked, with which parameters, and the new graph."""
