"""What kernel tests share."""

import pytest
import torch


@pytest.fixture
def poison():
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
