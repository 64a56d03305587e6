"""The library's products of fp32 matrices, as an emitted file asks PyTorch for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LibraryProducts:
    """``device``: "cpu" or "cuda", which is PyTorch's name of AMD's GPUs, too.
    ``precision``: "ieee", "bf16" or "tf32": a value of ``fp32_precision``."""

    device: str
    precision: str

    @property
    def setting(self) -> str:
        """Where PyTorch keeps ``fp32_precision``."""
        return f"torch.backends.{'mkldnn' if self.device == 'cpu' else 'cuda'}.matmul"


def library_products(device: str, precision: str) -> LibraryProducts:
    """What a plan's ``precision`` means to the library of a device.

    On a GPU, tf32 holds what 16-bit operands hold.
    """
    fast = {"cpu": {"bf16": "bf16"}, "cuda": dict.fromkeys(("bf16", "fp16", "tf32"), "tf32")}[
        device
    ]
    return LibraryProducts(device, fast.get(precision, "ieee"))


__all__ = ["LibraryProducts", "library_products"]
