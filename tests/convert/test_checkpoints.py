"""convert_state_dict: every library's keys and shapes from every other's."""

import itertools

import pytest
import torch
from budget import make_case
from peers import Both, Channel, MonaiSE, OldSmp, Smp, Spatial, TimmSE, TimmSqueezeExcite
from torch import nn

import scse_kernels as ours
from scse_kernels import convert, convert_state_dict

#: Blocks whose parameters mean the same: {name: (makes the block, the spatial axes it takes)}
SCSE = {
    "ai-med": lambda: Both(12, 4, 2, torch.add),
    "pytorch-3dunet": lambda: Both(12, 4, 3, torch.add),
    "smp": lambda: Smp(12, 4),
    "smp 3d": lambda: Smp(12, 4, 3),
    "ours": lambda: ours.ChannelSpatialSELayer(12, 4),
    "our 3d": lambda: ours.ChannelSpatialSELayer3D(12, 4, combine="add"),
    "our smp": lambda: ours.SCSEModule(12, 4),
}
CSE = {
    "ai-med": lambda: Channel(12, 4),
    "MONAI": lambda: MonaiSE(2, 12, 4),
    "timm": lambda: TimmSE(12, 3),
    "timm EfficientNet": lambda: TimmSqueezeExcite(12, 3),
    "ours": lambda: ours.ChannelSELayer(12, 4),
}
SSE = {
    "ai-med": lambda: Spatial(12, 2),
    "pytorch-3dunet": lambda: Spatial(12, 3),
    "ours": lambda: ours.SpatialSELayer(12),
    "our 3d": lambda: ours.SpatialSELayer3D(12),
}
PAIRS = [
    pytest.param(*pair, id=f"{kind} from {' to '.join(names)}")
    for kind, blocks in (("scSE", SCSE), ("cSE", CSE), ("sSE", SSE))
    for names in itertools.permutations(blocks, 2)
    for pair in [[blocks[name] for name in names]]
]


class Net(nn.Module):
    """A classifier that has an fc1 and an fc2, too, and a block in its middle."""

    def __init__(self, block):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 1), nn.BatchNorm2d(12), block)
        self.fc1, self.fc2 = nn.Linear(12, 12), nn.Linear(12, 5)


@pytest.mark.parametrize("source, target", PAIRS)
def test_a_checkpoint_moves_between_libraries(source, target):
    source, target = Net(source()), Net(target())
    state = source.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    converted = convert_state_dict(state, target)
    target.load_state_dict(converted, strict=True)
    assert list(state) == list(before) and all(torch.equal(state[k], before[k]) for k in before)
    for name in ("fc1.weight", "fc2.bias", "stem.1.running_mean"):
        assert torch.equal(converted[name], before[name])
    convert(source), convert(target)
    results = []
    for net in (source, target):
        axes = max([m.weight.dim() - 2 for m in net.stem[2].modules() if hasattr(m, "weight")])
        x = make_case((2, 12, 3, 4, 5)).x
        x = x if axes == 3 else x.flatten(3)
        results.append(net.stem[2](x).flatten())
    torch.testing.assert_close(*results)


def test_a_block_at_the_root():
    source, target = Smp(12, 4), ours.ChannelSpatialSELayer(12, 4)
    target.load_state_dict(convert_state_dict(source.state_dict(), target), strict=True)
    torch.testing.assert_close(target(torch.ones(1, 12, 2, 2)), source(torch.ones(1, 12, 2, 2)))


@pytest.mark.parametrize("target", (lambda: Smp(12, 4), lambda: Both(12, 4, 2, torch.add)))
def test_a_gate_for_every_channel_and_position_is_refused(target):
    state = Net(OldSmp(12, 4)).state_dict()
    with pytest.raises(
        ValueError, match=r"parameters of stem\.2 don't fit: sSE\.0 has 12 .*0\.0\.2"
    ):
        convert_state_dict(state, Net(target()))


def test_other_sizes_are_left_to_load_state_dict():
    target = Net(ours.ChannelSpatialSELayer(12, 4))
    for source in (Smp(16, 4), Smp(12, 2)):
        state = convert_state_dict(Net(source).state_dict(), target)
        with pytest.raises(RuntimeError, match=r"size mismatch for stem\.2\.cSE\.fc1\.weight"):
            target.load_state_dict(state)


def test_another_model_is_left_alone():
    net = Net(nn.Identity())
    state = net.state_dict()
    assert list(convert_state_dict(state, net)) == list(state)
    assert convert_state_dict(state, net)._metadata == state._metadata
    assert list(convert_state_dict({"fc1.weight": torch.ones(3)}, net)) == ["fc1.weight"]


def test_other_branches_are_left_to_load_state_dict():
    state = Net(Both(12, 4, 2, torch.add)).state_dict()
    target = Net(Channel(12, 4))
    with pytest.warns(UserWarning, match=r"no parameter .* for 6 of \d+ keys.*stem\.2\.cSE"):
        converted = convert_state_dict(state, target)
    assert list(converted) == list(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*stem\.2\.fc1\.weight"):
        target.load_state_dict(converted)
