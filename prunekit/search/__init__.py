"""One file a search: methods that run the cut model to decide what goes next."""
