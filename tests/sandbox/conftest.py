"""Every test of the sandbox's contract runs on each mechanism that works on this machine."""

import pytest

from posttrain.sandbox.mechanisms import MECHANISMS
from posttrain.sandbox.running import unavailable


@pytest.fixture(params=list(MECHANISMS))
def mechanism(request: pytest.FixtureRequest) -> str:
    """Name of a mechanism that works here."""
    if reason := unavailable(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param
