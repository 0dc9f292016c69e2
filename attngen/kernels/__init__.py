"""The formulas of `attngen.methods` as code that runs: one file a path."""
