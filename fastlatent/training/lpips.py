"""LPIPS: how far apart two images are for a network that was trained to see.

Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric": VGG16's features at five
depths, made unit vectors along their channels; the weighted squared differences, averaged over the places, are added.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

SUFFIXES = (".pth", ".pt", ".safetensors")
SMALLEST_SIDE = 16  # pixels: four halvings
# VGG16's convolutions by the numbers that torchvision gives them, in five stages with a halving between them.
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
# Of pixels in [−1, 1]: ImageNet's mean and standard deviation, as LPIPS' authors round them.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# torchvision's vgg16, or the network inside LPIPS' own state dict; the linear layers in the files of either.
_CONVOLUTION = re.compile(r"(?:^|\.)(?:features|slice\d)\.(\d+)\.(weight|bias)$")
_LINEAR = re.compile(r"(?:^|\.)lins?\.?(\d)\.model\.1\.weight$")


class LPIPS(nn.Module):
    """Frozen: gradients reach the images, the weights get none.

    Args:
        convolutions: {number in torchvision's vgg16.features: (weight [O, I, 3, 3], bias [O])}, of all 13.
        linear: five weights [1, C, 1, 1], of the channels' squared differences.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, convolutions: dict[int, tuple[Tensor, Tensor]], linear: list[Tensor]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleDict()
        for number, (weight, bias) in convolutions.items():
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, device="meta")
            layer.weight, layer.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
            self.convolutions[str(number)] = layer
        self.linear = nn.ParameterList(nn.Parameter(weight.clone()) for weight in linear)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """[B, 1 or 3, H, W] in [−1, 1] each, in the weights' dtype → distances [B]. References get no gradient."""
        with torch.no_grad():
            wanted = self._features(references)
        pairs = zip(self._features(images), wanted, self.linear, strict=True)
        terms = [((_unit(got) - _unit(want)).square() * weight).sum(1).mean((1, 2)) for got, want, weight in pairs]
        return torch.stack(terms).sum(0)

    def _features(self, x: Tensor) -> list[Tensor]:
        x = (x.expand(-1, 3, -1, -1) - self.shift) / self.scale
        features = []
        for stage, numbers in enumerate(_STAGES):
            if stage:
                x = functional.max_pool2d(x, 2)
            for number in numbers:
                x = functional.relu(self.convolutions[str(number)](x))
            features.append(x)
        return features


def _unit(features: Tensor) -> Tensor:
    # 1e-20 below the root: the norm's gradient at 0 would be infinite.
    return features / (features.square().sum(1, keepdim=True) + 1e-20).sqrt()


def load_lpips(path: str | Path) -> LPIPS:
    """LPIPS from weights on disk: one file, or a folder of files, with VGG16's and the five linear layers'.

    Raises:
        ValueError: nothing is there, a file does not load, or weights are missing or of another shape.
    """
    path = Path(path)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _read(file)
    convolutions: dict[int, dict[str, Tensor]] = {}
    linear: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if found := _CONVOLUTION.search(name):
            convolutions.setdefault(int(found[1]), {})[found[2]] = tensor.float()
        elif found := _LINEAR.search(name):
            linear[int(found[1])] = tensor.float()
    missing = []
    inputs = 3
    for numbers, width in zip(_STAGES, WIDTHS, strict=True):
        for number in numbers:
            for kind, shape in (("weight", (width, inputs, 3, 3)), ("bias", (width,))):
                found_one = convolutions.get(number, {}).get(kind)
                if found_one is None or found_one.shape != shape:
                    missing.append(f"features.{number}.{kind} {list(shape)}")
            inputs = width
    for stage, width in enumerate(WIDTHS):
        if stage not in linear or linear[stage].shape != (1, width, 1, 1):
            missing.append(f"lin{stage}.model.1.weight {[1, width, 1, 1]}")
    if missing:
        raise ValueError(
            f"--lpips-weights {path}: expected {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}; "
            f"found {len(state)} tensors in {', '.join(file.name for file in files) or 'no file'}. {WANTED}"
        )
    if any((weight < 0).any() for weight in linear.values()):
        raise ValueError(f"--lpips-weights {path}: expected linear weights of at least 0, got negative ones")
    layers = {number: (convolutions[number]["weight"], convolutions[number]["bias"]) for s in _STAGES for number in s}
    return LPIPS(layers, [linear[stage] for stage in range(len(WIDTHS))])


WANTED = (
    "LPIPS needs two sets of weights, in one file or in a folder (.pth, .pt, .safetensors): torchvision's vgg16, with "
    "features.0.weight … features.28.bias, and LPIPS' vgg.pth, with lin0.model.1.weight … lin4.model.1.weight. Nothing "
    "is downloaded"
)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"--lpips-weights {file}: there is no such file. {WANTED}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:  # torch's text asks to let the file run its code
        raise ValueError(
            f"--lpips-weights {file} does not load: it is damaged, or holds more than tensors by name, which only "
            "pickle can load, and pickle runs whatever code a file holds; save its tensors alone"
        ) from None
    except Exception as error:  # damaged files raise many kinds
        raise ValueError(f"--lpips-weights {file} does not load: {' '.join(str(error).split())[:300]}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError(f"--lpips-weights {file}: expected tensors by name. {WANTED}")
    return loaded
