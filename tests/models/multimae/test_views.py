"""Domains as views of a batch."""

import numpy as np
import pytest
import torch

from mpmae.domains import DOMAINS, PUBLISHED_DOMAINS, domain_of
from mpmae.errors import ConfigError
from mpmae.modalities import MODALITIES
from mpmae.models.multimae.views import map_of, patches_of, standardise_truncated, view_of
from tests.models.multimae.small import SIZE, build
from tests.models.small import drop

# positions in MMEarth's 13 Sentinel-2 bands, as the published code picks them
PUBLISHED_BANDS = {"rgb": [3, 2, 1], "ired": [4, 5, 6], "ebands": [7, 8], "sired": [11, 12]}


@pytest.mark.parametrize("name", PUBLISHED_BANDS)
def test_bands_are_the_published_ones(make_batch, name):
    batch = make_batch(2, SIZE)
    values = build()._view(batch, domain_of(name)).values
    assert torch.equal(values, batch.values["sentinel2"][:, PUBLISHED_BANDS[name]].double())


def test_every_map_modality_is_a_domain():
    assert set(PUBLISHED_DOMAINS) < set(DOMAINS)
    assert [domain_of("sentinel1").num_channels, domain_of("sentinel2").num_channels] == [8, 12]
    assert (domain_of("dynamic_world").num_classes, domain_of("dynamic_world").stride) == (10, 4)
    assert all(domain.modality in MODALITIES for domain in DOMAINS.values())


def test_an_unknown_domain():
    with pytest.raises(ConfigError, match="unknown domain 'rbg'; did you mean rgb"):
        domain_of("rbg")


def test_values_without_data_are_0_and_not_valid(make_batch):
    batch = make_batch(2, SIZE)
    batch.values["sentinel2"][0, 3, 5, 6] = torch.nan
    batch.values["sentinel2"][1, 2, 1, 1] = 7.0
    batch.valid["sentinel2"][1, 2, 1, 1] = False
    values, valid = build()._view(batch, domain_of("rgb"))
    assert (values[0, 0, 5, 6], values[1, 1, 1, 1]) == (0, 0)
    assert (~valid).nonzero().tolist() == [[0, 0, 5, 6], [1, 1, 1, 1]]


def test_classes_are_those_next_to_the_middle_of_each_cell(make_batch):
    batch = make_batch(1, SIZE)
    ids = batch.values["esa_worldcover"]
    drop(batch, "esa_worldcover", (0, 0, 2, 6))
    values, valid = view_of(domain_of("semseg"), batch, None, torch.float32)
    expected = ids[:, 0, 2::4, 2::4].clone()
    expected[0, 0, 1] = 11
    assert values.shape == (1, 6, 6)
    assert torch.equal(values, expected)
    assert (~valid).nonzero().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("num_gaps", [0, 1, 37, 98, 99, 100])
def test_truncated_standardisation(num_gaps):
    """Against numpy on the valid values; gaps come out as 0."""
    generator = np.random.default_rng(num_gaps)
    values = generator.normal(size=(1, 1, 10, 10)) * 3 + 5
    valid = np.ones(100, bool)
    valid[generator.permutation(100)[:num_gaps]] = False
    got = standardise_truncated(torch.from_numpy(values), torch.from_numpy(valid.reshape(values.shape)))
    data = np.sort(values.flatten()[valid])
    middle = data[int(0.1 * len(data)) : max(int(0.9 * len(data)), min(1, len(data)))]
    mean, variance = (middle.mean() if len(middle) else 0), (middle.var(ddof=1) if len(middle) > 1 else 0)
    expected = np.where(valid, (values.flatten() - mean) / np.sqrt(variance + 1e-6), 0)
    np.testing.assert_allclose(got.flatten().numpy(), expected, rtol=1e-9, atol=1e-9)


def test_patches_and_maps_are_inverses():
    image = torch.arange(2 * 3 * 24 * 24).view(2, 3, 24, 24)
    patches = patches_of(image, 3)
    assert torch.equal(patches[1, 5], image[1, :, 8:16, 16:24].flatten())
    assert torch.equal(map_of(patches, 3, 3), image)
