"""BatchNorm, ReLU and scSE as one operator: one map is saved for the backward, the input.

The layers are those of the package itself: `modules` -> `functional` -> `autograd` -> `ops`.
`reference` is the definition and has the derivation of the backward.
"""

from .functional import bn_relu_scse
from .modules import BatchNormReLUSCSE

__all__ = ["BatchNormReLUSCSE", "bn_relu_scse"]
