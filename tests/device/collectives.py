"""In the place of NCCL, which a torch without CUDA lacks: gloo, by way of the host, with NCCL's conditions."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

_plain = {name: getattr(distributed, name) for name in ("init_process_group", "all_reduce", "broadcast")}


def pretended_nccl() -> Any:
    """Return a context in which the devices' tensors are exchanged."""
    own = {"init_process_group": _init, "all_reduce": _by_host("all_reduce"), "broadcast": _by_host("broadcast")}
    return mock.patch.multiple(distributed, **own)


def _init(backend: str, **options: Any) -> None:
    assert backend == "cpu:gloo,cuda:nccl"
    _plain["init_process_group"]("gloo", **options)


def _by_host(name: str) -> Any:
    def exchange(tensor: Tensor, **options: Any) -> None:
        if not tensor.is_cuda:
            _plain[name](tensor, **options)
            return
        # NCCL takes what lies contiguously on the process's own device.
        assert tensor.device.index == torch.cuda.current_device()
        assert tensor.is_contiguous()
        host = tensor.cpu()
        _plain[name](host, **options)
        tensor.copy_(host)

    return exchange
