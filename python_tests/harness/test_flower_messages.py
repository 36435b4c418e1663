"""Flower's messages: every tensor bit for bit, and a reason for every record that holds none."""

import pytest
import torch

pytest.importorskip("flwr", reason="needs Flower: pip install 'flwr[simulation]==1.41.*'")

from flwr.app import Array, ArrayRecord

import fedlora_kernels as flk
from integration.flower import messages


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_tensors_travel_bit_for_bit(dtype):
    patterns = torch.randint(-128, 128, (7, 5, dtype.itemsize), dtype=torch.int8)  # NaN among them
    tensors = {
        "any bits": patterns.view(dtype).squeeze(-1),
        "not contiguous": torch.randn(6, 4).to(dtype).T,
        "scalar": torch.tensor(1 / 3, dtype=dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    found = messages.read_tensors(messages.write_tensors(tensors))
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        sent = tensor.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), sent)


def test_flowers_own_averaging_cannot_read_the_arrays():
    array = messages.write_tensors({"b": torch.ones(2, dtype=torch.bfloat16)})["b"]
    with pytest.raises(TypeError):
        array.numpy()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bfloat15"}, "b is bfloat15 in raw.le; expected raw.le and one of float64"),
        ({"stype": "numpy.ndarray"}, "b cannot be read from numpy.ndarray: "),
        ({"shape": (2, 3)}, r"b has 16 bytes; float32 of shape \[2, 3\] has 24"),
    ],
)
def test_records_that_hold_no_tensors_say_why(change, message):
    array = {"dtype": "float32", "shape": (2, 2), "stype": "raw.le", "data": bytes(16)} | change
    with pytest.raises(flk.AdapterError, match=message):
        messages.read_tensors(ArrayRecord({"b": Array(**array)}))


def test_moments_travel(tmp_path):
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 11: {}}
    found = messages.read_moments(messages.write_moments(moments), torch.device("cpu"))
    assert found.keys() == {0}, "a parameter without a state needs none"
    assert torch.equal(found[0]["step"], moments[0]["step"])
    assert torch.equal(found[0]["exp_avg"], moments[0]["exp_avg"])
