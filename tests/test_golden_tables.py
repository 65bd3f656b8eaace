"""Rates, parameter groups and initial weights against the golden tables."""

from pathlib import Path

import pytest

from mpmae.engine.optim import parameter_groups
from tests.golden_tables import DENSE_INIT, FCMAE_INIT, FINETUNE_GROUPS, LR_SCHEDULE, PRETRAIN_GROUPS, check_tables

GOLDEN = Path(__file__).resolve().parent / "golden"
TABLES = (LR_SCHEDULE, FINETUNE_GROUPS, FCMAE_INIT, DENSE_INIT)


@pytest.mark.parametrize("name", TABLES)
def test_table_holds(tables, name):
    assert tables[name] == []


@pytest.fixture(scope="module")
def tables():
    return check_tables(GOLDEN)


def test_the_shared_tables_hold(shared_dir):
    tables = check_tables(shared_dir / "golden")
    assert tables == {name: [] for name in (*TABLES, PRETRAIN_GROUPS)}


def test_mistakes_are_found(monkeypatch, shared_dir):
    """The checks can fail: no warm-up, another init, groups the wrong way round."""
    monkeypatch.setattr("mpmae.engine.optim.LearningRate.__call__", lambda self, step: self.peak)
    monkeypatch.setattr("mpmae.models.init._wide", lambda model: set())
    monkeypatch.setattr("tests.golden_tables.parameter_groups", lambda *args: parameter_groups(*args)[::-1])
    found = check_tables(shared_dir / "golden")
    assert all(found[name] for name in (LR_SCHEDULE, FCMAE_INIT, PRETRAIN_GROUPS))


def test_a_rate_that_is_not_scaled_is_found(monkeypatch):
    monkeypatch.setattr("tests.golden_tables.set_lr", lambda opt, lr: [group.update(lr=lr) for group in opt.param_groups])
    assert len(check_tables(GOLDEN)[LR_SCHEDULE]) > 10
