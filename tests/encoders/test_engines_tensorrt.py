"""The TensorRT engine as far as it goes without a GPU: its ONNX file under onnxruntime, and its network built."""

import hashlib
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from fastlatent.encoders.engines.numerics import relative_error
from fastlatent.encoders.engines.onnx_export import OPSET, export_onnx
from fastlatent.encoders.engines.tensorrt import _loaded, build_plan, import_tensorrt

SHAPE = (2, 3, 16, 16)


class Encoder(nn.Module):
    def __init__(self, widths=(8, 8), **more):
        super().__init__()
        torch.manual_seed(0)
        config = {"layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 2, **more}
        model = AutoencoderKL(
            block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * len(widths),
            up_block_types=["UpDecoderBlock2D"] * len(widths), **config,
        )  # fmt: skip
        self.encoder, self.quant_conv = model.encoder, model.quant_conv
        for name, parameter in self.named_parameters():
            if "norm" in name:  # all ones and zeros at first, which the exporter would write once
                parameter.data += torch.randn_like(parameter) * 0.1
        self.eval().requires_grad_(False)

    def forward(self, pixels):
        return self.quant_conv(self.encoder(pixels))


def exported(dtype):
    return export_onnx(Encoder().to(dtype), torch.zeros(SHAPE, dtype=dtype))


@pytest.fixture(scope="module")
def float32_file():
    return exported(torch.float32)


@pytest.fixture(scope="module")
def bfloat16_file():
    return exported(torch.bfloat16)


def run_onnx(file, pixels):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["output"], {"input": pixels.numpy()})[0])


def check_parity(file, module, shape):
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    got = run_onnx(file, pixels)
    assert relative_error(got, module(pixels)) <= 1e-4
    return got


def test_onnxruntime_agrees(float32_file):
    assert check_parity(float32_file, Encoder(), SHAPE).shape == (2, 4, 8, 8)


def test_the_file(float32_file, bfloat16_file):
    for file, dtype in ((float32_file, onnx.TensorProto.FLOAT), (bfloat16_file, onnx.TensorProto.BFLOAT16)):
        model = onnx.load_from_string(file)
        onnx.checker.check_model(model)
        assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
        (pixels,), (moments,) = model.graph.input, model.graph.output
        for value, shape in ((pixels, SHAPE), (moments, (2, 4, 8, 8))):
            kind = value.type.tensor_type
            assert kind.elem_type == dtype
            assert tuple(d.dim_value for d in kind.shape.dim) == shape  # static
        kinds = {node.op_type for node in model.graph.node}
        assert "InstanceNormalization" in kinds and not kinds & {"GroupNormalization", "Attention"}
        # Strongly typed: nothing of the network is in another precision than the module.
        floats = {i.data_type for i in model.graph.initializer} - {onnx.TensorProto.INT64, onnx.TensorProto.INT32}
        assert floats == {dtype}
        weights = sum(np.prod(i.dims) for i in model.graph.initializer if i.data_type == dtype)
        assert weights >= sum(parameter.numel() for parameter in Encoder().parameters())  # inside the file


def test_no_path_or_line_number_is_inside(float32_file):
    assert b".py" not in float32_file and b"File " not in float32_file


@pytest.mark.soak
def test_another_process_writes_the_same_file(float32_file):
    # Its SHA-256 names the plan.
    code = "import hashlib, test_engines_tensorrt as t; print(hashlib.sha256(t.exported(t.torch.float32)).hexdigest())"
    folder = __file__.rpartition("/")[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.split()[-1] == hashlib.sha256(float32_file).hexdigest()


def test_the_weights_decide_the_file(float32_file):
    module = Encoder()
    assert export_onnx(module, torch.zeros(SHAPE)) == float32_file
    module.quant_conv.weight.data[0, 0, 0, 0] += 1e-3
    assert export_onnx(module, torch.zeros(SHAPE)) != float32_file


def test_what_does_not_export():
    class Branches(nn.Module):
        def forward(self, pixels):
            return pixels if pixels.sum() > 0 else -pixels

    with pytest.raises(ValueError, match="does not export to ONNX.*use --engine compile"):
        export_onnx(Branches().eval(), torch.zeros(SHAPE))


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_is_missing(monkeypatch, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(ValueError, match=rf"needs {package}; pip install 'fastlatent\[onnx\]'"):
        export_onnx(nn.Identity(), torch.zeros(SHAPE))


def test_tensorrt_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ValueError, match=r"pip install tensorrt-cu13 'fastlatent\[onnx\]'.*or use --engine compile"):
        import_tensorrt()


@pytest.mark.filterwarnings("ignore:.*TensorRT-RTX:DeprecationWarning")  # it has no timing cache, and says so
def test_build(float32_file, bfloat16_file):
    trt = pytest.importorskip("tensorrt_rtx")
    for file in (float32_file, bfloat16_file):
        plan, timings = build_plan(trt, file)
        assert len(plan) > 10_000 and timings
        again, _ = build_plan(trt, file, timings)
        assert len(again) > 10_000
    build_plan(trt, float32_file, b"not a timing cache")  # of another version or GPU: ignored


def test_a_file_that_is_not_onnx():
    trt = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ValueError, match="does not parse this network: .*\\w"):
        build_plan(trt, b"\x08\x08not a model")


def test_a_plan_that_does_not_load():
    # Without a driver the runtime refuses every plan; with one, this one.
    trt = pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ValueError, match="does not load its own plan: .*\\w"):
        _loaded(trt, b"not a plan", torch.zeros(SHAPE))


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*TensorRT-RTX:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stable_diffusion_sizes(dtype):
    # A head of 512 over 1024 tokens is what kept opset 23 from building.
    trt = pytest.importorskip("tensorrt_rtx")
    module = Encoder((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, latent_channels=4)
    file = export_onnx(module.to(dtype), torch.zeros(1, 3, 256, 256, dtype=dtype))
    if dtype == torch.float32:
        check_parity(file, module, (1, 3, 256, 256))
    plan, _ = build_plan(trt, file)
    assert len(plan) > 30e6 * dtype.itemsize
