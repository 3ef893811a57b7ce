"""Benchmarks of family norm."""
