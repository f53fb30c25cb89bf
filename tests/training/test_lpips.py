import argparse
import re

import pytest
import torch
from safetensors.torch import save_file

from fastlatent.training.lpips import LPIPS, WIDTHS, load_lpips

# VGG16: convolutions by torchvision's numbers (ReLUs and poolings count too) and their inputs and outputs.
VGG16 = [
    (0, 3, 64), (2, 64, 64), (5, 64, 128), (7, 128, 128), (10, 128, 256), (12, 256, 256), (14, 256, 256),
    (17, 256, 512), (19, 512, 512), (21, 512, 512), (24, 512, 512), (26, 512, 512), (28, 512, 512),
]  # fmt: skip
LAST_OF_STAGE = (2, 7, 14, 21, 28)


def weights(scale):
    """Random convolutions and linear layers; `scale` divides every width."""
    generator = torch.Generator().manual_seed(0)
    convolutions = {}
    for number, inputs, outputs in VGG16:
        inputs, outputs = max(3, inputs // scale), outputs // scale
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        convolutions[number] = weight, 0.1 * torch.randn(outputs, generator=generator)
    return convolutions, [torch.rand(1, width // scale, 1, 1, generator=generator) for width in WIDTHS]


@pytest.fixture(scope="module")
def small():
    return LPIPS(*weights(16)).double()


def images(channels=3, seed=1):
    return torch.rand(2, channels, 16, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def plain_distance(convolutions, linear, a, b):
    """The definition, image by image and place by place where it matters."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]

    def stages(x):
        x, found = ((x - shift) / scale)[None], []
        for number, (weight, bias) in convolutions.items():
            x = torch.nn.functional.conv2d(x, weight.double(), bias.double(), padding=1).clamp(min=0)
            if number in LAST_OF_STAGE:
                found.append(x[0])
            if number in LAST_OF_STAGE[:-1]:
                h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
                x = x[..., :h, :w].unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
        return found

    total = 0.0
    for f, g, weight in zip(stages(a), stages(b), linear, strict=True):
        f, g = (x / x.pow(2).sum(0).sqrt().clamp(min=1e-10) for x in (f, g))
        total += float(((f - g) ** 2 * weight[0].double()).sum() / f[0].numel())
    return total


def test_distance_is_the_published_one(small):
    convolutions, linear = weights(16)
    a, b = images(), images(seed=2)
    got = small(a, b)
    want = [plain_distance(convolutions, linear, a[i], b[i]) for i in range(2)]
    # shift and scale are float32 numbers
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    assert small(a, a).tolist() == [0, 0]
    grey = images(1)
    torch.testing.assert_close(small(grey, a), small(grey.repeat(1, 3, 1, 1), a))


def test_gradient_reaches_the_images_and_not_the_weights(small):
    a, b = images().requires_grad_(), images(seed=2).requires_grad_()
    small(a, b).sum().backward()
    assert b.grad is None
    assert all(parameter.grad is None for parameter in small.parameters())
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        direction = torch.randn(a.shape, generator=generator, dtype=torch.float64)
        step = 1e-5
        with torch.no_grad():
            slope = (small(a + step * direction, b) - small(a - step * direction, b)).sum() / (2 * step)
        assert float((a.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_gradient_where_nothing_is_seen():
    # Features that are all 0: the norm's gradient would be infinite, and its product with 0 NaN.
    convolutions, linear = weights(16)
    blind = LPIPS({n: (w, torch.full_like(b, -100.0)) for n, (w, b) in convolutions.items()}, linear)
    a = images().float().requires_grad_()
    blind(a, images(seed=2).float()).sum().backward()
    assert a.grad.abs().max() == 0


def test_files_as_users_have_them(tmp_path):
    convolutions, linear = weights(1)
    vgg, lins, inside = {}, {}, {}
    for number, (weight, bias) in convolutions.items():
        stage = sum(number > last for last in LAST_OF_STAGE) + 1
        for prefix, state in ((f"features.{number}", vgg), (f"net.slice{stage}.{number}", inside)):
            state |= {prefix + ".weight": weight.half(), prefix + ".bias": bias.half()}
    for stage, weight in enumerate(linear):
        lins[f"lin{stage}.model.1.weight"] = weight.half()
    folder = tmp_path / "both"
    folder.mkdir()
    torch.save(vgg | {"classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16-397923af.pth")
    torch.save(lins, folder / "vgg.pth")
    (folder / "notes.txt").write_text("from the colleagues")
    save_file(vgg | lins, tmp_path / "one.safetensors")
    torch.save({"state_dict": inside | {"lins.0.model.1.weight": linear[0].half()} | lins}, tmp_path / "whole.pth")
    for path in (folder, tmp_path / "one.safetensors", tmp_path / "whole.pth"):
        found = load_lpips(path)
        assert not any(parameter.requires_grad for parameter in found.parameters())
        for number, (weight, bias) in convolutions.items():
            layer = found.convolutions[str(number)]
            assert torch.equal(layer.weight, weight.half().float())
            assert torch.equal(layer.bias, bias.half().float())
        assert all(torch.equal(a, b.half().float()) for a, b in zip(found.linear, linear, strict=True))
    for path, message in (
        (folder / "vgg.pth", r"expected features.0.weight \[64, 3, 3, 3\] and 25 more; found 5 tensors in vgg.pth"),
        (folder / "vgg16-397923af.pth", r"expected lin0.model.1.weight \[1, 64, 1, 1\] and 4 more"),
        (tmp_path / "nothing.pth", "there is no such file. LPIPS needs two sets of weights"),
        (folder / "notes.txt", "does not load"),
    ):
        with pytest.raises(ValueError, match=f"--lpips-weights {re.escape(str(path))}.*{message}") as caught:
            load_lpips(path)
        assert "Nothing is downloaded" in str(caught.value) or "does not load" in message


def test_files_that_are_something_else(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found 0 tensors in no file"):
        load_lpips(tmp_path / "empty")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected tensors by name"):
        load_lpips(tmp_path / "list.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    torch.save({"options": argparse.Namespace()}, tmp_path / "code.pth")
    for name in ("page", "code"):
        with pytest.raises(
            ValueError, match=f"{name}.pth does not load: it is damaged, or holds more than tensors"
        ) as caught:
            load_lpips(tmp_path / f"{name}.pth")
        assert "weights_only" not in str(caught.value)  # torch's advice
