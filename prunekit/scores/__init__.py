"""One file a score: how important a unit is, from weights or from statistics of a calibration pass."""
