"""The types of arguments that have names of their own."""

from typing import Literal, TypeAlias

import torch

#: How scSE combines its branches.
Combine: TypeAlias = Literal["add", "max", "mul", "concat"]
#: Who computes.
Backend: TypeAlias = Literal["auto", "eager", "cpu", "cuda", "triton"]
#: Where a layer's parameters are, as torch's own layers take it.
Device: TypeAlias = torch.device | str | int | None
