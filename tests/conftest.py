import os

import pytest
import torch

# Triton decides at import time whether to interpret, so this must run before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

REQUIRE_CUDA = os.environ.get("FASTLATENT_REQUIRE_CUDA") == "1"


def pytest_collection_modifyitems(items):
    # FASTLATENT_REQUIRE_CUDA=1 on a GPU machine: a missing GPU must fail there, never skip.
    for item in items:
        if item.get_closest_marker("needs_cuda") and not (torch.cuda.is_available() or REQUIRE_CUDA):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("soak") and os.environ.get("FASTLATENT_SOAK") != "1":
            item.add_marker(pytest.mark.skip(reason="full counts run in `make soak`"))
