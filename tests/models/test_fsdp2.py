"""The model's operators under FSDP2: sharded over two ranks, loss and gradients are those of one process."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mpmae
from tests.engine.spawn import run_ranks
from tests.models.small_batch import TARGETS, small_batch

SIZE = 24


def build():
    torch.manual_seed(0)
    options = {"img_size": SIZE, "decoder_dim": 16, "decoder_depth": 1, "modalities_out": TARGETS}
    return mpmae.create_model("mpmae_atto", **options)


def step(model):
    """Loss of a forward and backward pass over a fixed batch."""
    out = model(small_batch(SIZE), torch.tensor([[0, 3, 4], [2, 5, 8]]))
    out.loss.backward()
    return out.loss.item()


def gradients(model):
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)().numpy() for name, p in model.named_parameters()}


def on_a_rank(_):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = build()
    for stage in model.encoder.stages:
        for block in stage:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = step(model)
    sharded = sum(hasattr(p, "full_tensor") for p in model.parameters())
    result = loss, gradients(model), sharded
    dist.barrier()
    dist.destroy_process_group()
    return result


def test_sharded_over_two_ranks(tmp_path):
    model = build()
    loss, wanted = step(model), gradients(model)
    for rank_loss, grads, sharded in run_ranks(on_a_rank, 2, None, tmp_path):
        assert sharded == len(wanted)
        assert abs(rank_loss - loss) < 1e-5 * abs(loss)
        for name, want in wanted.items():
            torch.testing.assert_close(torch.tensor(grads[name]), torch.tensor(want), rtol=1e-4, atol=1e-6)
