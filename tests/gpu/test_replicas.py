"""On a CUDA device: replicas are compared by samples that the background thread fetches, and say the same."""

from __future__ import annotations

import pytest
import torch

from tests.support.replicas import SIZES, differences, gapped, values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("looks", [1, 2, 3])
@pytest.mark.parametrize("spoiled", ["", *SIZES])
def test_values_on_the_device_are_those_in_host_memory(spoiled: str, looks: int) -> None:
    there = {
        name: gapped(tensor.cuda()) if looks == 2 else tensor.cuda() for name, tensor in values().items()
    }
    if spoiled:
        there[spoiled] += 1
    expected = [f"{spoiled} differs between rank 0 and rank 1"] if spoiled else []
    assert differences([values(), there], 5, looks=looks) == expected
