"""An encoder or decoder as one ONNX file, for TensorRT; checked against onnxruntime in the tests."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

# Up to 20 a GroupNorm becomes Reshape and InstanceNormalization. TensorRT gets opset 21's GroupNormalization wrong, and
# cannot build the Attention of opset 23 for one head of 512.
OPSET = 18
INPUT, OUTPUT = "input", "output"


def export_onnx(module: nn.Module, inputs: Tensor) -> bytes:
    """`module` for inputs like `inputs` [B, C, h, w], static, in the dtype that it is in; weights are inside.

    The same module gives the same bytes. Names of source files and lines are left out.

    Raises:
        ValueError: onnx or onnxscript is missing, or the module cannot be exported.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"engine: exporting to ONNX needs {package}; pip install 'fastlatent[onnx]'")
    import onnx

    with tempfile.TemporaryDirectory(prefix="fastlatent-onnx-") as temporary, torch.no_grad():
        path = Path(temporary) / "network.onnx"
        try:
            torch.onnx.export(
                module, (inputs,), path, dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
                input_names=[INPUT], output_names=[OUTPUT],
            )  # fmt: skip
        except Exception as error:  # the exporter raises many kinds
            text = " ".join(str(error).split())[:300]
            raise ValueError(f"engine: this network does not export to ONNX: {text}; use --engine compile") from error
        model = onnx.load(path)
    _strip(model.graph)
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


def _strip(graph: object) -> None:
    """Remove what tells where in the source a node came from."""
    import onnx

    assert isinstance(graph, onnx.GraphProto)
    del graph.metadata_props[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]
