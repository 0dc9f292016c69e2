"""Makers of the committed results and of their pages."""
