"""What a step gives gradients to, as its graphs show it: so that an error can take them back.

Parameters of the encoders' modules are known beforehand.  Others, that a function or a loss reaches
in ways of its own, are met in the graphs, right before a backward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import Tensor

from cl_compiler.step.modules import leaves_of

__all__ = ["Ledger"]


class Ledger:
    """Tensors that may get gradients, and which of them had one before.

    ``aside``: while it is kept, they are without those.
    """

    def __init__(self, *, aside: bool = False) -> None:
        self._had: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._aside = aside

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [tensor for tensor, _ in self._had.values()]

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Enter tensors that have got nothing yet."""
        for tensor in tensors:
            if id(tensor) not in self._had:
                self._had[id(tensor)] = tensor, tensor.grad
                tensor.grad = None if self._aside else tensor.grad

    def meet(self, roots: Iterable[Tensor], but: Collection[Tensor] = ()) -> None:
        """Enter the leaves of graphs that are about to be walked.

        ``but``: leaves whose gradients are the step's own business.
        """
        own = {id(tensor) for tensor in but}
        self.know(leaf for leaf in leaves_of(roots) if id(leaf) not in own)

    @property
    def had_gradients(self) -> bool:
        """Whether a tensor had a gradient before, to which a part may have been added."""
        return any(gradient is not None for _, gradient in self._had.values())

    def clear(self) -> None:
        """Take away the gradients of tensors that had none."""
        for tensor, gradient in self._had.values():
            if gradient is None:
                tensor.grad = None

    def restore(self) -> None:
        """Give every tensor the gradient object that it had."""
        for tensor, gradient in self._had.values():
            tensor.grad = gradient
