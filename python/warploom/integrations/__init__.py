"""Routes by which other libraries run their attention on warploom, each switched on by one call.

Importing a module of this package changes nothing: `transformers.register` and `torch_attention.register` do.
"""
