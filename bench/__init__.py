"""Benchmarks: `python -m bench` (or `make bench`). One folder a family; results in bench/results/."""
