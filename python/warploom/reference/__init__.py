"""What each op means, in plain PyTorch: the oracle of the tests and the last fallback.

Each module holds one family; each function has the op's positional signature and takes float64 too.
"""
