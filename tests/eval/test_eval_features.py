"""Features of a set: which image they belong to, what is read once, and what the baselines compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mpmae.errors import DatasetError
from mpmae.eval.baselines import BandStandardise, ImageStatistics, RandomConvolutions, baseline_source, draw_patches
from mpmae.eval.config import EncoderSection, ImageSection
from mpmae.eval.dataset import StoredBand
from mpmae.eval.encoder_input import EncoderInput
from mpmae.eval.features import Source, image_features, kept_features, set_identity
from tests.eval.memory_set import MemorySet


class FirstBands(torch.nn.Module):
    """The means of the bands, and a name that tells it apart."""

    label = "means"

    def __init__(self, name: str = "a"):
        super().__init__()
        self.name, self.num_windows = name, 0

    def forward(self, image):
        self.num_windows += len(image)
        return image.mean((2, 3))

    def fingerprint(self):
        return self.name


def windows(image):
    """The left and the right half."""
    return torch.from_numpy(np.stack([image[..., :8], image[..., 8:]]))


@pytest.mark.parametrize("num_workers", [0, 3])
def test_each_image_has_the_mean_over_its_windows(num_workers):
    labelled = MemorySet(num_per_class=20)
    found = image_features(Source(FirstBands(), windows), labelled, num_workers=num_workers)
    np.testing.assert_allclose(found.numpy(), labelled.images.mean((2, 3)), rtol=1e-5)
    some = image_features(Source(FirstBands(), windows), labelled, num_workers=num_workers, indices=[7, 3])
    assert torch.equal(some, found[[7, 3]])


def test_images_of_several_sizes_go_through_in_their_order():
    labelled = MemorySet(num_per_class=3)
    sizes = [16, 16, 8, 8, 16, 4] * 2
    labelled.image = lambda index: labelled.images[index][:, : sizes[index]]
    found = image_features(Source(FirstBands(), lambda image: torch.from_numpy(image)[None]), labelled)
    expected = [labelled.images[i][:, : sizes[i]].mean((1, 2)) for i in range(12)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_features_are_computed_once(tmp_path):
    labelled, identity = MemorySet(), set_identity(MemorySet())
    first = FirstBands()
    found = kept_features(tmp_path, Source(first, windows), labelled, identity)
    second = FirstBands()
    assert torch.equal(kept_features(tmp_path, Source(second, windows), labelled, identity), found)
    assert second.num_windows == 0
    for source in (Source(FirstBands("b"), windows), Source(FirstBands(), windows, {"size": 8})):
        kept_features(tmp_path, source, labelled, identity)
        assert source.featuriser.num_windows == 2 * len(labelled)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_torn_file_is_computed_again(tmp_path, caplog):
    labelled, identity = MemorySet(), "same"
    found = kept_features(tmp_path, Source(FirstBands(), windows), labelled, identity)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(kept_features(tmp_path, Source(FirstBands(), windows), labelled, identity), found)
    assert path.name in caplog.text


def test_another_set_has_another_identity():
    one = set_identity(MemorySet())
    assert set_identity(MemorySet()) == one
    assert len({one, set_identity(MemorySet(seed=1)), set_identity(MemorySet(kind="multilabel"))}) == 3


def test_features_that_are_not_finite_are_refused_by_name():
    labelled = MemorySet()
    labelled.images[5, 0, 0, 0] = np.inf
    with pytest.raises(DatasetError, match=r"1 of 48 .*image-5"):
        image_features(Source(FirstBands(), windows), labelled)


def test_image_statistics_by_hand():
    image = torch.tensor([[[1.0, 2.0], [3.0, torch.nan]], [[torch.nan, torch.nan], [torch.nan, torch.nan]]])
    found = ImageStatistics()(image[None]).view(2, 9)
    expected = [2.0, (2 / 3) ** 0.5, 1.0, 3.0, 1.1, 1.5, 2.0, 2.5, 2.9]
    torch.testing.assert_close(found[0], torch.tensor(expected))
    assert not found[1].any()  # a band without data


def test_random_convolutions_whiten_what_they_meet():
    torch.manual_seed(0)
    mixing = torch.randn(18, 18)
    patches = (torch.randn(4000, 18) @ mixing).view(-1, 2, 3, 3)
    model = RandomConvolutions(patches, num_filters=5)
    responses = torch.nn.functional.conv2d(patches, model.filters).flatten(1)
    torch.testing.assert_close(responses.std(0, correction=0), torch.ones(5), atol=1e-4, rtol=1e-4)
    image = torch.randn(7, 2, 9, 9)
    z = torch.nn.functional.conv2d(image, model.filters)
    expected = torch.cat([z.relu().mean((2, 3)), (-z).relu().mean((2, 3))], 1)
    torch.testing.assert_close(model(image), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(image + 3), expected, atol=1e-4, rtol=1e-4)  # patches are centred


def test_patches_come_from_the_training_images_alone_and_follow_the_seed():
    labelled = MemorySet()
    standardise, train = BandStandardise(labelled.task), labelled.splits["train"]
    first = draw_patches(labelled, standardise, train, 0)
    labelled.images[labelled.splits["test"]] = 0
    labelled.images[labelled.splits["val"]] = 0
    assert torch.equal(draw_patches(labelled, standardise, train, 0), first)
    assert not torch.equal(draw_patches(labelled, standardise, train, 1), first)


def test_baselines_have_fingerprints_of_their_own():
    labelled = MemorySet()
    section = EncoderSection(bands_in=("B2", "B3", "B4", "B8"))

    def key(name: str, seed: int) -> str:
        return baseline_source(name, labelled, labelled.splits["train"], section, ImageSection(), seed).key("set")

    names = ("random_init", "image_statistics", "random_convolutions")
    keys = {(name, seed): key(name, seed) for name in names for seed in (0, 1)}
    assert len(set(keys.values())) == 5  # image statistics have no seed
    assert key("random_init", 1) == keys["random_init", 1]


def test_what_hashes_are_made_of_is_written_as_it_always_was():
    """Features, runs and embeddings from before there were other modalities are found again."""
    band, given = StoredBand("B2", 0.49, 1.0, 2.0), EncoderInput(("B2",), 8)
    assert repr(band) == "StoredBand(name='B2', wavelength_um=0.49, mean=1.0, std=2.0)"
    assert repr(given) == "EncoderInput(bands=('B2',), patch_size=8, statistics={})"
    others = [replace(band, modality="aster"), replace(given, modalities=("aster",)), replace(given, tells_no_data=True)]
    assert len({repr(value) for value in (band, given, *others)}) == 5
