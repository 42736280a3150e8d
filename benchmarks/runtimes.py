"""Other ways to run a projector on a CPU: torch.compile, onnxruntime and OpenVINO."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measure import relative_error

Run = Callable[[Tensor], Tensor]

# Allowed relative difference: fp32 sums of a few thousand terms in another order, several in turn.
AGREES = 1e-4


def runtime_calls(modules: Mapping[str, nn.Module], x: Tensor) -> tuple[dict[str, Run], list[str]]:
    """Return a callable for each runtime and module, by name, and why some are left out.

    Args:
        modules: Modules by name, in eval mode.
        x: Their input. A runtime's result for it must agree with the module's.
    """
    calls: dict[str, Run] = {}
    missing = []
    for runtime, (packages, build) in _RUNTIMES.items():
        absent = [package for package in packages if find_spec(package) is None]
        if absent:
            missing.append(f"{runtime}: {' and '.join(absent)} not installed")
            continue
        for name, module in modules.items():
            label = f"{name}, {runtime}"
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of exporters, about their own code
                    call = build(module, x)
                    difference = relative_error(call(x), module(x))
            except Exception as error:  # each runtime raises its own errors
                reason = str(error).strip().partition("\n")[0]
                missing.append(f"{label}: {type(error).__name__}: {reason}")
                continue
            if difference > AGREES:
                missing.append(f"{label}: its result differs by {difference:.1e}")
            else:
                calls[label] = call
    return calls, missing


def _compiled(module: nn.Module, x: Tensor) -> Run:
    return torch.compile(module)


def _onnxruntime(module: nn.Module, x: Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.onnx"))
        program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
        assert program is not None
        program.save(path, external_data=True)  # required above 2 GB
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _openvino(module: nn.Module, x: Tensor) -> Run:
    import openvino

    model = openvino.convert_model(torch.export.export(module, (x,)))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # its default is bf16 on some processors
    }
    compiled = openvino.compile_model(model, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


_RUNTIMES: dict[str, tuple[tuple[str, ...], Callable[[nn.Module, Tensor], Run]]] = {
    "torch.compile": ((), _compiled),
    "onnxruntime": (("onnxruntime", "onnxscript"), _onnxruntime),
    "OpenVINO": (("openvino",), _openvino),
}
