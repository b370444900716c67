"""Whether a device has float8: NVIDIA's Ada and newer."""

from __future__ import annotations

from shared.errors import ConfigError

CAPABILITY = (8, 9)


def check_float8(flag: str, device: str) -> None:
    """Refuse float8 where it cannot be had.

    Args:
        flag: that asked for it, with its value.
        device: `cpu`, `cuda` or `cuda:1`.

    Raises:
        ConfigError: as said.
    """
    capability = None
    if device.startswith("cuda"):
        import torch

        capability = torch.cuda.get_device_capability(device)
    if capability is None or capability < CAPABILITY:
        has = f"capability {capability[0]}.{capability[1]}" if capability else f"no GPU ({device})"
        raise ConfigError(f"{flag}: needs a GPU of capability 8.9 or newer, here is {has}; give int8")
