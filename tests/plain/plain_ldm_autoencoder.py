"""latent diffusion's convolutional autoencoder, straight from its weights under the published names, in their dtype."""

import math

import torch
import torch.nn.functional as F


def _conv(w, name, x, stride=1, padding=1):
    return F.conv2d(x, w[name + ".weight"], w[name + ".bias"], stride, padding)


def _norm(w, name, x):
    """GroupNorm by hand: 32 groups, eps 1e-6."""
    b, c, height, width = x.shape
    groups = x.reshape(b, 32, -1)
    mean = groups.mean(-1, keepdim=True)
    variance = ((groups - mean) ** 2).mean(-1, keepdim=True)
    x = ((groups - mean) / torch.sqrt(variance + 1e-6)).reshape(b, c, height, width)
    return x * w[name + ".weight"].view(1, c, 1, 1) + w[name + ".bias"].view(1, c, 1, 1)


def _swish(x):
    return x / (1 + torch.exp(-x))


def _residual(w, name, x):
    h = _conv(w, name + ".conv1", _swish(_norm(w, name + ".norm1", x)))
    h = _conv(w, name + ".conv2", _swish(_norm(w, name + ".norm2", h)))
    if name + ".nin_shortcut.weight" in w:
        x = _conv(w, name + ".nin_shortcut", x, padding=0)
    return x + h


def _attention(w, name, x):
    normed = _norm(w, name + ".norm", x)
    q, k, v = (_conv(w, f"{name}.{part}", normed, padding=0).flatten(2) for part in "qkv")
    weights = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])
    weights = torch.exp(weights - weights.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    mixed = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    return x + _conv(w, name + ".proj_out", mixed, padding=0)


def _level(w, name, x):
    block = 0
    while f"{name}.block.{block}.conv1.weight" in w:
        x = _residual(w, f"{name}.block.{block}", x)
        if f"{name}.attn.{block}.q.weight" in w:
            x = _attention(w, f"{name}.attn.{block}", x)
        block += 1
    return x


def _middle(w, name, x):
    x = _residual(w, name + ".block_1", x)
    x = _attention(w, name + ".attn_1", x)
    return _residual(w, name + ".block_2", x)


def encode(w, pixels):
    """[B, channels, H, W] → moments, log-variance clamped to [−30, 20]."""
    x = _conv(w, "encoder.conv_in", pixels)
    level = 0
    while f"encoder.down.{level}.block.0.conv1.weight" in w:
        x = _level(w, f"encoder.down.{level}", x)
        if f"encoder.down.{level}.downsample.conv.weight" in w:
            b, c, height, width = x.shape
            padded = x.new_zeros(b, c, height + 1, width + 1)  # right and below only
            padded[:, :, :height, :width] = x
            x = _conv(w, f"encoder.down.{level}.downsample.conv", padded, stride=2, padding=0)
        level += 1
    x = _middle(w, "encoder.mid", x)
    x = _conv(w, "encoder.conv_out", _swish(_norm(w, "encoder.norm_out", x)))
    mean, logvar = _conv(w, "quant_conv", x, padding=0).chunk(2, 1)
    return torch.cat([mean, logvar.clamp(-30, 20)], 1)


def decode(w, latents):
    x = _conv(w, "decoder.conv_in", _conv(w, "post_quant_conv", latents, padding=0))
    x = _middle(w, "decoder.mid", x)
    levels = len({name.split(".")[2] for name in w if name.startswith("decoder.up.")})
    for level in reversed(range(levels)):
        x = _level(w, f"decoder.up.{level}", x)
        if level:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = _conv(w, f"decoder.up.{level}.upsample.conv", x)
    return _conv(w, "decoder.conv_out", _swish(_norm(w, "decoder.norm_out", x)))


def random_weights(seed, ch, mult, blocks, z, encoder_attention=(), decoder_attention=(), dtype=torch.float64):
    """Weights by published names; norms near one, everything else small enough for outputs around one."""
    generator = torch.Generator().manual_seed(seed)
    w = {}

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def conv(name, inputs, outputs, size=3):
        w[name + ".weight"] = draw(outputs, inputs, size, size) / math.sqrt(inputs * size * size)
        w[name + ".bias"] = 0.1 * draw(outputs)

    def norm(name, channels):
        w[name + ".weight"], w[name + ".bias"] = 1 + 0.1 * draw(channels), 0.1 * draw(channels)

    def residual(name, inputs, outputs):
        norm(name + ".norm1", inputs)
        conv(name + ".conv1", inputs, outputs)
        norm(name + ".norm2", outputs)
        conv(name + ".conv2", outputs, outputs)
        if inputs != outputs:
            conv(name + ".nin_shortcut", inputs, outputs, 1)

    def attention(name, channels):
        norm(name + ".norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(name, channels):
        residual(name + ".block_1", channels, channels)
        attention(name + ".attn_1", channels)
        residual(name + ".block_2", channels, channels)

    widths = [ch * m for m in mult]
    conv("encoder.conv_in", 3, ch)
    width = ch
    for level, out in enumerate(widths):
        for block in range(blocks):
            residual(f"encoder.down.{level}.block.{block}", width, out)
            width = out
            if level in encoder_attention:
                attention(f"encoder.down.{level}.attn.{block}", width)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder.mid", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, 2 * z)
    conv("quant_conv", 2 * z, 2 * z, 1)
    conv("post_quant_conv", z, z, 1)
    conv("decoder.conv_in", z, width)
    middle("decoder.mid", width)
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            residual(f"decoder.up.{level}.block.{block}", width, widths[level])
            width = widths[level]
            if level in decoder_attention:
                attention(f"decoder.up.{level}.attn.{block}", width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3)
    return w
