"""Other formats of a checkpoint folder, and the proof that a written folder works."""
