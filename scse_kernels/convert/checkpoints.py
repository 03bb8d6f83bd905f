"""convert_state_dict: checkpoints of one library's blocks for a model with another's."""

import copy
import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from .layouts import LAYOUTS, Layout, check_shapes, find
from .shapes import Unfit


def convert_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    """Rename and reshape the squeeze & excitation parameters in `state_dict` to fit `model`.

    Wherever `model` has a block and `state_dict` has, under the same name, the parameters of any of
    the layouts in `layouts.LAYOUTS`, these get the keys and shapes of the model's block. So a
    checkpoint moves between libraries, and between 2-D and 3-D blocks. Everything else stays; a
    warning tells of keys that the model has nothing for.
    How the branches combine is not in a state_dict. It must be the same in both models.

    Args:
        state_dict: as saved; it isn't changed.
        model: any of the libraries' networks, converted or not, or one of scse_kernels' layers.

    Returns:
        A shallow copy for `model.load_state_dict`, its values views of state_dict's.

    Raises:
        ValueError: the parameters under a block's name aren't those of cSE, sSE or scSE.
    """
    result = copy.copy(state_dict)  # keeps the attribute _metadata
    for path, block in model.named_modules(remove_duplicate=False):
        target = find(block)
        prefix = f"{path}." if path else ""
        source = target and _stored(state_dict, prefix, target)
        if source is None or not _fits(block, target):
            continue
        layers = {path: state_dict[f"{prefix}{path}.weight"].shape for path in _paths(source)}
        try:
            check_shapes(source, layers)
        except Unfit as reason:
            raise ValueError(
                f"convert_state_dict(): the parameters of {path or 'the model'} don't fit: {reason}"
            ) from None
        for old, new in zip(_paths(source), _paths(target), strict=True):
            for name, own in block.get_submodule(new).named_parameters():
                value = result.pop(f"{prefix}{old}.{name}", None)
                if value is not None:
                    # Where the number of channels differs, load_state_dict will say so.
                    same = value.numel() == own.numel()
                    result[f"{prefix}{new}.{name}"] = value.reshape(own.shape) if same else value
    known = model.state_dict().keys()
    if unknown := [key for key in result if key not in known]:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        warnings.warn(
            f"convert_state_dict(): the model has no parameter or buffer for {len(unknown)} of"
            f" {len(result)} keys, which stay as they are: {shown}",
            stacklevel=2,
        )
    return result


def _paths(layout: Layout) -> list[str]:
    return [path for path in layout[1:] if path is not None]


def _stored(state_dict: Mapping[str, Tensor], prefix: str, target: Layout) -> Layout | None:
    """The layout in which the state_dict has the branches that `target` has."""
    for layout in LAYOUTS:
        if [path is None for path in layout[1:]] == [path is None for path in target[1:]] and all(
            f"{prefix}{path}.weight" in state_dict for path in _paths(layout)
        ):
            return layout
    return None


def _fits(block: nn.Module, layout: Layout) -> bool:
    """Whether it is a block, and not a classifier, say, that happens to have an fc1 and an fc2."""
    try:
        weights = {path: block.get_submodule(path).weight.shape for path in _paths(layout)}
        check_shapes(layout, weights)
    except (AttributeError, Unfit):
        return False
    return True
