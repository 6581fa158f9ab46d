"""What calibration observed, as a value and as a file."""
