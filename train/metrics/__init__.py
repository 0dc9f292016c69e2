"""Distances between sets of images, and the networks and statistics that they are made of."""
