"""A module's launches recorded once as a CUDA graph, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UP = 3  # compiles and tunes kernels and loads libraries, which a capture must not


def graphed(module: nn.Module, example: Tensor, **options: Any) -> Callable[[Tensor], Any]:
    """Record ``module(example, **options)`` as a CUDA graph.

    A folded Perceiver is five kernels of a few microseconds each for a single image: launched from
    Python one by one they wait for the host, as a graph they do not.

    Args:
        module: Any projector, folded or not, on a CUDA device. It must not be changed or moved
            while the graph is in use.
        example: Features of the shape, dtype and device that every call will have.
        options: Passed on, such as ``grid``. Tensors among them are read from where they lie.

    Returns:
        A function of features that gives what ``module`` gives, without gradients. Its output is
        overwritten by the next call: clone it to keep it.

    Raises:
        ValueError: If ``example`` is not on a CUDA device; and, from the function, if features
            differ from ``example`` in shape, dtype or device.
    """
    if example.device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a CUDA device, got an example on {example.device}")
    with torch.cuda.device(example.device), torch.no_grad():
        features = example.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                module(features, **options)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(features, **options)

    def replay(x: Tensor) -> Any:
        wanted = (features.shape, features.dtype, features.device)
        if (x.shape, x.dtype, x.device) != wanted:
            raise ValueError(
                f"the graph was recorded for {list(wanted[0])} in {wanted[1]} on {wanted[2]}, "
                f"got {list(x.shape)} in {x.dtype} on {x.device}"
            )
        with torch.cuda.device(features.device), torch.no_grad():
            features.copy_(x)
            graph.replay()
        return out

    return replay
