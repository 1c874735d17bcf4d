"""``torch.compile`` for the dense layers of a model while it trains, and without it where it fails.

Only what is all arithmetic is compiled: residual blocks, and the networks over dense features and
statistics. Look-ups and updates of tables are not (pytorch/pytorch#150656). Modules stay what they
are, with their names; what evaluates, saves or serves the model never sees compiled code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recclr.parts import DensePart, StatisticsPart
from recclr.settings import TrainSettings
from recclr.towers import ResidualBlock, TwoTower
from recclr.watching import OnEvent

Backend = str | Callable[..., object]
Forward = Callable[[Tensor], Tensor]


def compile_layers(
    model: TwoTower,
    train: TrainSettings,
    *,
    bfloat16: bool,
    emit: OnEvent,
    backend: Backend = "inductor",
) -> Callable[[], None]:
    """Compile the dense layers, forward and backward, and try them once; if one fails, none is.

    Args:
        model: on the training device. bfloat16: whether towers run in it.
        emit: told of a failure, once: {"kind": "compile", "compiled": False, "reason"}.
        backend: of ``torch.compile``.

    Returns:
        what makes the model plain again.
    """
    device = model.log_temperature.device
    wanted = device.type == "cuda" if train.compile == "auto" else train.compile
    together = _Together(emit)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            for module in _dense_layers(model) if wanted else []:
                layer = _Layer(module, backend, together)
                together.layers.append(layer)
                layer.try_once(train.batch_size, device)
    except Exception as error:  # Compilers fail in their own ways.
        together.give_up(error)
    return together.restore


class _Together:
    """Layers that run compiled until one of them fails."""

    def __init__(self, emit: OnEvent) -> None:
        self.emit, self.layers = emit, list[_Layer]()

    def give_up(self, error: Exception) -> None:
        self.restore()
        self.emit({"kind": "compile", "compiled": False, "reason": _first_line(error)})

    def restore(self) -> None:
        for each in self.layers:
            each.module._compiled_call_impl = None
        self.layers = []


class _Layer:
    """What a module is called through while it trains."""

    def __init__(self, module: nn.Module, backend: Backend, together: _Together) -> None:
        self.module, self.together = module, together
        self.plain: Forward = module._call_impl
        # Batches and candidates differ in number: one program for all.
        self.compiled: Forward = torch.compile(_own(self.plain), backend=backend, dynamic=True)
        # Where ``nn.Module.compile`` puts it as well, which leaves the module and its names alone.
        module._compiled_call_impl = self

    def try_once(self, num_rows: int, device: torch.device) -> None:
        """Compile both directions: the backward one would else fail where nobody expects it."""
        inputs = torch.zeros(num_rows, _width(self.module), device=device)
        # Blocks are asked for the gradient of their input, networks over features are not.
        inputs.requires_grad_(isinstance(self.module, ResidualBlock))
        leaves = [*self.module.parameters(), *([inputs] if inputs.requires_grad else [])]
        torch.autograd.grad(self.compiled(inputs).sum(), leaves)

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            try:
                return self.compiled(x)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.together.give_up(error)
        return self.plain(x)


def _own(forward: Forward) -> Forward:
    """The same as a function that can be compiled.

    Frames of PyTorch's own, such as that of ``nn.Sequential``, are passed over by the compiler; and
    it gives up on a code object of which it has compiled eight, so each layer gets its own.
    """

    def call(x: Tensor) -> Tensor:
        return forward(x)

    call.__code__ = call.__code__.replace()
    return call


def _dense_layers(model: TwoTower) -> list[nn.Module]:
    """Each once; user and item tower may share some."""
    found = dict[nn.Module, None]()
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            found[module] = None
        if isinstance(module, (DensePart, StatisticsPart)):
            found[module.network] = None
    return list(found)


def _width(layer: nn.Module) -> int:
    """Of the rows that a layer takes."""
    if isinstance(layer, ResidualBlock):
        return layer.rise.in_features
    return next(each.in_features for each in layer.modules() if isinstance(each, nn.Linear))


def _first_line(error: Exception) -> str:
    # The compiler wraps what a backend raises, after a line that names the backend.
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0] if lines else ''}"[:300]
