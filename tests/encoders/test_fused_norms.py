import copy

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from fastlatent.encoders.fused_norms import FusedGroupNorm, fuse_norms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
# Encoder: 2 levels of one ResnetBlock2D and 2 in the middle, two norms each, attention, the last one. The decoder has
# one block more on each level.
ENCODER_NORMS, DECODER_NORMS = 2 * (2 + 2) + 1 + 1, 2 * (4 + 2) + 1 + 1


def make(**config):
    torch.manual_seed(0)
    model = AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, norm_num_groups=4, latent_channels=2,
        sample_size=16, **config,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):  # new ones have weight 1 and bias 0
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.eval().requires_grad_(False)


def run(model, pixels, memory_format=torch.contiguous_format):
    moments = model.encode(pixels.contiguous(memory_format=memory_format)).latent_dist.parameters
    return moments, model.decode(moments.chunk(2, dim=1)[0]).sample


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_no_less_accurate_than_diffusers(dtype, memory_format, device):
    # 14 x 18: latents of 7 x 9, odd.
    pixels = torch.rand(2, 3, 14, 18, generator=torch.Generator().manual_seed(1)) * 2 - 1
    exact = run(make().to(device, torch.float64), pixels.to(device, torch.float64))
    model = make().to(device, dtype).to(memory_format=memory_format)
    plain = run(model, pixels.to(device, dtype), memory_format)
    assert fuse_norms(model).count == ENCODER_NORMS + DECODER_NORMS
    assert not any(isinstance(module, (nn.GroupNorm, nn.SiLU)) for module in model.modules())
    for got, other, want in zip(run(model, pixels.to(device, dtype), memory_format), plain, exact, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert error(got, want) <= 1.5 * error(other, want)


def test_the_encoder_alone():
    model = make()
    assert fuse_norms(model.encoder).count == ENCODER_NORMS
    assert not any(isinstance(module, FusedGroupNorm) for module in model.decoder.modules())
    assert fuse_norms(model.encoder).count == 0  # there is nothing left


def test_undo_leaves_no_trace():
    model = make()
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before, names = run(model, pixels), [(name, type(module)) for name, module in model.named_modules()]
    state = copy.deepcopy(model.state_dict())
    fused = fuse_norms(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    fused.undo()
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    assert all(torch.equal(got, want) for got, want in zip(run(model, pixels), before, strict=True))


@pytest.mark.parametrize("assign", [False, True])
def test_weights_loaded_or_cast_meanwhile_stay(assign):
    model, other = make(), {key: value + 1 for key, value in make().state_dict().items()}
    fused = fuse_norms(model)
    model.load_state_dict(other, assign=assign)
    model.to(torch.bfloat16)
    fused.undo()
    assert all(torch.equal(value, other[key].bfloat16()) for key, value in model.state_dict().items())


def test_compiles_whole():
    model = make()
    fuse_norms(model)
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    want = model.encoder(pixels)
    compiled = torch.compile(model.encoder, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pixels), want)


def block(**changes):
    return ResnetBlock2D(**{"in_channels": 8, "groups": 4, "temb_channels": None} | changes)


def unusual(**attributes):
    made = block()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


LEFT_ALONE = {
    "time embedding": block(temb_channels=4),
    "time scale": block(temb_channels=4, time_embedding_norm="scale_shift"),
    "another activation": block(non_linearity="relu"),
    "one norm is none": unusual(norm2=nn.Identity()),
    "without weights": unusual(norm1=nn.GroupNorm(4, 8, affine=False)),
    "a norm elsewhere": nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU()),
    "no GroupNorm": AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(case):
    model = LEFT_ALONE[case]
    before = dict(model.named_modules())
    assert fuse_norms(model).count == 0
    assert dict(model.named_modules()) == before


def test_without_attention_in_the_middle():
    assert fuse_norms(make(mid_block_add_attention=False).encoder).count == ENCODER_NORMS - 1


def test_gradients_are_refused():
    model = make()
    model.requires_grad_(True)
    fuse_norms(model)
    with pytest.raises(ValueError, match="that requires grad; this op only runs forward"):
        model.encode(torch.zeros(1, 3, 8, 8))
