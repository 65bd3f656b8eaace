"""The model's operators under FSDP2: sharded over two ranks, loss and gradients are those of one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mpmae
from mpmae.engine.wrap import blocks_of
from mpmae.models.multimae.sampler import TokenSample
from tests.engine.spawn import run_ranks
from tests.models.small_batch import TARGETS, small_batch

SIZE = 24


def build(system):
    torch.manual_seed(0)
    options = {"img_size": SIZE, "decoder_dim": 16, "decoder_depth": 1}
    if system == "mpmae":
        return mpmae.create_model("mpmae_atto", modalities_out=TARGETS, **options)
    domains = {"domains_in": ("rgb", "semseg"), "domains_out": ("rgb", "semseg"), "decoder_num_heads": 2}
    model = mpmae.create_model("multimae_tiny", **domains, **options)
    del model.encoder[2:]
    return model


def step(model, system):
    """Loss of a forward and backward pass over a fixed batch."""
    visible = torch.tensor([[0, 3, 4], [2, 5, 8]])
    out = model(small_batch(SIZE), visible if system == "mpmae" else TokenSample(visible * 2, None))
    out.loss.backward()
    return out.loss.item()


def gradients(model):
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)().numpy() for name, p in model.named_parameters()}


def on_a_rank(system):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build(system)
    for _, block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = step(model, system)
    sharded = sum(hasattr(p, "full_tensor") for p in model.parameters())
    result = loss, gradients(model), sharded
    dist.barrier()
    dist.destroy_process_group()
    return result


@pytest.mark.parametrize("system", ["mpmae", "multimae"])
def test_sharded_over_two_ranks(tmp_path, system):
    model = build(system)
    loss, wanted = step(model, system), gradients(model)
    for rank_loss, grads, sharded in run_ranks(on_a_rank, 2, system, tmp_path):
        assert sharded == len(wanted)
        assert abs(rank_loss - loss) < 1e-5 * abs(loss)
        for name, want in wanted.items():
            torch.testing.assert_close(torch.tensor(grads[name]), torch.tensor(want), rtol=1e-4, atol=1e-6)
