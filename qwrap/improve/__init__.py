"""Which algorithms a calibrated model goes through, and what happens if they are not enough."""
