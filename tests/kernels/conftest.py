"""What kernel tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _device(request):
    """Skips what is marked for a GPU where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def poison():
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
