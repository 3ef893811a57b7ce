"""Benchmarks of family attention."""
