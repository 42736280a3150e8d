"""Compile every kernel where a dimension is 1, which Triton makes a constant: ``python edges.py``.

Prints one line for every kernel that does not compile. The interpreter knows no such constants.
"""

import itertools
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from benchmarks import codegen
from visproj.kernels import configs, layer_norm, linear
from visproj.kernels.cross_attention import cross_attention_fwd
from visproj.kernels.cross_attention_backward import cross_attention_bwd
from visproj.kernels.launch import Config
from visproj.kernels.linear_backward import linear_bwd_weight

ROWS = [(1, 1, 8, 8), (1, 1, 1, 1), (3, 1, 16, 16), (1, 5, 16, 1), (2, 5, 1, 16), (1, 1, 16, 24)]
ATTENTION = [(1, 1, 1, 1, 1), (1, 1, 1, 1, 8), (2, 1, 5, 1, 16), (1, 5, 1, 2, 16), (2, 5, 7, 1, 32)]


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype)


def row_kernels(B, L, K, N):
    x, weight = empty(B, L, K), empty(N, K)
    mean, sums, partials = (empty(*s, dtype=torch.float32) for s in ((B, L), (N,), (2, 1, B * L)))
    rows, statistics = x.flatten(0, 1), mean.flatten()
    norm = {"mean": mean, "rstd": mean}
    yield lambda: linear.linear_fwd(x, weight, bias=empty(N), statistics=True)
    yield lambda: linear.linear_fwd(x, weight, **norm, weight_sum=sums, table=empty(L, N))
    yield lambda: linear.linear_fwd(x, weight, table=empty(L, 1))
    yield lambda: linear.linear_fwd(x, weight, bias=empty(N), store=False, triangular=True)
    yield lambda: linear.linear_fwd(x, weight, squares=partials[0], eps=1e-5)
    yield lambda: linear_bwd_weight(empty(B, L, N), x, bias=True, **norm, gain=empty(K))
    yield lambda: linear.merge_statistics(partials, mean, mean, N, 64, 1e-5)
    yield lambda: layer_norm.layer_norm_fwd(
        rows, empty(K), None, 1e-5, out_dtype=torch.float32, in_place=True, statistics=True
    )
    yield lambda: layer_norm.layer_norm_bwd(rows, rows, statistics, statistics, empty(K))
    yield lambda: layer_norm.fold_gain(weight, empty(K), None, None)


def attention_kernels(B, Q, L, H, d):
    for shared, masked in itertools.product((True, False), (True, False)):
        q, k = empty(*(() if shared else (B,)), Q, H, d), empty(B, L, H, d)
        mask, out = empty(1, 1, Q, 128) if masked else None, empty(B, Q, H, d)
        statistics = empty(2 if masked else 1, B, H, Q, dtype=torch.float32)
        for kept in (True, False):
            yield lambda q=q, k=k, mask=mask, kept=kept: cross_attention_fwd(
                q, k, k, mask, statistics=kept
            )
        yield lambda q=q, k=k, mask=mask, out=out, statistics=statistics: cross_attention_bwd(
            out, q, k, k, mask, out, statistics, k.clone(), k.clone()
        )


def main():
    tried = 0
    for style, arch in itertools.product((False, True), (80, 90)):
        if style and arch < 90:
            continue

        def candidates(kernel, dtype, *, descriptors, style=style):
            blocks = (64, 64) if "attention" in kernel else (64, 64, 64)
            return (Config(blocks, 4, 2, style and descriptors),)

        shapes = [(row_kernels, shape) for shape in ROWS]
        shapes += [(attention_kernels, shape) for shape in ATTENTION]
        for kernels, shape in shapes:
            for launch in kernels(*shape):
                tried += 1
                try:
                    with (
                        codegen.compiling_for(GPUTarget("cuda", arch, 32)),
                        mock.patch.object(configs, "candidates", candidates),
                    ):
                        launch()
                except RuntimeError as error:
                    print(f"sm_{arch} {shape} {str(error)[:300]}")
    print(f"{tried} launches tried")


if __name__ == "__main__":
    main()
