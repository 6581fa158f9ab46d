"""Simulated quantization on a wrapped model: place, observe, calibrate, run exactly."""
