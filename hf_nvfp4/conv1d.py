"""GPT-2's Conv1D, a linear layer with its weight transposed, with the GEMMs of a recipe.

Knows the layout of its weight; a layer's numerics are linear.py's.
"""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_nvfp4.linear import NVFP4Layer


class NVFP4Conv1D(NVFP4Layer, Conv1D):
    """A Conv1D that multiplies as a recipe says. Same parameters, same names, same state dict: weight [K, N].

    Made of one, by `convert`; casts see its weight as [N, K], like that of `nn.Linear`.
    """

    __repr__ = nn.Module.__repr__  # Conv1D's own shows neither recipe nor backend

    @property
    def in_features(self) -> int:
        """K."""
        return self.nx

    @property
    def out_features(self) -> int:
        """N."""
        return self.nf

    @property
    def matrix(self) -> Tensor:
        """The weight as [N, K], a view."""
        return self.weight.t()
