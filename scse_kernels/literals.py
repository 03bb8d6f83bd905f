"""The types of arguments that have names of their own."""

from typing import Literal, TypeAlias

import torch

#: How scSE combines its branches, in the order of the operators' codes.
Combine: TypeAlias = Literal["add", "max", "mul", "concat"]
#: What follows the hidden layer, in the order of the operators' codes.
Activation: TypeAlias = Literal["relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "elu", "none"]
#: What closes both branches, in the order of the operators' codes.
Gate: TypeAlias = Literal["sigmoid", "hard_sigmoid"]
#: Who computes.
Backend: TypeAlias = Literal["auto", "eager", "cpu", "cuda", "triton"]
#: Where a layer's parameters are, as torch's own layers take it.
Device: TypeAlias = torch.device | str | int | None
