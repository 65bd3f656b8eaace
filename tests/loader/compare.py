"""How two loaders' batches are compared."""

import torch

from mpmae.loader import Batch


def assert_same_batch(got: Batch, expected: Batch) -> None:
    """Equal integers, flags and counts; floats to 1 unit in the last place."""
    assert set(got.values) == set(got.valid) == set(expected.values)
    assert torch.equal(got.sample_ids.cpu(), expected.sample_ids)
    assert torch.equal(got.padding.cpu(), expected.padding)
    assert got.num_present == expected.num_present
    assert got.global_batch_size == expected.global_batch_size
    for name, values in expected.values.items():
        ours, valid = got.values[name].cpu(), got.valid[name].cpu()
        assert valid.dtype == torch.bool
        assert torch.equal(valid, expected.valid[name]), name
        assert ours.dtype == values.dtype
        assert ours.shape == values.shape
        if values.is_floating_point():
            spacing = torch.nextafter(values.abs(), torch.tensor(torch.inf)) - values.abs()
            assert ((ours - values).abs() <= spacing).all(), name
        else:
            assert torch.equal(ours, values), name
