"""The σ-VAE (BEiT-3 encoder, ViT decoder, patches of pixels) straight from its weights by name, in their dtype."""

import math

import torch


def _linear(w, name, x):
    x = x @ w[name + ".weight"].T
    return x + w[name + ".bias"] if name + ".bias" in w else x


def _norm(w, name, x, eps):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * w[name + ".weight"] + w[name + ".bias"]


def _gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _attend(q, k, v):
    """Heads of 64, one after the other."""
    mixed = []
    for head in range(q.shape[-1] // 64):
        a, b, c = (x[..., 64 * head : 64 * head + 64] for x in (q, k, v))
        mixed.append(torch.softmax(a @ b.transpose(1, 2) / 8, -1) @ c)
    return torch.cat(mixed, -1)


def _patches(w, name, x, patch):
    """The convolution with stride = size, as a product of flattened patches."""
    b, channels, height, width = x.shape
    x = x.reshape(b, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(b, -1, channels * patch * patch)
    return x @ w[name + ".weight"].flatten(1).T + w[name + ".bias"]


def _beit3(w, pixels, patch):
    x = _patches(w, "encoder.vision_embed.proj", pixels, patch)
    x = torch.cat([w["encoder.vision_embed.cls_token"].repeat(len(x), 1, 1), x], 1)
    x = x + w["encoder.encoder.embed_positions.weight"][2 : 2 + x.shape[1]]
    layer = 0
    while (name := f"encoder.encoder.layers.{layer}") + ".ffn.fc1.weight" in w:
        h = _norm(w, name + ".self_attn_layer_norm", x, 1e-5)
        h = _attend(*(_linear(w, f"{name}.self_attn.{part}_proj", h) for part in "qkv"))
        x = x + _linear(w, name + ".self_attn.out_proj", _norm(w, name + ".self_attn.inner_attn_ln", h, 1e-5))
        h = _gelu(_linear(w, name + ".ffn.fc1", _norm(w, name + ".final_layer_norm", x, 1e-5)))
        x = x + _linear(w, name + ".ffn.fc2", _norm(w, name + ".ffn.ffn_layernorm", h, 1e-5))
        layer += 1
    return _norm(w, "encoder.encoder.layer_norm", x, 1e-5)[:, 1:]


def _vit(w, name, x, patch):
    x = _patches(w, name + ".patch_embed.proj", x, patch)
    x = torch.cat([w[name + ".cls_token"].repeat(len(x), 1, 1), x], 1) + w[name + ".pos_embed"]
    block = 0
    while (here := f"{name}.blocks.{block}") + ".mlp.fc1.weight" in w:
        q, k, v = _linear(w, here + ".attn.qkv", _norm(w, here + ".norm1", x, 1e-6)).chunk(3, -1)
        h = _attend(q + w[here + ".attn.q_bias"], k, v + w[here + ".attn.v_bias"])
        x = x + _linear(w, here + ".attn.proj", h)
        h = _gelu(_linear(w, here + ".mlp.fc1", _norm(w, here + ".norm2", x, 1e-6)))
        x = x + _linear(w, here + ".mlp.fc2", h)
        block += 1
    return _norm(w, name + ".fc_norm", x, 1e-6)[:, 1:]


def encode(w, pixels, patch):
    vit = "encoder.patch_embed.proj.weight" in w
    tokens = _vit(w, "encoder", pixels, patch) if vit else _beit3(w, pixels, patch)
    mean = _linear(w, "encoder_post_processor.dense", tokens)
    side = pixels.shape[-1] // patch
    return mean.reshape(len(mean), side, side, -1).permute(0, 3, 1, 2)


def decode(w, latents, patch):
    tokens = _vit(w, "decoder", latents, 1)
    values = _linear(w, "decoder_post_processor.fc2", torch.tanh(_linear(w, "decoder_post_processor.fc1", tokens)))
    side, channels = latents.shape[-1], values.shape[-1] // patch**2
    image = values.new_empty(len(values), channels, side * patch, side * patch)
    for i in range(side * side):
        top, left = i // side * patch, i % side * patch
        image[:, :, top : top + patch, left : left + patch] = values[:, i].reshape(-1, channels, patch, patch)
    return image


def random_weights(seed, width, hidden, depth, patch, side, latent_size, encoder="beit3", dtype=torch.float64):
    """Weights by published names, for RGB."""
    generator = torch.Generator().manual_seed(seed)
    w = {}

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    def linear(name, inputs, outputs, bias=True):
        w[name + ".weight"] = draw(outputs, inputs, scale=inputs**-0.5)
        if bias:
            w[name + ".bias"] = draw(outputs, scale=0.1)

    def norm(name, size):
        w[name + ".weight"], w[name + ".bias"] = 1 + draw(size, scale=0.1), draw(size, scale=0.1)

    def stem(name, channels, size):
        w[name + ".weight"] = draw(width, channels, size, size, scale=(channels * size * size) ** -0.5)
        w[name + ".bias"] = draw(width, scale=0.1)

    def vit(name, channels, size):
        stem(name + ".patch_embed.proj", channels, size)
        w[name + ".cls_token"], w[name + ".pos_embed"] = draw(1, 1, width), draw(1, side**2 + 1, width)
        for block in range(depth):
            here = f"{name}.blocks.{block}"
            norm(here + ".norm1", width)
            linear(here + ".attn.qkv", width, 3 * width, bias=False)
            w[here + ".attn.q_bias"], w[here + ".attn.v_bias"] = draw(width), draw(width)
            linear(here + ".attn.proj", width, width)
            norm(here + ".norm2", width)
            linear(here + ".mlp.fc1", width, hidden)
            linear(here + ".mlp.fc2", hidden, width)
        norm(name + ".fc_norm", width)

    def beit3():
        stem("encoder.vision_embed.proj", 3, patch)
        w["encoder.vision_embed.cls_token"] = draw(1, 1, width)
        w["encoder.vision_embed.mask_token"] = draw(1, 1, width)
        w["encoder.encoder.embed_positions.weight"] = draw(side**2 + 3, width)
        for layer in range(depth):
            name = f"encoder.encoder.layers.{layer}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{name}.self_attn.{part}", width, width)
            for part in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                norm(f"{name}.{part}", width)
            linear(name + ".ffn.fc1", width, hidden)
            linear(name + ".ffn.fc2", hidden, width)
            norm(name + ".ffn.ffn_layernorm", hidden)
        norm("encoder.encoder.layer_norm", width)

    beit3() if encoder == "beit3" else vit("encoder", 3, patch)
    linear("encoder_post_processor.dense", width, latent_size)
    vit("decoder", latent_size, 1)
    linear("decoder_post_processor.fc1", width, width)
    linear("decoder_post_processor.fc2", width, 3 * patch**2)
    return w
