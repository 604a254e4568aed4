"""One file a statistic: what is measured inside a model during a calibration pass."""
