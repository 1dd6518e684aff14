"""Partition of rows into colors."""
