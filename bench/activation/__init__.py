"""Benchmarks of family activation."""
