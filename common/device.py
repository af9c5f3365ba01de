"""The device that a user names, looked at before anything long starts."""

import torch


def check_device(name: str) -> torch.device:
    """
    Args:
        name (`str`): "cpu", "cuda", "cuda:1", "mps", ...

    Raises:
        ValueError: If torch knows no such device, or the machine has none.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is none that torch knows: say cpu, cuda, cuda:1, mps or xpu.") from None
    if device.type == "cpu":
        return device
    backend = getattr(torch, device.type, None)
    count = backend.device_count() if backend is not None and backend.is_available() else 0
    if count == 0:
        raise ValueError(f"device={name!r}: torch {torch.__version__} sees no {device.type} device here. Say cpu.")
    if device.index is not None and device.index >= count:
        raise ValueError(f"device={name!r}: there are {count} {device.type} devices, counted from 0.")
    return device
