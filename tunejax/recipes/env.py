"""`tunejax env`: what a bug report needs."""

import argparse
import os
import platform
import sys
from importlib import metadata

PACKAGES = (
    "tunejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "datasets", "safetensors",
    "numpy", "pydantic", "torch", "peft",
)  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Prints versions, devices and the settings of the environment that matter."""
    print(f"{'python':<18}{sys.version.split()[0]} on {platform.platform()}, {os.cpu_count()} CPUs")
    for name in PACKAGES:
        print(f"{name:<18}{_version(name)}")
    import jax

    print(f"{'backend':<18}{jax.default_backend()}, {jax.process_count()} process(es)")
    for device in jax.devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        limit = f", {stats['bytes_limit'] / 2**30:.1f} GiB" if stats and "bytes_limit" in stats else ""
        print(f"{'device':<18}{device.id}: {device.device_kind}{limit}")
    for name in sorted(k for k in os.environ if k.startswith(("JAX_", "XLA_", "HF_HUB_OFFLINE", "TUNEJAX_"))):
        print(f"{name:<18}{os.environ[name]}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
