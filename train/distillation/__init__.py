"""Teaching a finished model cheaper layers."""
