"""Other kinds of attention for a trained `Llama`: fewer key/value heads, or latents.

Each function says when it is exact; elsewhere its model is a start for further training.
"""

from warploom.convert.grouped_query import mha_to_gqa
from warploom.convert.latent import gqa_to_mla

__all__ = ["gqa_to_mla", "mha_to_gqa"]
