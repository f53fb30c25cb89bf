"""sample_posterior: latents drawn from stored moments, mirrored, normalised and cast in one pass over them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlatent import _native
from fastlatent.ops._library import LIBRARY

MOMENTS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Word 0 of the mirror's counter. Noise blocks are numbered from 0 and stay below: a row has fewer than 2^31 numbers.
MIRROR_BLOCK = 0xFFFFFFFF
# What diffusers' DiagonalGaussianDistribution clamps the logarithm of the variance to.
LOGVAR_RANGE = (-30.0, 20.0)
_WORD = 0xFFFFFFFF

# SymInt: an epoch that moves on must not compile the caller again.
LIBRARY.define(
    "sample_posterior(Tensor moments, Tensor key_hash, SymInt seed, SymInt epoch, Tensor? mean, Tensor? std, "
    "Tensor? scale, bool has_logvar, ScalarType out_dtype) -> Tensor"
)


def sample_posterior(
    moments: Tensor,
    key_hash: Tensor,
    *,
    seed: int,
    epoch: int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    scale: Tensor | None = None,
    has_logvar: bool = True,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One latent of each row: mean + exp(clamp(logvar, -30, 20) / 2) * z, then (x - mean[c]) / std[c], then the cast.

    What a row becomes is a function of (seed, epoch, its key hash, its moments) alone: not of its place, its batch, or
    how many devices share the work. With F = 2 a random bit picks the image or the mirrored one.

    The generator is Philox4x32-10 (Salmon et al., SC 2011) with the key (seed's low word, seed's high word). Element e
    of a row, counted over [C, *S], takes its z from the counter (e // 4, key hash's low word, its high word, epoch),
    whose words w give by Box and Muller, with r(w) = sqrt(-2 ln(w * 2^-32 + 2^-33)) and t(w) = 2 pi w * 2^-32:

        z[e % 4] = r(w0) cos t(w1), r(w0) sin t(w1), r(w2) cos t(w3), r(w2) sin t(w3)

    The argument of the logarithm is rounded to float32. The mirror's bit is the highest of w0 at e // 4 = 2^32 - 1.

    Everything is float32 up to the cast, every operation correctly rounded and none fused: CPU and GPU give the same
    bits. Before (x - mean[c]) / std[c] they differ from `sample_posterior_reference` by at most 4 * 2^-23 of
    |mean| + |exp(logvar / 2) * z|: Philox's integers are equal, the elementary functions are polynomials.

    Args:
        moments: [B, F, 2C, *S] with F = 1 or 2, mean‖logvar on axis 2, or [B, F, C, *S] without logvar; float32,
            bfloat16, float16, or int8 with a scale. Fewer than 2^31 numbers a row. Copied where not contiguous.
        key_hash: int64 [B], the 64 bits of an unsigned hash.
        seed: 0 to 2^64 - 1.
        epoch: 0 to 2^32 - 1.
        mean, std: float32 [C], both or neither.
        scale: float32 [B, F], or [B, F, 2C] ([B, F, C] without logvar), where moments are int8: value = int8 * scale.
        has_logvar: False for latents without a posterior: no noise, the rest as above.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        [B, C, *S] of out_dtype. NaN and infinity pass through.

    Raises:
        ValueError: a shape, dtype, device or number is not as above, or an input requires grad.
        RuntimeError: the compiled library is missing.
    """
    if moments.ndim < 3 or moments.shape[1] not in (1, 2) or moments.dtype not in MOMENTS_DTYPES:
        raise ValueError(
            "sample_posterior: expected moments [B, 1 or 2, channels, ...] of float32, bfloat16, float16 or int8, "
            f"got {_describe(moments)}"
        )
    batch, flips, stored = moments.shape[:3]
    if has_logvar and stored % 2:
        raise ValueError(
            f"sample_posterior: expected an even axis 2, mean and logvar, got {_describe(moments)}; "
            "has_logvar=False reads latents without logvar"
        )
    if math.prod(moments.shape[2:]) >= 2**31:
        raise ValueError(f"sample_posterior: expected fewer than 2^31 numbers a row, got {_describe(moments)}")
    if key_hash.shape != (batch,) or key_hash.dtype != torch.int64:
        raise ValueError(f"sample_posterior: expected key_hash [{batch}] of torch.int64, got {_describe(key_hash)}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"sample_posterior: expected a seed of 0 to 2^64 - 1, got {seed}")
    if not 0 <= epoch < 2**32:
        raise ValueError(f"sample_posterior: expected an epoch of 0 to 2^32 - 1, got {epoch}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"sample_posterior: expected out_dtype float32, bfloat16 or float16, got {out_dtype}")
    if (mean is None) != (std is None):
        raise ValueError("sample_posterior: expected mean and std, both or neither, got one of them")
    if (scale is None) != (moments.dtype != torch.int8):
        raise ValueError(
            f"sample_posterior: expected a scale for int8 moments and only for them, got {_describe(moments)} "
            f"and {'no scale' if scale is None else _describe(scale)}"
        )
    channels = stored // 2 if has_logvar else stored
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and (value.shape != (channels,) or value.dtype != torch.float32):
            raise ValueError(f"sample_posterior: expected {name} [{channels}] of float32, got {_describe(value)}")
    if scale is not None and (
        scale.shape not in ((batch, flips), (batch, flips, stored)) or scale.dtype != torch.float32
    ):
        raise ValueError(
            f"sample_posterior: expected scale [{batch}, {flips}] or [{batch}, {flips}, {stored}] of float32, "
            f"got {_describe(scale)}"
        )
    named = {"moments": moments, "key_hash": key_hash, "mean": mean, "std": std, "scale": scale}
    for name, value in named.items():
        if value is not None and value.device != moments.device:
            raise ValueError(
                f"sample_posterior: expected {name} on {moments.device} like moments, got {_describe(value)}"
            )
        if value is not None and value.requires_grad:
            raise ValueError(
                f"sample_posterior: expected inputs without gradient, got {name} that requires grad; this op only "
                "runs forward: detach it"
            )
    # The schema's integers are signed.
    seed = seed - 2**64 if seed >= 2**63 else seed
    return torch.ops.fastlatent.sample_posterior.default(
        moments, key_hash, seed, epoch, mean, std, scale, has_logvar, out_dtype
    )


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 in int64 arithmetic: words of 32 bits in int64 tensors that broadcast, to four words of them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower half of the product, by halves of the word: its 64 bits are more than an int64 has."""
    upper, lower = factor * (word >> 16), factor * (word & 0xFFFF)
    high = upper + (lower >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (lower & 0xFFFF)


def sample_posterior_reference(
    moments: Tensor,
    key_hash: Tensor,
    seed: int,
    epoch: int,
    mean: Tensor | None,
    std: Tensor | None,
    scale: Tensor | None,
    has_logvar: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """The definition of `sample_posterior`, in plain torch. z is computed in float64 and rounded once."""
    key = (seed & _WORD, (seed >> 32) & _WORD)
    low, high = (key_hash & _WORD)[:, None], ((key_hash >> 32) & _WORD)[:, None]
    call = torch.full_like(low, epoch)
    if moments.shape[1] == 2:
        mirror = philox((torch.full_like(low, MIRROR_BLOCK), low, high, call), key)[0][:, 0] >> 31
    else:
        mirror = torch.zeros_like(key_hash)
    rows = torch.arange(len(moments), device=moments.device)
    x = moments[rows, mirror].float()
    if scale is not None:
        chosen = scale[rows, mirror]
        x = x * chosen.reshape(chosen.shape + (1,) * (x.ndim - chosen.ndim))
    if has_logvar:
        x, logvar = x.chunk(2, dim=1)
        blocks = torch.arange((math.prod(x.shape[1:]) + 3) // 4, device=moments.device)[None]
        w0, w1, w2, w3 = philox((blocks, low, high, call), key)
        pairs = [_box_muller(w0, w1), _box_muller(w2, w3)]
        z = torch.stack([value for pair in pairs for value in pair], dim=-1).flatten(1)
        z = z[:, : math.prod(x.shape[1:])].reshape(x.shape)
        x = x + (0.5 * logvar.clamp(*LOGVAR_RANGE)).exp() * z
    if mean is not None and std is not None:
        per_channel = (-1,) + (1,) * (x.ndim - 2)
        x = (x - mean.reshape(per_channel)) / std.reshape(per_channel)
    return x.to(out_dtype)


def _box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    uniform = radius.float() * 2.0**-32 + 2.0**-33
    r = (-2 * uniform.double().log()).sqrt()
    t = angle.double() * (2 * math.pi * 2.0**-32)
    return (r * t.cos()).float(), (r * t.sin()).float()


def _cpu(
    moments: Tensor,
    key_hash: Tensor,
    seed: int,
    epoch: int,
    mean: Tensor | None,
    std: Tensor | None,
    scale: Tensor | None,
    has_logvar: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    out = _empty(moments, has_logvar, torch.float32)
    if out.numel():  # its sizes divide
        moments, key_hash = moments.contiguous(), key_hash.contiguous()
        mean, std, scale = (None if value is None else value.contiguous() for value in (mean, std, scale))
        addresses = [None if value is None else value.data_ptr() for value in (mean, std, scale)]
        batch, channels = out.shape[:2]
        scales = 0 if scale is None else scale[0, 0].numel()
        code = 0 if scale is not None else _native.DTYPE_CODES[str(moments.dtype).removeprefix("torch.")]
        _native.call(
            "cpu", "sample_posterior", moments.data_ptr(), key_hash.data_ptr(), *addresses, out.data_ptr(), batch,
            moments.shape[1], channels, out[0, 0].numel(), scales, has_logvar, seed, epoch, code,
            torch.get_num_threads(),
        )  # fmt: skip
    return out.to(out_dtype)


def _cuda(
    moments: Tensor,
    key_hash: Tensor,
    seed: int,
    epoch: int,
    mean: Tensor | None,
    std: Tensor | None,
    scale: Tensor | None,
    has_logvar: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    from fastlatent.kernels.sample_posterior import sample_posterior_triton

    out = _empty(moments, has_logvar, out_dtype)
    mean, std, scale = (None if value is None else value.contiguous() for value in (mean, std, scale))
    with torch.cuda.device(moments.device):
        sample_posterior_triton(
            moments.contiguous(), key_hash.contiguous(), seed, epoch, mean, std, scale, has_logvar, out
        )
    return out


def _empty(moments: Tensor, has_logvar: bool, dtype: torch.dtype) -> Tensor:
    batch, _, stored, *spatial = moments.shape
    return moments.new_empty((batch, stored // 2 if has_logvar else stored, *spatial), dtype=dtype)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


LIBRARY.impl("sample_posterior", sample_posterior_reference, "CompositeExplicitAutograd")
LIBRARY.impl("sample_posterior", _cpu, "CPU")
LIBRARY.impl("sample_posterior", _cuda, "CUDA")


@torch.library.register_fake("fastlatent::sample_posterior", lib=LIBRARY)
def _fake(
    moments: Tensor,
    key_hash: Tensor,
    seed: int,
    epoch: int,
    mean: Tensor | None,
    std: Tensor | None,
    scale: Tensor | None,
    has_logvar: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    return _empty(moments, has_logvar, out_dtype)
