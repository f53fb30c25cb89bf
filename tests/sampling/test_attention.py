import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fastlatent.models.transformer import rope_table, rotate
from fastlatent.sampling import attention
from fastlatent.sampling.attention import BACKENDS, KVCache, choose_attention

FLOAT8 = torch.float8_e4m3fn
ROWS, TOKENS, KV_HEADS, HEAD_DIM = 2, 70, 2, 32
# Relative Frobenius error against float64 of a whole sequence: a few roundings of q, k, weights and output.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def sequence(dtype, group=2, *, device="cpu"):
    """qkv of every token [R, N, (Hq + 2·Hkv)·D] and the tables [N, D/2]."""
    generator = torch.Generator().manual_seed(group)
    size = (ROWS, TOKENS, (group + 2) * KV_HEADS * HEAD_DIM)
    qkv = torch.randn(size, generator=generator, dtype=torch.float64)
    return qkv.to(device, dtype), *(table.to(device, dtype) for table in rope_table(TOKENS, HEAD_DIM))


def full(qkv, cos, sin, *, kv=lambda cache: cache):
    """Causal attention of the whole sequence at once in float64; kv: what the cache makes of keys and values."""
    x = qkv.double().cpu().unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
    q, k, v = x[:, : -2 * KV_HEADS], x[:, -2 * KV_HEADS : -KV_HEADS], x[:, -KV_HEADS:]
    q, k = (rotate(heads, cos.double().cpu(), sin.double().cpu()) for heads in (q, k))
    out = F.scaled_dot_product_attention(q, kv(k), kv(v), is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def decoded(run, qkv, cos, sin, *, kv_dtype=None, bucket=64, tokens=range(TOKENS)):
    """The same token by token, with contexts of whole buckets; [R, tokens, Hq·D]."""
    cache = KVCache.allocate(3, ROWS, TOKENS, KV_HEADS, HEAD_DIM, kv_dtype=kv_dtype or qkv.dtype, device=qkv.device)
    outputs = []
    for n in range(max(tokens) + 1):
        context = min(TOKENS, -(-(n + 1) // bucket) * bucket)
        position = torch.tensor([n], device=qkv.device)
        outputs.append(run(qkv[:, n], cos, sin, position, context, cache.keys[1], cache.values[1]))
    assert not cache.keys[::2].float().any() and not cache.values[::2].float().any()  # the other layers
    return torch.stack(outputs, dim=1)[:, tokens]


def error(got, want):
    return float((got.double().cpu() - want).norm() / want.norm())


def check(run, dtype, group, *, bucket=64, device="cpu"):
    inputs = sequence(dtype, group, device=device)
    out = decoded(run, *inputs, bucket=bucket)
    assert out.dtype == dtype
    assert error(out, full(*inputs)) < TOLERANCE[dtype]
    return out


def flash_attn_with_kvcache(
    q, k_cache, v_cache, *, k, v, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, causal=False
):
    """flash-attn's documented contract, in plain torch."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.ndim == k.ndim == 4 and q.shape[1] == 1
    assert q.dtype == k_cache.dtype == rotary_cos.dtype == rotary_sin.dtype and rotary_interleaved
    assert cache_seqlens.shape == (len(q),) and cache_seqlens.dtype == torch.int32 and cache_seqlens.is_contiguous()
    assert len(rotary_cos) >= k_cache.shape[1] and rotary_cos.is_contiguous()
    assert all(tensor.stride(-1) == 1 for tensor in (q, k, v, k_cache, v_cache))
    out = torch.empty_like(q)
    for row, n in enumerate(cache_seqlens.tolist()):
        k_cache[row, n] = rotate(k[row], rotary_cos[n], rotary_sin[n])[0]
        v_cache[row, n] = v[row, 0]
        turned = rotate(q[row], rotary_cos[n], rotary_sin[n]).transpose(0, 1)
        keys, values = (cache[row, : n + 1].transpose(0, 1) for cache in (k_cache, v_cache))
        out[row] = F.scaled_dot_product_attention(turned, keys, values, enable_gqa=True).transpose(0, 1)
    return out


def varlen_attn(q, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, enable_gqa, seqused_k):
    """torch's documented contract, in plain torch."""
    assert q.ndim == key.ndim == 3 and max_q == 1 and enable_gqa == (q.shape[1] != key.shape[1])
    assert all(tensor.dtype == torch.int32 for tensor in (cu_seq_q, cu_seq_k, seqused_k))
    assert cu_seq_q.tolist() == list(range(len(q) + 1)) and int(cu_seq_k[-1]) == len(key)
    assert max_k >= int(seqused_k.max())
    out = torch.empty_like(q)
    for row, (begin, used) in enumerate(zip(cu_seq_k.tolist(), seqused_k.tolist(), strict=False)):
        keys, values = (cache[begin : begin + used].transpose(0, 1) for cache in (key, value))
        out[row] = F.scaled_dot_product_attention(q[row, :, None], keys, values, enable_gqa=True)[:, 0]
    return out


def test_cache():
    cache = KVCache.allocate(3, 2, 5, 4, 32, kv_dtype=FLOAT8, device="cpu")
    for tensor in (cache.keys, cache.values):
        assert tensor.shape == (3, 2, 5, 4, 32) and tensor.dtype == FLOAT8 and not tensor.float().any()
    assert cache.keys[1].is_contiguous()
    with pytest.raises(ValueError, match=r"KVCache: expected kv_dtype .*float8_e4m3fn, got torch\.int8"):
        KVCache.allocate(1, 1, 1, 1, 2, kv_dtype=torch.int8, device="cpu")


@pytest.mark.parametrize("bucket", [1, 64])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sdpa_is_causal_attention(dtype, group, bucket):
    """Token by token and all at once are the same, whether the context is exact or a bucket."""
    check(BACKENDS["sdpa"], dtype, group, bucket=bucket)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_backend_through_the_ops(dtype, group):
    """On a CPU the two ops of "triton" run their own CPU code; on CUDA the next tests run the kernels."""
    check(BACKENDS["triton"], dtype, group)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device's own backends are compared instead")
@pytest.mark.parametrize("kv_dtype", [None, torch.float16])
def test_triton_kernels_interpreted(kv_dtype, monkeypatch):
    """Both kernels in turn as the backend calls them: the first five tokens against sdpa."""
    pytest.importorskip("triton")
    from fastlatent.kernels.decode_attention import decode_attention_triton
    from fastlatent.kernels.rope_append_kv import rope_append_kv_triton

    def append(qkv, *rest):
        return rope_append_kv_triton(qkv.contiguous(), *rest)

    def decode(q, keys, values, position, *, max_length):
        return decode_attention_triton(q, keys, values, position, q.shape[-1] ** -0.5, max_length)

    monkeypatch.setattr(attention, "rope_append_kv", append)
    monkeypatch.setattr(attention, "decode_attention", decode)
    inputs = sequence(torch.float32, 2)
    got = decoded(BACKENDS["triton"], *inputs, kv_dtype=kv_dtype, tokens=range(5))
    want = decoded(BACKENDS["sdpa"], *inputs, kv_dtype=kv_dtype, tokens=range(5))
    assert error(got, want.double()) < 2e-6


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_is_called_as_documented(dtype, group, monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    check(BACKENDS["flash"], dtype, group)


@pytest.mark.parametrize("group", [1, 4])
def test_varlen_is_called_as_documented(group, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    check(BACKENDS["varlen"], torch.bfloat16, group)


def test_float8_cache():
    """Against float64 over keys and values that are rounded to float8, and what float8 itself costs."""
    inputs = sequence(torch.float32)
    out = decoded(BACKENDS["sdpa"], *inputs, kv_dtype=FLOAT8)
    # 1e-3, not 1e-6: float32's keys round to another float8 than float64's where they stand beside a tie.
    assert error(out, full(*inputs, kv=lambda cache: cache.float().to(FLOAT8).double())) < 1e-3
    assert 0.01 < error(out, full(*inputs)) < 0.06


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kv_dtype", [None, FLOAT8])
def test_cpu_takes_sdpa(dtype, kv_dtype):
    backend = choose_attention("cpu", dtype, HEAD_DIM, kv_dtype or dtype)
    assert backend.name == "sdpa" and backend.run is BACKENDS["sdpa"]
    assert backend.describe() == "attention: sdpa"


def test_order_and_reasons(monkeypatch):
    """flash → triton → sdpa on CUDA; the reasons of those before are kept."""
    asked, runs = [], {"sdpa"}

    def probe(name, *_):
        asked.append(name)
        return None if name in runs else f"no {name} here"

    monkeypatch.setattr(attention, "_probe", probe)
    arguments = ("cuda", torch.bfloat16, 64, torch.bfloat16)
    backend = choose_attention(*arguments)
    assert asked == ["flash", "triton", "sdpa"]
    assert backend.describe() == "attention: sdpa (not flash: no flash here; not triton: no triton here)"
    runs |= {"triton", "varlen"}
    assert choose_attention(*arguments).describe() == "attention: triton (not flash: no flash here)"
    assert choose_attention(*arguments, force="varlen").describe() == "attention: varlen"
    runs.add("flash")
    assert choose_attention(*arguments).describe() == "attention: flash"
    runs.clear()
    with pytest.raises(ValueError, match="no flash here; triton: no triton here; sdpa: no sdpa here"):
        choose_attention(*arguments)


@pytest.mark.parametrize("name", ["flash", "triton", "varlen"])
def test_forced_without_cuda(name):
    message = rf"cannot run on cpu with torch\.bfloat16, head size 64, .*: {name}: needs a CUDA device, got cpu"
    with pytest.raises(ValueError, match=message):
        choose_attention("cpu", torch.bfloat16, 64, torch.bfloat16, force=name)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="expected one of flash, triton, varlen, sdpa, got 'fast'"):
        choose_attention("cpu", torch.bfloat16, 64, torch.bfloat16, force="fast")
    with pytest.raises(ValueError, match=r"expected dtype one of .* got torch\.int32"):
        choose_attention("cpu", torch.int32, 64, torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected kv_dtype one of .* got torch\.float8_e5m2"):
        choose_attention("cpu", torch.bfloat16, 64, torch.float8_e5m2)


def test_probe_catches_a_wrong_backend(monkeypatch):
    """One that attends to a token too few, one that forgets to append, one that makes NaN, one that fails."""
    sdpa = BACKENDS["sdpa"]

    def short(qkv, cos, sin, position, context, keys, values):
        sdpa(qkv, cos, sin, position, context, keys, values)
        return sdpa(qkv, cos, sin, position - 1, context, keys.clone(), values.clone())

    def forgets(qkv, cos, sin, position, context, keys, values):
        return sdpa(qkv, cos, sin, position, context, keys.clone(), values.clone())

    def fails(*_):
        raise RuntimeError("no kernel image")

    wrong = {
        "relative errors of output": (short, forgets, lambda *args: sdpa(*args) * torch.nan),
        "RuntimeError: no kernel image": (fails,),
    }
    for message, runs in wrong.items():
        for run in runs:
            monkeypatch.setitem(BACKENDS, "sdpa", run)
            with pytest.raises(ValueError, match=message):
                choose_attention("cpu", torch.bfloat16, 64, torch.bfloat16)


def cuda_backend(name, dtype, kv_dtype=None):
    """The backend, or a skip where a package that only some machines have is missing; triton and sdpa must run."""
    try:
        return choose_attention("cuda", dtype, HEAD_DIM, kv_dtype or dtype, force=name).run
    except ValueError as failure:
        if name in ("triton", "sdpa"):
            raise
        pytest.skip(str(failure))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
def test_backends_agree_on_cuda(name, dtype, group):
    out = check(cuda_backend(name, dtype), dtype, group, device="cuda")
    assert error(out, check(BACKENDS["sdpa"], dtype, group, device="cuda").double().cpu()) < TOLERANCE[dtype]


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_wide_dtypes_on_cuda(name, dtype):
    check(cuda_backend(name, dtype), dtype, 2, device="cuda")


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", ["triton", "sdpa"])
def test_float8_on_cuda(name):
    inputs = sequence(torch.bfloat16, device="cuda")
    out = decoded(cuda_backend(name, torch.bfloat16, FLOAT8), *inputs, kv_dtype=FLOAT8)
    assert error(out, full(*inputs, kv=lambda cache: cache.float().to(FLOAT8).double())) < TOLERANCE[torch.bfloat16]


@pytest.mark.needs_cuda
@pytest.mark.parametrize("name", BACKENDS)
def test_one_graph_serves_every_position(name):
    run = cuda_backend(name, torch.bfloat16)
    qkv, cos, sin = sequence(torch.bfloat16, device="cuda")
    cache = KVCache.allocate(1, ROWS, TOKENS, KV_HEADS, HEAD_DIM, kv_dtype=torch.bfloat16, device="cuda")
    token, position = qkv[:, 0].clone(), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step():
        return run(token, cos, sin, position, TOKENS, cache.keys[0], cache.values[0])

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    outputs = []
    for n in range(TOKENS):
        token.copy_(qkv[:, n])
        position.fill_(n)
        graph.replay()
        outputs.append(out.clone())
    assert error(torch.stack(outputs, 1), full(qkv, cos, sin)) < TOLERANCE[torch.bfloat16]
