"""What training engines make of a module, in one process and without the engines."""

import contextlib
import sys
from types import SimpleNamespace

import torch


def partition(module, monkeypatch):
    """What ZeRO-3 leaves of parameters, and a stand-in for the part of DeepSpeed that gathers."""
    whole = {}
    for parameter in module.parameters():
        whole[parameter] = parameter.data
        parameter.ds_id = len(whole)
        parameter.data = torch.empty(0, dtype=parameter.dtype)

    @contextlib.contextmanager
    def gathered(parameters):
        for parameter in parameters:
            parameter.data = whole[parameter]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
