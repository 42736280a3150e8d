"""CUDA graphs: the launches of a module, recorded once and replayed."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from visproj.checks import check_module
from visproj.errors import InputError
from visproj.ops.checks import check_device, check_floating

_WARM_UP = 3  # calls that compile and tune kernels and load libraries, which a capture must not do


def graphed(module: nn.Module, example: Tensor, **options: Any) -> Graphed:
    """Record ``module(example, **options)`` as a CUDA graph.

    A folded Perceiver on the grid that it was folded for runs five kernels, which take a few
    microseconds each for a single image. Launched from Python one by one, they wait for the host.
    As a graph they do not.

    Args:
        module: Any projector, folded or not, on a CUDA device. It must not be changed or moved
            while the graph is in use.
        example: Features of the shape, dtype and device that every call will have.
        options: Keyword arguments of ``module``, such as ``grid``. The graph reads tensors among
            them from their current memory in every call.

    Returns:
        A function that takes features and returns the output of ``module``, without gradients. The
        next call overwrites the output: clone it to keep it.

    Raises:
        TypeError: If ``module`` is not a module or ``example`` not a floating-point tensor.
        ValueError: If ``example`` is not on a CUDA device, or a weight not on the same one; and,
            from the function, if features differ from ``example`` in shape, dtype or device.
        RuntimeError: Under an autocast that caches casts, which the graph would read after
            autocast has freed them: pass ``cache_enabled=False`` to it.
    """
    check_module("graphed", module)
    check_floating("example", example)
    if example.device.type != "cuda":
        raise InputError(f"a CUDA graph needs a CUDA device, got an example on {example.device}")
    for name, weight in chain(module.named_parameters(), module.named_buffers()):
        check_device(name, weight, "example", example)
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise RuntimeError(
            "a graph recorded under autocast would read casts that autocast frees when it ends: "
            "use torch.autocast(..., cache_enabled=False)"
        )
    return Graphed(module, example, options)


class Graphed:
    """A recorded CUDA graph, which also keeps alive the tensors that it knows only by address."""

    def __init__(self, module: nn.Module, example: Tensor, options: dict[str, Any]) -> None:
        self.module, self.options = module, options
        with torch.cuda.device(example.device), torch.inference_mode(False), torch.no_grad():
            self.features = example.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    module(self.features, **options)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.out = module(self.features, **options)

    def __call__(self, x: Tensor) -> Any:
        """Replay the graph on ``x``, of the shape, dtype and device that it was recorded for."""
        check_floating("features", x)
        wanted = (self.features.shape, self.features.dtype, self.features.device)
        if (x.shape, x.dtype, x.device) != wanted:
            raise InputError(
                f"the graph was recorded for {list(wanted[0])} in {wanted[1]} on {wanted[2]}, "
                f"got {list(x.shape)} in {x.dtype} on {x.device}"
            )
        with torch.cuda.device(x.device), torch.no_grad():
            self.features.copy_(x)
            self.graph.replay()
        return self.out
