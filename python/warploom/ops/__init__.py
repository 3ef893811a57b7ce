"""The public functions, one module a family; each op's schema stands beside its function."""
