"""Benchmarks of family rope."""
