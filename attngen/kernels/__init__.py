"""Implementations of the formulas of `attngen.methods`: one file each."""
