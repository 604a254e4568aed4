"""Attention that a model is trained with and is rid of afterwards, one file a method."""
