"""kNN against a loop, and what it does with ties."""

import math

import pytest
import torch

from mpmae.eval import knn
from mpmae.eval.knn import knn_shares


def by_loop(train, classes, images, k):
    shares = []
    for image in images.double():
        similar = [float(image @ other / image.norm() / other.norm()) for other in train.double()]
        near = sorted(range(len(train)), key=lambda i: -similar[i])[:k]
        weights = [math.exp(similar[i] / 0.07) for i in near]
        votes = sum(w * classes[i].double() for i, w in zip(near, weights, strict=True))
        shares.append(votes / sum(weights))
    return torch.stack(shares)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_shares_are_those_of_a_loop(k, several, monkeypatch):
    torch.manual_seed(0)
    train, images = torch.randn(60, 8) + 1, torch.randn(25, 8) + 1
    classes = (torch.rand(60, 3) < 0.4) if several else torch.nn.functional.one_hot(torch.arange(60) % 3)
    expected = by_loop(train, classes, images, k)
    torch.testing.assert_close(knn_shares(train, classes, images, k).double(), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(knn, "_CHUNK_BYTES", 8 * 60 * 7)  # seven images at a time
    torch.testing.assert_close(knn_shares(train, classes, images, k).double(), expected, atol=1e-5, rtol=1e-5)


def test_of_equally_near_neighbours_the_first_count():
    train = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    classes = torch.eye(4)
    shares = knn_shares(train, classes, torch.tensor([[5.0, 0.0]]), 2)
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.5, 0.0, 0.0]]))


def test_fewer_images_than_neighbours_are_all_taken():
    shares = knn_shares(torch.eye(2), torch.eye(2), torch.tensor([[1.0, 1.0]]), 20)
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.5]]))
