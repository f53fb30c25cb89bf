"""The memory that a decode takes, found on meta tensors before anything is loaded, and what to say if it runs out."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastlatent.encoders.video_protocol import VideoAutoencoder

# Of the free memory, this share is planned with: allocators round up and leave gaps, libraries keep handles.
USABLE = 0.9
# A stream whose chunks needed no more than the one before, so often in a row, needs no more for the rest.
STEADY = 2
_GIB = 2**30
_ATEN = torch.ops.aten
META = torch.device("meta")


@dataclass(frozen=True)
class _Made:
    """What an operation on meta tensors of certain layouts does.

    specs: (shape, strides, dtype) of the new tensors it makes; None where it returns its first argument.
    single: it returns one tensor, not several. rise: the most bytes it adds to those alive before, while it runs.
    """

    specs: list[tuple[Any, ...]] | None
    single: bool
    rise: int


class _Meter(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and alive; views and in-place results count nothing.

    device: where the tensors would be; None counts tensors alone, wherever they are. With a device, what a kernel
    allocates for itself there is added while it runs (`_convolution_workspace`, `_mask_copies`), attention has its
    score matrix only where torch would take the plain implementation there, and a copy from a meta tensor to the host
    is a meta tensor, which counts only if the host is the device.

    torch works out the shapes of meta tensors in Python, 0.1 to 1 ms an operation; a decode repeats few operations
    often, so what each made is kept: Wan's 240 tile steps of 61 frames at 848×480 took 28 s without.
    """

    def __init__(self, device: torch.device | None) -> None:
        super().__init__()
        self.device = device
        self.alive = self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._made: dict[Any, _Made] = {}
        self._to_host = 0  # copies, which are not to be remembered: their results look like any other meta tensor

    def lap(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.alive
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_view(func):
            return func(*args, **kwargs)
        if self.device is not None and func is _ATEN._to_copy.default:
            target = kwargs.get("device", META)
            if args[0].is_meta and target != META:
                out = func(*args, **{**kwargs, "device": META})
                self._count([out] if self.device.type == target.type else [])
                self._to_host += 1
                return out
        key = (func, _signature(args), _signature(tuple(kwargs.items())))
        made = self._made.get(key)
        if made is not None:
            self._spike(made.rise)
            if made.specs is None:
                return args[0]
            out = [torch.empty_strided(size, stride, dtype=dtype, device=META) for size, stride, dtype in made.specs]
            self._count(out)
            return out[0] if made.single else tuple(out)
        alive, peak, to_host = self.alive, self.peak, self._to_host
        self.peak = alive
        out = self._run(func, args, kwargs)
        rise, self.peak = self.peak - alive, max(self.peak, peak)
        tensors = tree_leaves(out)
        if self._to_host == to_host and all(map(_at_start_of_meta, tensors)):
            if not _storages(tensors) & _storages(args):
                specs = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
                self._made[key] = _Made(specs, isinstance(out, Tensor), rise)
            elif out is args[0] and _signature(out) == key[1][0]:
                self._made[key] = _Made(None, True, rise)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.device is not None:
            if func is _ATEN.copy_.default and args[1].is_meta and not args[0].is_meta:
                return args[0]
            if func is _ATEN.scaled_dot_product_attention.default and _fused(self.device, args, kwargs):
                query, _, value = args[:3]
                out = query.new_empty(*query.shape[:-1], value.shape[-1])
                self._count([out])
                self._spike(_mask_copies(*args, **kwargs))
                return out
        # In inference mode composite operations arrive whole; the temporaries inside them count too.
        if func._can_decompose():
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        # Views and in-place results have the storage of an argument, which may be of a weight, made outside.
        old = _storages(args)
        self._count([x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in old])
        if self.device is not None and func is _ATEN.convolution.default:
            self._spike(_convolution_workspace(self.device, out, *args))
        return out

    def _spike(self, size: int) -> None:
        self.peak = max(self.peak, self.alive + size)

    def _count(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if self.device is None or tensor.is_meta or self.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._storages:
                    self._hold(storage)

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def freed(_: object) -> None:
            del self._storages[key]
            self.alive -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.alive += size
        self._spike(0)


def _at_start_of_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta and value.storage_offset() == 0


@functools.cache
def _is_view(func: Any) -> bool:
    return func.is_view and not func._can_decompose()  # reshape and contiguous, made of others, may copy


def _storages(values: Any) -> set[int]:
    return {value.untyped_storage()._cdata for value in tree_leaves(values) if isinstance(value, Tensor)}


def _signature(value: Any) -> Any:
    """What a meta operation's result depends on: of tensors the layout, of all else type and value (1 is not 1.0)."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple([_signature(item) for item in value])
    return type(value), value


def _on_device(device: torch.device, tensor: Tensor | None) -> Tensor | None:
    """A tensor of the same shape and dtype there that takes one row of memory, for torch's choice of a kernel."""
    if tensor is None:
        return None
    row = torch.empty(tensor.shape[-1:], dtype=tensor.dtype, device=device)
    return row.expand(tensor.shape)


def _fused(device: torch.device, args: Any, kwargs: Any) -> bool:
    """Whether attention with these tensors keeps no score matrix on the device: torch is asked for its choice."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: _on_device(device, tensor), (list(args), dict(kwargs)))
    return torch._fused_sdp_choice(*args, **kwargs) != SDPBackend.MATH.value


def _mask_copies(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> int:
    """Fused kernels copy a mask to the dtype of the query (if it is boolean) or to aligned rows."""
    return 0 if attn_mask is None else attn_mask.numel() * query.element_size()


def _convolution_workspace(
    device: torch.device, out: Tensor, x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> int:  # fmt: skip
    """Bytes that a convolution allocates for itself at most, by the implementation that torch chooses on the device.

    The plain ones unfold their input into columns: C·kernel numbers for each output pixel. Wan's decoder in bfloat16
    at 832×480 so takes 96·27·4·480·832·2 B = 7.7 GiB where cuDNN is passed over (torch 2.9, cuDNN 9.10 to 9.14).
    The libraries' kernels (cuDNN, oneDNN) work in layouts of their own: input, weight and output once more. cuDNN may
    ask for more, which torch tries first and does without where there is none.
    """
    backend = torch._C._select_conv_backend(
        _on_device(device, x), _on_device(device, weight), None, stride, padding, dilation, transposed, output_padding,
        groups, None,
    )  # fmt: skip
    if not backend.name.startswith("Slow"):
        return x.nbytes + weight.nbytes + out.nbytes
    batch = 1 if device.type == "cuda" else x.shape[0]
    side, channels = (x, out.shape[1]) if transposed else (out, x.shape[1])
    kernel = math.prod(weight.shape[2:])
    return batch * channels * kernel * math.prod(side.shape[2:]) * x.element_size()


def peak_bytes(function: Callable[[], Any], device: torch.device | None = None) -> int:
    """Run `function` and return the most bytes of tensors made inside that were alive at once.

    Its tensors may be on "meta" (nothing is computed) or real. Storages count, from the end of the operation that made
    them until they are freed; what kernels allocate for themselves does not. With a device (its tensors then on "meta")
    it does: the number is an upper bound there, up to the allocator's gaps.
    """
    with torch.inference_mode(), _Meter(device) as meter:
        result = function()
    del result
    return meter.peak


def weight_bytes(vae: Any) -> int:
    """Bytes of the parameters and buffers of an autoencoder's `model`; with its weights on "meta" too."""
    model: nn.Module = vae.model
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True)
class Working:
    """What decoding one item takes above weights: bytes, and the frames of its largest chunk."""

    bytes: int
    chunk_frames: int


_MEASURED: weakref.WeakKeyDictionary[Any, dict[Any, Working]] = weakref.WeakKeyDictionary()


def working_set(vae: VideoAutoencoder, latent_shape: tuple[int, ...], device: torch.device, tiles: bool) -> Working:
    """What `vae.stream` of raw float32 latents [1, C, t, h, w] takes on the device; `vae` has its weights on "meta".

    Chunks are drawn until they need no more than those before, so a stream whose memory does not grow with t is
    measured by its first chunks, and one whose memory does by all. Kept for each shape.
    """
    known = _MEASURED.setdefault(vae, {})
    key = (latent_shape, device, tiles)
    if key not in known:
        with torch.inference_mode(), _Meter(device) as meter:
            chunks = vae.stream(torch.empty(latent_shape, device=META), tiles=tiles)
            known[key] = _drawn(meter, chunks)
    return known[key]


def _drawn(meter: _Meter, chunks: Iterator[Tensor]) -> Working:
    peaks: list[int] = []
    frames = 0
    for chunk in chunks:  # kept while the next is made, as who writes it does
        frames = max(frames, chunk.shape[1])
        peaks.append(meter.lap())
        if len(peaks) > STEADY and sorted(last := peaks[-STEADY - 1 :], reverse=True) == last:
            break
    else:
        peaks.append(meter.lap())
    return Working(max(peaks), frames)


@dataclass(frozen=True)
class DecodePlan:
    """How one shape of latents is decoded. tiles: in tiles. available: bytes free, None unknown. text: for the user."""

    tiles: bool
    weight_bytes: int
    working_bytes: int
    available: int | None
    device: torch.device
    text: str


def plan_decode(
    vae: VideoAutoencoder,
    latent_shape: tuple[int, ...],
    *,
    weight_bytes: int,
    available: int | None,
    device: torch.device,
) -> DecodePlan:
    """Choose whether to decode in tiles: only where the whole item's working set does not fit.

    Args:
        vae: with its weights on "meta".
        latent_shape: [1, C, t, h, w] as `stream` takes them.
        weight_bytes: of the model, which is not loaded yet.
        available: bytes free on the device; None where that is unknown, which plans without tiles.
        device: asked which kernels it would take; it must be there.

    Raises:
        ValueError: not even tiles fit.
    """
    _, _, t, h, w = latent_shape
    size = f"{vae.frames(t)} frames of {w * vae.downsample}×{h * vae.downsample}"
    whole = 0
    for tiles in (False, True) if vae.tiles else (False,):
        working = working_set(vae, latent_shape, device, tiles)
        whole = whole or working.bytes
        if available is None or weight_bytes + working.bytes <= USABLE * available:
            how = "at once" if working.chunk_frames >= vae.frames(t) else f"streamed by {working.chunk_frames} frames"
            if tiles:
                how += f", in tiles (without: {_gib(whole)})"
            memory = f"{_gib(weight_bytes)} weights + {_gib(working.bytes)} working memory"
            free = f"unknown free memory on {device}" if available is None else f"{_gib(available)} free on {device}"
            text = f"decode plan: {size}, {how}; {memory} of {free}"
            return DecodePlan(tiles, weight_bytes, working.bytes, available, device, text)
    assert available is not None
    raise ValueError(
        f"not enough memory to decode {size}: needed are {_gib(weight_bytes)} weights + {_gib(working.bytes)} working "
        f"memory{' in tiles' if tiles else ' (this autoencoder has no tiles)'}, free on {device} are {_gib(available)} "
        f"({USABLE:.0%} of them are planned with). {_ways_out(device)}"
    )


def available_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated on the device: CUDA's free memory and what torch holds in reserve, or the host's.

    On the host, what Linux says is available, or the rest of the tightest control group (v1, v2) if that is less; page
    cache counts as free. None where that cannot be told. root: of the file systems /proc and /sys.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    lines = _lines(root / "proc/meminfo")
    rests = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return min([*rests, *_group_rests(root)], default=None)


def _group_rests(root: Path) -> Iterator[int]:
    """Bytes left in each control group that this process is in and that has a limit."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        group = mount / path.lstrip("/")
        # In a container the path is the host's, and the group's files are at the mount.
        for folder in (group, *group.parents):
            limit, used = (_lines(folder / name) for name in names[:2])
            if limit and used and limit[0] != "max":
                cached = [int(row.split()[1]) for row in _lines(folder / "memory.stat") if row.split()[0] == names[2]]
                yield max(0, int(limit[0]) - int(used[0]) + sum(cached))
            if folder == mount:
                break


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was what an operation of torch or Python lacked, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch has no class for its CPU allocator's and the CUDA libraries' failures.
    signs = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def explain(error: BaseException, plan: DecodePlan) -> str:
    """What to tell the user when memory ran out although the plan fitted, and tiles did not help."""
    assert is_out_of_memory(error), error
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    free = "unknown" if plan.available is None else _gib(plan.available)
    return (
        f"out of memory on {plan.device}{' in tiles' if plan.tiles else ''}: expected were {_gib(plan.weight_bytes)} "
        f"weights + {_gib(plan.working_bytes)} working memory, free at the start {free} ({said}). "
        f"{_ways_out(plan.device)}"
    )


def _ways_out(device: torch.device) -> str:
    other = "end what else uses memory there, " if device.type == "cpu" else "choose another GPU (--device cuda:N), "
    last = "use a GPU (--device cuda)" if device.type == "cpu" else "use the processor (--device cpu)"
    return f"Ways out: {other}halve it with --dtype bfloat16 if that is not set, or {last}"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
