"""The benchmark of MultiMAE's step: its ways compute what they are named for, and nothing wrong is timed."""

import copy
import sys

import pytest
import torch

from mpmae.config import validate
from mpmae.engine import World, create_engine

SPREAD = {"p20": 0.9, "median": 1.0, "p80": 1.1, "repeats": 3}


def small(device="cpu"):
    import multimae_step
    from synthetic import synthetic_batch

    model = multimae_step.made(multimae_step.TINY, torch.device(device))
    del model.encoder[2:]
    batch = synthetic_batch(model, 2, torch.device(device))
    return model, batch, model.draw(0, 0, batch.sample_ids)


def engine_weights(model, batch, tokens, lr, precision, compiles):
    """What two steps of the engine leave of a model."""
    from multimae_cases import WEIGHT_DECAY

    tree = {
        "model": {"name": "multimae_tiny"},
        "train": {"precision": precision, "global_batch_size": 2},
        "optim": {"weight_decay": WEIGHT_DECAY},
        "engine": {"compile": compiles},
    }
    world = World(0, 0, 1, 1, torch.device("cpu"), "gloo")
    engine = create_engine(validate(tree, "a test"), copy.deepcopy(model), world, None, 1, 2)
    for _ in range(2):
        engine.backward(engine.forward(batch, tokens).loss)
        engine.step(lr)
    weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.close()
    return weights


@pytest.mark.parametrize(
    ("name", "compiles"),
    [("fp32", False), ("bf16", False), pytest.param("bf16, compiled", True, marks=pytest.mark.slow)],
)
def test_ours_is_what_the_engine_does(name, compiles):
    from multimae_cases import all_ways

    model, batch, tokens = small()
    want = engine_weights(model, batch, tokens, 1e-3, name[:4], compiles)
    before = copy.deepcopy(model.state_dict())
    (way,) = (way for way in all_ways(model, batch, tokens, lr=1e-3, tiny=not compiles) if way.name == name)
    for _ in range(2):
        way.run()
    got = model.state_dict()
    assert {key: torch.equal(got[key], value) for key, value in want.items()} == dict.fromkeys(want, True)
    assert not torch.equal(got["global_tokens"], before["global_tokens"])


def test_the_published_way_has_our_loss_and_gradients():
    from multimae_cases import all_ways

    model, batch, tokens = small()
    plain, published, *_ = all_ways(model, batch, tokens, tiny=True)
    gradients = []
    for way in (plain, published):
        loss = way.forward()
        way.backward(loss)
        gradients.append([p.grad for p in (*way.model.encoder.parameters(), *way.model.input_adapters.parameters())])
        way.model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert type(published.model.decoders).__name__ == "PublishedDecoders"


def run_main(monkeypatch, *arguments):
    import multimae_step

    monkeypatch.setattr(sys, "argv", ["multimae_step.py", "--tiny", "--rounds", "1", *arguments])
    return multimae_step.main()


def test_a_smoke_test_times_all_ways(monkeypatch, capsys):
    assert run_main(monkeypatch) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{name}  " in printed for name in ("fp32", "published code", "bf16", "bf16, decoders one by one"))
    assert "RED" not in printed


def test_nothing_is_timed_when_the_losses_differ(monkeypatch):
    import multimae_cases

    right = multimae_cases.explicit_attention
    monkeypatch.setattr(multimae_cases, "explicit_attention", lambda *inputs: right(*inputs) * 1.01)
    with pytest.raises(SystemExit, match=r"nothing is timed, published code: loss .*, ours in float32 is"):
        run_main(monkeypatch)


def test_a_red_way_is_named_and_the_others_timed(monkeypatch, capsys):
    import multimae_step

    monkeypatch.setattr(multimae_step, "LOSS_TOLERANCE", {"fp32": 1e-5, "bf16": 0.0})
    assert run_main(monkeypatch) == 1
    assert "RED bf16: loss" in capsys.readouterr().out


def made_up():
    ms = dict.fromkeys(("forward", "backward", "optimizer", "step", "embedding", "encoder", "decoders"), SPREAD)
    way = {"images_per_s": SPREAD, "ms": ms, "speedup": SPREAD, "cpu_speedup": SPREAD}
    precisions = {"fp32": "fp32", "published code": "fp32", "bf16, compiled": "bf16"}
    ways = {name: way | {"precision": precision} for name, precision in precisions.items()}
    ways["bf16, compiled"]["speedup"] = SPREAD | {"median": 2.25}
    results = {
        "ways": ways,
        "failed": {"bf16": "loss 1"},
        "product_flops_per_s": {"fp32": SPREAD | {"median": 100.0}, "bf16": SPREAD | {"median": 200.0}},
        "flops_per_image": {"embedding": 1, "encoder": 90, "decoders": 8, "heads": 1},
        "goal": {"way": "bf16, compiled", "least": 2.0},
    }
    environment = {"gpu": None, "cores": 2, "python": "3.12", "packages": {"torch": "2.11.0"}}
    case = {"model": "multimae_base", "img_size": 56, "patch_size": 8, "batch_size": 4, "rounds": 3, "threads": 1}
    head = {"date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "environment": environment}
    return {"what": "multimae step", **head, "case": case, "results": results}


def test_the_page():
    import results_multimae

    page = results_multimae.section(made_up())
    assert "| bf16, compiled | 0.90 / **1.00** / 1.10 | 1 | 1 | 1 | 50 % | 0.90 / **2.25** / 1.10 |" in page
    assert "Goal, bf16, compiled: 2.25 x of at least 2 x, reached." in page
    assert "| way | embedding, 1.0 % | encoder, 90.0 % | decoders, 8.0 % |" in page
    assert "By the process's own time, without what else ran on the machine: fp32 1.00 x, bf16, compiled 1.00 x." in page
    assert "- bf16: loss 1" in page
