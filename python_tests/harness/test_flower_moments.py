"""AdamW's moments in a Flower node's context, bit for bit."""

import pytest
import torch

pytest.importorskip("flwr", reason="needs Flower: the extra flower")

from integration.flower.moments import read_moments, write_moments


def test_moments_travel():
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 11: {}}
    found = read_moments(write_moments(moments), torch.device("cpu"))
    assert found.keys() == {0}, "a parameter without a state needs none"
    assert torch.equal(found[0]["step"], moments[0]["step"])
    assert torch.equal(found[0]["exp_avg"], moments[0]["exp_avg"])
