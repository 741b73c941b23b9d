"""A GPU for machines without one: tensors that say they are on it, compute on the CPU, and cannot
be mixed with those of the CPU.

It finds what a CPU cannot: a tensor made on the wrong device, or read without being fetched. It
says nothing of speed, of a GPU's rounding, or of what its kernels cannot do. Operators that change
a tensor's shape in place are beyond it, and so is ``"cuda:0"``. torch's own ``FakeTensorMode``
refuses mixed devices, too, but has no values, on which matching, sampling and NMS depend.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, META = torch.device("cuda", 0), torch.device("meta")


class OnGPU(Tensor):
    """``held``, a tensor on the CPU, pretending. To torch's own code it is on ``meta``, which needs
    no driver.
    """

    held: Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def as_subclass(self, kind: type[Tensor]) -> Tensor:
        return on_gpu(self.held, own_type(kind))

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a tensor on the GPU cannot be an array; fetch it with .cpu()")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None) -> Any:
        return dispatch(operator, args, kwargs or {})


@cache
def own_type(kind: type[Tensor]) -> type[OnGPU]:
    """For ``Tensor`` itself ``OnGPU``, for a class such as torchvision's ``Mask`` one that is both."""
    body = {"__torch_dispatch__": OnGPU.__dict__["__torch_dispatch__"]}
    return OnGPU if issubclass(OnGPU, kind) else type(kind.__name__, (kind, OnGPU), body)


def on_gpu(held: Tensor, kind: type[OnGPU] = OnGPU) -> OnGPU:
    layout = {
        "strides": held.stride(),
        "storage_offset": held.storage_offset(),
        "dtype": held.dtype,
        "device": META,
    }
    made = Tensor._make_wrapper_subclass(kind, held.shape, **layout)
    made.held = held
    return made


def dispatch(operator, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operator's result by the CPU. As a GPU, it takes from the CPU only numbers (tensors
    without a dimension) and indices.
    """
    name = operator._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    wanted = kwargs.get("device")  # of an operator that moves a tensor, or makes one like it
    if name == "aten::copy_":
        there = isinstance(args[0], OnGPU)
    elif wanted is not None:
        there = wanted == META
    else:
        there = any(isinstance(tensor, OnGPU) for tensor in tensors)
    if there and wanted is None and name not in ("aten::_to_copy", "aten::copy_"):
        indexes = name.startswith(("aten::index", "aten::_index_put"))
        for tensor in tree_leaves((args[0], args[2:]) if indexes else tensors):
            if isinstance(tensor, Tensor) and not isinstance(tensor, OnGPU) and tensor.dim():
                raise RuntimeError(
                    f"{name} with tensors on the GPU and one on the CPU, of shape {tuple(tensor.shape)}"
                )
    on_cpu = {} if wanted is None else {"device": torch.device("cpu")}
    result = operator(*tree_map(_held, args), **tree_map(_held, kwargs | on_cpu))
    if not there:
        return result
    given = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnGPU)}

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return (
            given[id(leaf)] if id(leaf) in given else on_gpu(leaf)
        )  # given: of operators that work in place

    return tree_map(placed, result)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, OnGPU) else leaf


class Operators(TorchDispatchMode):
    """Also those without a tensor of the GPU: they may make one."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None) -> Any:
        if torch.is_inference_mode_enabled():  # in which operators made of others arrive whole
            with self:
                result = operator.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return dispatch(operator, args, kwargs or {})


class Names(TorchFunctionMode):
    """``cuda`` is ``meta`` to torch's functions."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.device:
            args, kwargs = tree_map(_renamed, (args, kwargs))
        if function in (torch.as_tensor, torch.tensor) and kwargs.get("device") == META:
            return function(*args, **kwargs | {"device": "cpu"}).to(META)
        return function(*args, **kwargs)


def _renamed(leaf: Any) -> Any:
    named = (isinstance(leaf, torch.device) and leaf.type == "cuda") or (
        isinstance(leaf, str) and leaf == "cuda"
    )
    return META if named else leaf


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within it, ``cuda`` is a device that tensors and modules can be moved to."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with Names(), Operators():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
