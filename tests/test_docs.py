"""What the documentation shows is what the code does."""

import runpy


def test_the_figure_of_the_orders_is_drawn_from_them(repo):
    figure = runpy.run_path(str(repo / "docs" / "order_figure.py"))["figure"]
    assert (repo / "docs" / "order.svg").read_text() == figure(), "run `python docs/order_figure.py`"
