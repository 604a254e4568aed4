"""Methods that learn masks by training, one file a method; they share the loop of healing."""
