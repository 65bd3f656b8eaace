"""The baseline computes what the sparse model computes; a comparison of times means something only then."""

import pytest
import torch

from mpmae.models import create_model


@pytest.mark.parametrize(("img_size", "patch_size"), [(24, 8), (48, 16)])
def test_loss_and_gradients_equal_the_sparse_models(img_size, patch_size):
    from dense_masked import DenseMasked
    from synthetic import random_visible, synthetic_batch

    torch.manual_seed(0)
    options = {"img_size": img_size, "patch_size": patch_size, "decoder_dim": 16}
    sparse, dense = (create_model("mpmae_atto", encoder=e, **options).double() for e in ("sparse", "dense"))
    for parameter in sparse.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    dense.load_state_dict(sparse.state_dict())
    batch = synthetic_batch(sparse, 2, torch.device("cpu"))
    batch.values = {name: v.double() if v.is_floating_point() else v for name, v in batch.values.items()}
    visible = random_visible(2, 9, 0.6, torch.device("cpu"))
    loss, dense_loss = sparse(batch, visible).loss, DenseMasked(dense)(batch, visible)
    torch.testing.assert_close(dense_loss, loss, rtol=1e-12, atol=0)
    loss.backward()
    dense_loss.backward()
    for (name, ours), theirs in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-8, atol=1e-11, msg=name)
