"""Rounding to bfloat16 as a GPU does it, for Triton's interpreter, which cuts the bits off that do not fit."""

import pytest
import torch
from triton.runtime import interpreter


@pytest.fixture
def rounding(monkeypatch):
    """Conversions from float32 to bfloat16 round to the nearest."""
    cut = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, target):
        if source.dtype.scalar.name == "fp32" and target.scalar.name == "bf16":
            values = torch.from_numpy(source.data.copy()).bfloat16()
            return interpreter.TensorHandle(values.view(torch.uint16).numpy(), target.scalar)
        return cut(self, source, target)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)
