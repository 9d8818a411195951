"""Trying out a layer on a few rows of input, without leaving a trace on it.

Some facts cannot be read off a layer: whether a quantized kernel has a backward, and whether a
class of somebody's own does with its weight what a linear layer does.
"""

import contextlib
import copy
import inspect

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hf_lora.compat.accelerate import execution_device, is_on_meta, present
from hf_lora.compat.bitsandbytes import own_state
from hf_lora.layers.fusing import multiplies
from hf_lora.layers.hosts import features, has_float_weight
from hf_lora.layers.kind import Patched, parameter_of
from hf_lora.layers.patched import host_view

_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative error of a product of a few hundred terms; everything else is held to 1e-3."""


def host_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has, or had before it was patched."""
    kind = module.lora_host if isinstance(module, Patched) else type(module)
    # FSDP2 swaps the class of what it shards for (FSDPModule, the class)
    return kind.__mro__[2] if kind.__module__.startswith("torch.distributed.fsdp") else kind


def is_plain(module: nn.Module) -> bool:
    """Say whether a layer needs no trial: an unchanged forward with an ordinary weight."""
    return multiplies(host_class(module)) and has_float_weight(module)


def is_packed(module: nn.Module) -> bool:
    """Say whether a layer keeps its weight in something else than floating-point numbers."""
    weight = parameter_of(module, "weight")
    held = weight is not None and not is_lazy(weight)
    return held and not has_float_weight(module) and features(module) is not None


def probe_key(module: nn.Module) -> tuple:
    """Return what layers have in common that behave alike in a trial."""
    weight = parameter_of(module, "weight")
    details = getattr(weight, "__tensor_flatten__", tuple)()  # what a quantized tensor is made with
    host = host_class(module)
    # a forward of somebody's own may do this or that for its sizes
    sizes = None if multiplies(host) else features(module)
    return host, sizes, type(weight), getattr(weight, "dtype", None), str(details)


def gradient_fault(module: nn.Module, *, certain: bool = False) -> str | None:
    """Run the host on a row of ones and say why no gradient would reach its input, or None.

    Some quantized layers are made for inference only: below such a layer nothing would train.

    Args:
        module: The layer, patched or not.
        certain: Give the benefit of the doubt to a layer that cannot be run on a row of ones, as an
            ordinary weight behind a call that needs more arguments has it in any case.
    """
    # its random state: a question must not move the user's
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        fault = ""
        for training in (True, False):  # in training, normalizations want more rows than one
            try:
                return _run_fault(module, training=training)
            except Exception as error:  # whatever a stranger's forward raises
                first = (str(error).splitlines() or [""])[0]
                fault = fault or f"a trial run fails with {type(error).__name__}: {first}"
    doubt = certain or (has_float_weight(module) and _wants_more(module))
    return None if doubt else fault


def _run_fault(module: nn.Module, *, training: bool) -> str | None:
    sizes = features(module)
    assert sizes is not None
    x = _as_input(module, torch.ones(1, sizes[0])).requires_grad_()
    view = _stand_in(module, training=training)
    for name, part in view._modules.items():
        if part is not None and not training and part is not module._modules[name]:
            part.eval()
    y = view(x)
    return _output_fault(y, sizes[1]) or _backward_fault(x, y)


def _wants_more(module: nn.Module) -> bool:
    """Say whether the host's forward cannot be called with its input alone."""
    parameters = list(inspect.signature(host_class(module).forward).parameters.values())
    given = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in given for p in parameters[2:])


def _output_fault(y: object, out_features: int) -> str | None:
    if not isinstance(y, torch.Tensor):
        return f"its forward returns a {type(y).__name__}, not a tensor"
    if y.shape != (1, out_features):
        return f"its forward makes {tuple(y.shape)} of one row, not {(1, out_features)}"
    return None


def _backward_fault(x: torch.Tensor, y: torch.Tensor) -> str | None:
    if y.requires_grad:
        (gradient,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
        if gradient is not None:
            return None
    return "its backward gives no gradient to its input, so nothing below it would train"


def is_linear_in_its_weight(module: nn.Module) -> bool:
    """Say whether the host computes ``x Wᵀ + b``, so that an update may be put into ``W``.

    Known of PyTorch's linear layer and of Conv1D; a forward of somebody's own is tried.
    """
    if multiplies(host_class(module)):
        return True
    weight = module._parameters["weight"]
    sizes = features(module)
    assert weight is not None
    assert sizes is not None
    turned = getattr(module, "fan_in_fan_out", False)
    if tuple(weight.shape) != (sizes if turned else sizes[::-1]):
        return False
    # its own generator: a question must not move the user's random state
    noise = torch.randn(3, sizes[0], generator=torch.Generator().manual_seed(0))
    x = _as_input(module, noise)
    try:
        with torch.no_grad(), present(module):
            host, weight = _stand_in(module, training=False), module._parameters["weight"]
            assert weight is not None
            y = host(x) - host(torch.zeros_like(x))
            expected = x.double() @ (weight.double() if turned else weight.double().t())
            allowed = _TOLERANCE.get(weight.dtype, 1e-3) * expected.norm()
            return bool((y.double() - expected).norm() <= allowed)
    except Exception:  # whatever a stranger's forward raises, or returns
        return False


def _as_input(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    # without data, shapes alone can be tried
    device = torch.device("meta") if is_on_meta(module) else execution_device(module)
    return rows.to(device, _input_dtype(module))


def _stand_in(module: nn.Module, *, training: bool) -> nn.Module:
    """Return an object that computes what the host does, and whose changes of itself are lost."""
    view = host_view(module)
    view.training = training
    view._forward_hooks.clear()  # the user's, and not meant for this
    for name, tensor in view._parameters.items():
        if tensor is not None and tensor.dim() == 1 and type(tensor) is nn.Parameter:
            view._parameters[name] = nn.Parameter(tensor.detach().clone(), tensor.requires_grad)
    for name, child in view._modules.items():
        # where a part cannot be copied, the original has to do
        with contextlib.suppress(RuntimeError):
            view._modules[name] = copy.deepcopy(child)
    own_state(view)
    return view


def _input_dtype(module: nn.Module) -> torch.dtype:
    """Return a type that the module takes: its compute type, its bias's, or its weight's."""
    declared = getattr(module, "compute_dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    for tensor in (parameter_of(module, "bias"), *module._parameters.values()):
        if tensor is not None and tensor.is_floating_point() and tensor.dtype.itemsize > 1:
            return tensor.dtype
    return torch.float32
