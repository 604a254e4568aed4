"""One file a diagnostic: a measurement that explains a model rather than judging it."""
