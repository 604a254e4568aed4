"""What every room shares: errors, progress, files, the registry, recipes. Knows no model."""
