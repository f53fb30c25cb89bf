import os

import pytest
import torch

# Triton decides at import time whether to interpret, so this must run before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # on a GPU machine without it the files that need it are left out
    pass
else:
    # A fresh checkout builds hypothesis's table of Unicode at the first text: 1.7 s, which it takes for a slow test.
    settings.register_profile("ours", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("ours")


@pytest.fixture(autouse=True)
def weights_are_made_on_the_cpu():
    """A test that leaves weights to be made on "meta" (by torch's default device, or by the patch of accelerate that
    diffusers loads models under) would break those after it, far from the cause."""
    yield
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu", "this test left another device for new weights"


REQUIRE_CUDA = os.environ.get("FASTLATENT_REQUIRE_CUDA") == "1"


def pytest_collection_modifyitems(items):
    # FASTLATENT_REQUIRE_CUDA=1 on a GPU machine: a missing GPU must fail there, never skip.
    for item in items:
        if item.get_closest_marker("needs_cuda") and not (torch.cuda.is_available() or REQUIRE_CUDA):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("soak") and os.environ.get("FASTLATENT_SOAK") != "1":
            item.add_marker(pytest.mark.skip(reason="full counts run in `make soak`"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """`make soak` leaves a row for every test that only it runs."""
    report = yield
    if call.when == "call" and item.get_closest_marker("soak") and not report.skipped:
        import harness
        import rows

        seconds = call.duration
        timing = harness.Timing(seconds, seconds, seconds, 1) if report.passed else None
        outcome = harness.Outcome("ok" if report.passed else "error", None if report.passed else "failed", timing)
        case = rows.Case("soak", {"test": item.nodeid}, "none", "cpu", ("pytest",))
        rows.append(rows.results_path(), harness.row(case, "pytest", outcome))
    return report
