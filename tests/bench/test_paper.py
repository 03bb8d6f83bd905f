"""The articles' experiment: images, weights, scores and the file of results, on made-up people."""

import argparse

import pytest
import torch

pytest.importorskip("bench.timing", reason="only a checkout has bench")
pytest.importorskip("nibabel")
pytest.importorskip("rich")
from bench import anatomy, paper
from bench.anatomy import CLASSES, ENCLOSED, Person

# Indices of a pooling without overlap don't collide.
pytestmark = pytest.mark.filterwarnings("ignore:max_unpooling2d.* deterministic")


def person(seed=0, slices=3) -> Person:
    """Random blocks of structures."""
    generator = torch.Generator().manual_seed(seed)
    structures = torch.randint(ENCLOSED + 1, (slices, 1, 10, 10), generator=generator)
    structures = torch.nn.functional.interpolate(structures.float(), 160)[:, 0].long()
    return Person(structures, torch.linspace(0.2, 1, ENCLOSED + 1))


def test_images():
    """An image follows its person's intensities; what is enclosed is background in the truth."""
    one = person()
    intensities = one.intensities.expand(3, -1)
    image = anatomy.images(one.structures, intensities, torch.Generator().manual_seed(0))
    assert image.shape == (3, 1, 80, 80)
    right = anatomy.truth(one.structures)
    assert right.shape == (3, 80, 80) and right.max() < len(CLASSES)
    assert right[one.structures[:, ::2, ::2] == ENCLOSED].eq(0).all()
    wanted = intensities.gather(1, one.structures[:, ::2, ::2].flatten(1)).view(3, 1, 80, 80)
    together = torch.stack([image.flatten(), wanted.flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.8


def test_deformation_keeps_labels():
    one = person()
    moved = anatomy.deformed(one.structures, torch.Generator().manual_seed(0))
    assert not torch.equal(moved, one.structures)
    assert (moved == one.structures).float().mean() > 0.6
    assert set(moved.unique().tolist()) <= set(range(ENCLOSED + 1))


def test_batches_repeat():
    people = [person(0), person(1)]
    first, second = (
        [next(stream) for _ in range(4)]
        for stream in (anatomy.batches(people, 2, seed=3) for _ in range(2))
    )
    for (image, label), (again, label_again) in zip(first, second, strict=True):
        assert torch.equal(image, again) and torch.equal(label, label_again)
    assert not torch.equal(first[0][0], first[1][0])


def test_what_is_enclosed():
    """A closed ring encloses its inside; a deep bay that is open is outside."""
    size = 90
    z, y, x = torch.meshgrid(*(torch.arange(float(size)) - size / 2,) * 3, indexing="ij")
    radius = (x**2 + y**2 + z**2).sqrt()
    shell = (radius > 34) & (radius < 38)
    enclosed = torch.from_numpy(anatomy._enclosed(shell.numpy()))
    assert torch.equal(enclosed, radius <= 34)
    opened = shell & ~((x.abs() < 1.5) & (y.abs() < 1.5) & (z > 0))  # a hole of 3 mm
    enclosed = torch.from_numpy(anatomy._enclosed(opened.numpy()))
    assert enclosed[radius <= 15].all()
    assert not enclosed[radius > 38].any()


def test_weights_and_loss():
    label = torch.zeros(1, 8, 8, dtype=torch.long)
    label[0, :2] = 1
    weight = paper.class_weights(torch.cat([label.flatten(), torch.arange(2, len(CLASSES))]))
    torch.testing.assert_close(weight[:3] ** 2, torch.tensor([1 / 48, 1 / 16, 1]))
    logits = torch.randn(1, len(CLASSES), 8, 8)
    each = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    pixel = weight[label]
    pixel[0, 1:3] += 0.5  # both sides of the boundary
    torch.testing.assert_close(paper.loss(logits, label, weight), (pixel * each).mean())


def test_dice():
    """Of a network that takes one structure for another."""
    one = person()
    right = anatomy.truth(one.structures)
    found = torch.where(right == 1, 2, right)

    class Wrong(torch.nn.Module):
        def forward(self, image):
            return torch.nn.functional.one_hot(found, len(CLASSES)).movedim(-1, 1).float()

    scores = paper.dice(Wrong(), one, torch.device("cpu"))
    first, second = (right == 1).sum(), (right == 2).sum()
    assert scores[0] == 0
    assert scores[1] == pytest.approx((2 * second / (first + 2 * second)).item())
    assert scores[2:] == [1.0] * (len(CLASSES) - 3)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys):
    """What was trained is kept, with the options that it was trained with."""
    monkeypatch.setattr(anatomy, "load", lambda name, spacing: person(int(name) % 7))
    trained = []
    real = paper._trained

    def counted(args, seed, network, pattern, *rest):
        trained.append((seed, network, pattern))
        if len(trained) in (3, 6):
            raise KeyboardInterrupt
        return real(args, seed, network, pattern, *rest)

    monkeypatch.setattr(paper, "_trained", counted)
    monkeypatch.setattr(paper, "_ROUNDS", 2)
    args = argparse.Namespace(
        networks=["SD-Net"], width=4, steps=2, batch=2, seeds=1, spacing=2, quick=False,
        output=tmp_path, device=torch.device("cpu"),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        paper.run(args)
    assert paper.run(args) == 0
    assert trained[2:] == [(0, "SD-Net", pattern) for pattern in ("sSE", "sSE", "scSE")]
    table = (tmp_path / "paper.md").read_text()
    assert table.count("\n| ") == 6 and "hippocampus" in table
    assert (tmp_path / "paper.png").stat().st_size > 10_000
    assert len(trained) == 5
    args.steps = 3
    with pytest.raises(KeyboardInterrupt):
        paper.run(args)
    assert trained[5:] == [(0, "SD-Net", "none")]
