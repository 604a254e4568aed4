"""Which keys a query reads: one file a pattern, each one elementwise rule; `_engine` derives the rest."""
