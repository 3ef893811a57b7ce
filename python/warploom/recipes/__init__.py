"""Training, generation and demonstration: whole jobs built on ``warploom.models``.

The modules here need packages that the library itself does not (``tokenizers``, ``rich``,
``matplotlib``, ``transformers``): they come with ``pip install "warploom[demo]"``. Importing the
modules needs none of them.
"""
