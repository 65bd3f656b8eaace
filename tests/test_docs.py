"""What the documentation shows is what the code does."""

import re
import runpy

import pytest
import yaml

from mpmae.config import load_config
from mpmae.loader import TrainOrder, WindowOrder
from mpmae.shard_files import load_manifest


def blocks(repo, language: str) -> list[str]:
    """The code blocks of docs/data.md in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (repo / "docs" / "data.md").read_text(), re.DOTALL)


def test_the_figure_of_the_orders_is_drawn_from_them(repo):
    figure = runpy.run_path(str(repo / "docs" / "order_figure.py"))["figure"]
    assert (repo / "docs" / "order.svg").read_text() == figure(), "run `python docs/order_figure.py`"


def test_the_figure_of_the_layout_is_drawn_from_it(repo):
    figure = runpy.run_path(str(repo / "docs" / "kernels_figure.py"))["figure"]
    assert (repo / "docs" / "kernels-layout.svg").read_text() == figure(), "run `python docs/kernels_figure.py`"


def test_the_configuration_of_the_page_loads(repo, tmp_path):
    (block,) = blocks(repo, "yaml")
    path = tmp_path / "run.yaml"
    path.write_text(block)
    assert load_config(path).model_dump(mode="json")["data"].items() >= yaml.safe_load(block)["data"].items()


def test_the_code_of_the_page_runs(repo, shards_dir):
    (block,) = blocks(repo, "python")
    names = {"manifest": load_manifest(shards_dir)}
    exec(block.replace("4096", "16"), names)  # the test's set is small
    assert isinstance(names["order"], TrainOrder)
    assert isinstance(names["order"].order, WindowOrder)


@pytest.mark.parametrize(
    "name", ["data.md", "downstream.md", "embeddings.md", "integrations.md", "kernels.md", "multi_node.md"]
)
def test_the_links_of_a_page_lead_somewhere(repo, name):
    page = (repo / "docs" / name).read_text()
    headings = {
        re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^## (.*)$", page, re.MULTILINE)
    }
    for link in re.findall(r"\]\(([^)]+)\)", page):
        if link.startswith("#"):
            assert link[1:] in headings, link
        else:
            assert (repo / "docs" / link).exists(), link
