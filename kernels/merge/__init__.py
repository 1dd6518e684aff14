"""Means of weight slices over the colors of an axis."""
