"""The library's products of fp32 matrices, as an emitted file asks PyTorch for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LibraryProducts:
    """``device``: "cpu" or "cuda", which is PyTorch's name of AMD's GPUs, too.
    ``precision``: "ieee", "bf16" or "tf32": a value of ``fp32_precision``.
    ``by_onednn``: exact products are oneDNN's, on a CPU."""

    device: str
    precision: str
    by_onednn: bool = False

    @property
    def setting(self) -> str:
        """Where PyTorch keeps ``fp32_precision``."""
        return f"torch.backends.{'mkldnn' if self.device == 'cpu' else 'cuda'}.matmul"


def library_products(device: str, precision: str, library: str = "blas") -> LibraryProducts:
    """What a plan's ``precision`` and ``library`` mean to PyTorch on a device.

    On a GPU, tf32 holds what 16-bit operands hold.
    """
    fast = {"cpu": {"bf16": "bf16"}, "cuda": dict.fromkeys(("bf16", "fp16", "tf32"), "tf32")}[
        device
    ]
    return LibraryProducts(device, fast.get(precision, "ieee"), library == "onednn")


__all__ = ["LibraryProducts", "library_products"]
