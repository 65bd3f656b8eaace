"""A small MultiMAE with what its tests share."""

import torch

import mpmae
from mpmae.models.multimae.sampler import TokenSample

SIZE, PATCHES = 24, 9


def build(dtype=torch.float64, **options):
    """Two encoder blocks, one decoder block, 9 patches of each domain; every weight other than 0."""
    torch.manual_seed(1)
    options = {"img_size": SIZE, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2} | options
    model = mpmae.create_model("multimae_tiny", **options).to(dtype)
    del model.encoder[2:]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def tokens_of(model, visible):
    """The sample of domain -> visible patches, the same in both samples."""
    names = list(model.domains_in)
    index = [names.index(name) * PATCHES + patch for name, patches in visible.items() for patch in patches]
    return TokenSample(torch.tensor([index, index]), None)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def step(model, batch, tokens):
    """Output and gradients of a forward and backward pass."""
    model.zero_grad()
    out = model(batch, tokens, return_predictions=True)
    out.loss.backward()
    return out, gradients(model)
