"""``CompiledLoss``: an ``nn.Module`` that specialises itself and calls generated code.

It knows torch and no planner.  ``specialise`` is a callable that ``api`` injects; it turns a
``CallSignature`` into a ``LoadedVariant``.  The module has no parameters and no buffers; what a
call needs afterwards lives in that call's autograd node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from cl_compiler.errors import ArgumentError, NonFiniteError, NoPositiveError, NotPlannedError
from cl_compiler.runtime.arguments import ArgumentChecker, Kind, remember
from cl_compiler.runtime.signatures import CallSignature, LoadedVariant, LossSignature

Specialise = Callable[[CallSignature], LoadedVariant]


@dataclass(frozen=True)
class _Recognised:
    """A kind of call whose arguments are passed on as they are: ``order`` says which is which."""

    variant: LoadedVariant
    order: tuple[int, ...]


class CompiledLoss(nn.Module):
    """A compiled loss: ``value = loss_fn(x, y, logit_scale=scale)``.

    x [M, D], y [N, D] (or z [2b, D]); scalars are floats or tensors of shape [] or [1].  The value
    is a scalar in fp32 (fp64 for fp64 inputs); a loss with outputs returns (value, {name: vector}).

    Raises:
        ArgumentError: wrong names, shapes, dtypes or devices.
        BudgetError: no plan fits the budget at these sizes.
        NoPositiveError: ids were given and no row has a positive.
        NonFiniteError: ``nonfinite="error"`` and something is not finite.
    """

    def __init__(
        self,
        signature: LossSignature,
        specialise: Specialise,
        *,
        planned: CallSignature | None = None,
        nonfinite: Literal["propagate", "error"] = "propagate",
        verify: Callable[[CompiledLoss, Mapping[str, Any]], None] | None = None,
        device_type: str = "cpu",
        refusal: str = "",
    ) -> None:
        super().__init__()
        self.signature = signature
        self._specialise = specialise
        self._nonfinite = nonfinite
        self._check = ArgumentChecker(signature, device_type, nonfinite=nonfinite == "error")
        self._verify = verify
        self._refusal = refusal
        self._variants: list[LoadedVariant] = []
        self._chosen: dict[CallSignature, LoadedVariant] = {}
        self._recognised: dict[Kind, _Recognised] = {}
        self._largest = planned
        self._latest: LoadedVariant | None = None
        self._latest_call: CallSignature | None = None
        """Whose variant that is: calls like it are many, and nn.Module is slow to assign to."""
        if planned is not None:
            self._variant(planned)

    def close(self) -> None:
        """Nothing: there is no process group to take down.

        So scripts that close their loss run with ``group=`` and without; it may be called after.
        """

    # -- what runs -------------------------------------------------------------------------------

    @property
    def variants(self) -> tuple[LoadedVariant, ...]:
        """Every variant that this object has loaded, oldest first."""
        return tuple(self._variants)

    @property
    def latest(self) -> LoadedVariant:
        """The variant of the latest call.

        Raises:
            NotPlannedError: nothing was called, and no ``problem=`` was given.
        """
        if self._latest is None:
            raise NotPlannedError(
                f"{self.signature.name} has no plan yet: it specialises at its first call. "
                "Call it, or compile ahead of time with compile_loss(…, problem=Problem(M, N, D))."
            )
        return self._latest

    @property
    def specialise(self) -> Specialise:
        """What turns a call's signature into code."""
        return self._specialise

    def respecialised(self, specialise: Specialise) -> CompiledLoss:
        """The same loss with other code; nothing that was loaded, or planned ahead, is kept."""
        other = self.__class__.__new__(self.__class__)
        fresh = {"_specialise": specialise, "_variants": [], "_largest": None, "_latest": None}
        other.__dict__.update({**self.__dict__, **fresh, "_chosen": {}, "_recognised": {}})
        return other

    @property
    def plan(self) -> Any:
        """The plan of the latest call (see ``cl_compiler.plan.types.Plan``)."""
        return self.latest.plan

    @property
    def source(self) -> str:
        """The text of the generated file that is running."""
        return self.latest.source

    @property
    def source_path(self) -> str | None:
        """The generated file that is running; None where it was compiled in memory."""
        return self.latest.source_path

    def explain(self) -> str:
        """Why this plan, what was rejected, where the bytes go."""
        return str(self._specialise.explain(self.latest.plan))  # type: ignore[attr-defined]

    @property
    def graph(self) -> Any:
        """The loss graph (networkx.DiGraph) of the latest call, or of all gradients before it."""
        latest = None if self._latest is None else self._latest.signature
        return self._specialise.graph(latest)  # type: ignore[attr-defined]

    def _variant(self, call: CallSignature) -> LoadedVariant:
        if self._latest is not None and self._latest_call is call:
            return self._latest
        variant = self._chosen.get(call)
        if variant is None:
            variant = self._chosen[call] = self._choose(call)
        self._latest, self._latest_call = variant, call
        return variant

    def _choose(self, call: CallSignature) -> LoadedVariant:
        """A variant that covers the call: one that is loaded, or a new one."""
        wanted = call
        if self._largest is not None:
            grown = replace(
                call,
                M=max(call.M, self._largest.M),
                N=max(call.N, self._largest.N),
                bank=max(call.bank, self._largest.bank),
            )
            if (grown.M, grown.N) == (self._largest.M, self._largest.N):
                wanted = grown
        for variant in reversed(self._variants):
            known = variant.signature
            same_class = known.size_class == wanted.size_class
            if same_class and (known.covers(wanted) or self._gives_more(known, wanted)):
                return variant
        variant = self._specialise(wanted)
        self._variants.append(variant)
        return variant

    def _gives_more(self, known: CallSignature, wanted: CallSignature) -> bool:
        """Whether a variant differs from what is wanted in gradients of scalars only.

        They cost next to nothing, unlike an operand's.
        """
        return (
            bool(wanted.needs)
            and known.needs - wanted.needs <= frozenset(self.signature.parameters)
            and wanted.needs <= known.needs
            and known.covers(replace(wanted, needs=known.needs))
        )

    # -- calling ---------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the loss; see the class."""
        if torch.compiler.is_compiling():
            return self._call_eagerly(*args, **kwargs)
        return self._call(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _call_eagerly(self, *args: Any, **kwargs: Any) -> Any:
        """Between the graphs of ``torch.compile``: emitted code is not traced."""
        return self._call(*args, **kwargs)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._refusal:
            raise ArgumentError(f"{self.signature.name}: {self._refusal}")
        kind = self._check.kind(args, kwargs)
        known = self._recognised.get(kind)
        if known is not None and self._verify is None:  # small batches feel every line here
            if known.variant is not self._latest:
                self._latest, self._latest_call = known.variant, None
            given = (*args, *kwargs.values())
            return self._run(known.variant.module, [given[i] for i in known.order])
        call = self._check(args, kwargs)
        variant = self._variant(call.signature)
        module, values = variant.module, call.values
        if self._verify is not None:
            self._run_verification({**values, "dtype": call.outer_dtype})
        if self._check.is_known(kind):
            named = {**dict(zip(self.signature.positional, args, strict=False)), **kwargs}
            if all(values[name] is named[name] for name in module.ARGUMENTS):
                order = tuple(list(named).index(name) for name in module.ARGUMENTS)
                remember(self._recognised, kind, _Recognised(variant, order))
        return self._run(module, [values[name] for name in module.ARGUMENTS])

    def _run(self, module: ModuleType, arguments: list[Any]) -> Any:
        """The value, with its outputs if there are any, of emitted code."""
        try:
            results = module.Loss.apply(*arguments)
        except getattr(module, "NoPositiveError", ()) as error:
            raise NoPositiveError(str(error)) from None
        value = results[0]
        if self._nonfinite == "error" and not torch.isfinite(value):
            raise NonFiniteError(
                f"{self.signature.name} = {value.item()}: the inputs are finite "
                "but the value is not; lower logit_scale or check the masks."
            )
        if not module.OUTPUTS:
            return value
        outputs = {n: r.detach() for n, r in zip(module.OUTPUTS, results[1:], strict=True)}
        return value, outputs

    def _run_verification(self, values: Mapping[str, Any]) -> None:
        """Once: after it succeeded the loss is trusted.  It calls this object on a sample."""
        verify, latest = self._verify, self._latest
        assert verify is not None
        self._verify = None
        try:
            verify(self, values)
        except BaseException:
            self._verify = verify
            raise
        finally:
            self._latest, self._latest_call = latest, None

    # -- state -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        latest = dict.fromkeys(("_latest", "_latest_call"))
        return {**self.__dict__, "_variants": [], "_chosen": {}, "_recognised": {}, **latest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._largest is not None:
            self._variant(self._largest)

    def extra_repr(self) -> str:
        if self._latest is None:
            return f"{self.signature.name}, not specialised yet"
        plan = self._latest.plan
        on_a_rank = "" if plan.cluster is None else f"{plan.cluster.schedule!r}, on a rank "
        return f"{self.signature.name}, {on_a_rank}{plan.schedule!r}"


__all__ = ["CallSignature", "CompiledLoss", "LoadedVariant", "LossSignature"]
