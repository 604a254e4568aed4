"""What a cut model is trained for, one file a method."""
