"""``CompiledLoss``: an ``nn.Module`` that specialises itself and calls generated code.

It knows torch and no planner.  ``specialise`` is a callable that ``api`` injects; it turns a
``CallSignature`` into a ``LoadedVariant``.  The module has no parameters and no buffers; what a
call needs afterwards lives in that call's autograd node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_compiler.errors import ArgumentError, NonFiniteError, NoPositiveError, NotPlannedError
from cl_compiler.runtime.signatures import CallSignature, LoadedVariant, LossSignature

_DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


Specialise = Callable[[CallSignature], LoadedVariant]


@dataclass
class _Call:
    """The checked arguments of one call."""

    operands: dict[str, Tensor]
    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor]
    ids: dict[str, Tensor]
    signature: CallSignature
    outer_dtype: torch.dtype = field(default=torch.float32)


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
        refusal: str = "",
    ) -> None:
        super().__init__()
        self.signature = signature
        self._specialise = specialise
        self._nonfinite = nonfinite
        self._verify = verify
        self._verified = False
        self._refusal = refusal
        self._variants: list[LoadedVariant] = []
        self._largest = planned
        self._latest: LoadedVariant | None = None
        if planned is not None:
            self._variant(planned)

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
            if known.covers(wanted) and same_class:
                self._latest = variant
                return variant
        variant = self._specialise(wanted)
        self._variants.append(variant)
        self._latest = variant
        return variant

    # -- calling ---------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the loss; see the class."""
        if self._refusal:
            raise ArgumentError(f"{self.signature.name}: {self._refusal}")
        call = self._check(args, kwargs)
        variant = self._variant(call.signature)
        module = variant.module
        values = {**call.operands, **call.inputs, **call.parameters, **call.ids}
        if self._verify is not None and not self._verified:
            self._verified = True
            self._verify(self, {**values, "dtype": call.outer_dtype})
        with torch.autocast("cpu", enabled=False):
            try:
                results = module.Loss.apply(*(values[name] for name in module.ARGUMENTS))
            except ValueError as error:
                if "positive" in str(error):
                    raise NoPositiveError(str(error)) from None
                raise
        value = results[0].to(call.outer_dtype)
        if self._nonfinite == "error" and not torch.isfinite(value):
            raise NonFiniteError(
                f"{self.signature.name} = {value.item()}: the inputs are finite "
                "but the value is not; lower logit_scale or check the masks."
            )
        if not module.OUTPUTS:
            return value
        outputs = {n: r.detach() for n, r in zip(module.OUTPUTS, results[1:], strict=True)}
        return value, outputs

    def _check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Call:
        given = self._bind(args, kwargs)
        sig = self.signature
        operands = {n: self._operand(n, axes, given.pop(n)) for n, axes in sig.operands}
        dtype = torch.float32
        dtypes = {t.dtype for t in operands.values()}
        for found in dtypes:
            dtype = found if len(dtypes) == 1 else torch.promote_types(dtype, found)
        if dtype not in _DTYPES:
            raise ArgumentError(
                f"{sig.name}: operands of {dtype}; use {', '.join(_DTYPES.values())}."
            )
        copies = 0
        for name, tensor in operands.items():
            ready = tensor.to(dtype)
            if ready.stride(-1) != 1 or any(s < ready.shape[-1] for s in ready.stride()[:-1]):
                ready = ready.contiguous()
            if ready is not tensor:
                copies += ready.numel() * ready.element_size()
            operands[name] = ready
        lengths = self._lengths(operands)
        outer = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = {n: self._input(n, axis, given.pop(n), lengths, outer) for n, axis in sig.inputs}
        parameters = {n: self._parameter(n, given.pop(n)) for n in sig.parameters}
        ids = self._ids(given, lengths)
        positives = "ids" if ids else ("views" if sig.single_set else "diagonal")
        if sig.uses_positives:
            self._check_positives(positives, lengths)
        everything = {**operands, **inputs, **parameters}
        needs: frozenset[str] = frozenset()
        if torch.is_grad_enabled():
            needs = frozenset(
                n for n, t in everything.items() if t.requires_grad and n not in sig.stops
            )
        if self._nonfinite == "error":
            for name, tensor in everything.items():
                if not torch.isfinite(tensor).all():
                    raise NonFiniteError(f"{sig.name}: {name} has NaN or infinite elements.")
        first = "z" if sig.single_set else sig.operands[0][0]
        signature = CallSignature(
            M=lengths["rows"],
            N=lengths["cols"],
            D=operands[first].shape[-1],
            dtype=_DTYPES[dtype],
            widths=tuple((n, t.shape[-1]) for n, t in operands.items() if n not in "xyz"),
            slots=lengths.get("slots", 0),
            bank=lengths.get("bank", 0),
            positives=positives,
            needs=needs,
            contiguous_copies=copies,
        )
        return _Call(operands, inputs, parameters, ids, signature, outer)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        sig = self.signature
        positional = [n for n, _ in sig.operands if n in ("x", "y", "z")]
        if len(args) > len(positional):
            raise ArgumentError(
                f"{sig.name} takes {len(positional)} positional arguments "
                f"({', '.join(positional)}), got {len(args)}; pass the others by keyword."
            )
        given = dict(zip(positional, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise ArgumentError(f"{sig.name}: {name!r} is given twice.")
            given[name] = value
        required = [n for n, _ in sig.operands] + [n for n, _ in sig.inputs] + list(sig.parameters)
        optional = ["ids"] if sig.single_set else ["row_ids", "col_ids"]
        missing = [n for n in required if n not in given]
        unknown = [n for n in given if n not in required + optional]
        if missing or unknown:
            parts = [f"missing: {', '.join(missing)}"] if missing else []
            parts += [f"unknown: {', '.join(unknown)}"] if unknown else []
            raise ArgumentError(
                f"{sig.name}: {'; '.join(parts)}. It takes {', '.join(required)}"
                + (f" and optionally {', '.join(optional)}." if sig.uses_positives else ".")
            )
        return given

    def _operand(self, name: str, axes: tuple[str, ...], value: Any) -> Tensor:
        dims = 3 if "slots" in axes else 2
        shape = "[M, K, D]" if dims == 3 else "[length, D]"
        if not isinstance(value, Tensor) or value.dim() != dims:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
            raise ArgumentError(
                f"{self.signature.name}: {name} must be a tensor {shape}, got {got}."
            )
        if value.device.type != "cpu":
            raise ArgumentError(
                f"{self.signature.name}: {name} is on {value.device}; this package emits code for "
                "CPUs so far. Move it with .cpu()."
            )
        if 0 in value.shape:
            raise ArgumentError(
                f"{self.signature.name}: {name} is empty (shape {list(value.shape)}); a loss needs "
                "at least one row, one column and one feature. Skip empty batches."
            )
        return value

    def _lengths(self, operands: Mapping[str, Tensor]) -> dict[str, int]:
        lengths: dict[str, int] = {}
        for name, axes in self.signature.operands:
            tensor = operands[name]
            found = [(a, tensor.shape[0]) for a in axes if a != "slots"]
            found += [("slots", tensor.shape[1])] if "slots" in axes else []
            for axis, length in found:
                if lengths.setdefault(axis, length) != length:
                    raise ArgumentError(
                        f"{self.signature.name}: {name} has {length} {axis}, another operand has "
                        f"{lengths[axis]}; they must be equal."
                    )
        widths = {operands[n].shape[-1] for n in ("x", "y") if n in operands}
        if len(widths) > 1:
            raise ArgumentError(
                f"{self.signature.name}: x has D={operands['x'].shape[-1]} and y has "
                f"D={operands['y'].shape[-1]}; both live in one space, so D must be equal."
            )
        lengths.setdefault("rows", lengths.get("cols", 1))
        lengths.setdefault("cols", lengths["rows"])
        return lengths

    def _input(
        self, name: str, axis: str, value: Any, lengths: Mapping[str, int], dtype: torch.dtype
    ) -> Tensor:
        length = lengths[axis]
        if not isinstance(value, Tensor) or value.numel() != length or value.dim() > 2:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
            raise ArgumentError(
                f"{self.signature.name}: {name} must be a vector of {length} {axis}, got {got}."
            )
        return value.reshape(length).to(dtype)

    def _parameter(self, name: str, value: Any) -> Tensor:
        if isinstance(value, (int, float)):
            return torch.tensor(float(value), dtype=torch.float64)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
            raise ArgumentError(
                f"{self.signature.name}: {name} must be a number or a tensor of shape [] or [1], "
                f"got {got}."
            )
        return value.reshape(()).to("cpu", torch.float64)

    def _ids(self, given: Mapping[str, Any], lengths: Mapping[str, int]) -> dict[str, Tensor]:
        names = (
            {"ids": "rows"} if self.signature.single_set else {"row_ids": "rows", "col_ids": "cols"}
        )
        present = [n for n in names if given.get(n) is not None]
        if not present:
            return {}
        if not self.signature.uses_positives:
            raise ArgumentError(f"{self.signature.name} has no positives; it takes no ids.")
        if len(present) < len(names):
            raise ArgumentError(
                f"{self.signature.name}: give both row_ids and col_ids, or neither."
            )
        result = {}
        for name, axis in names.items():
            value = given[name]
            ok = isinstance(value, Tensor) and not value.is_floating_point()
            if not ok or value.shape != (lengths[axis],):
                raise ArgumentError(
                    f"{self.signature.name}: {name} must be integers [{lengths[axis]}]."
                )
            result[name] = value.to(torch.int64).contiguous()
        return result

    def _check_positives(self, positives: str, lengths: Mapping[str, int]) -> None:
        rows, cols = lengths["rows"], lengths["cols"]
        if positives == "diagonal" and rows > cols:
            raise ArgumentError(
                f"{self.signature.name}: {rows} rows and {cols} columns: the positive of row i is "
                "column i, so there may not be more rows. Pass row_ids and col_ids otherwise."
            )
        if positives == "views" and rows % 2:
            raise ArgumentError(
                f"{self.signature.name}: z has {rows} rows; without ids rows i and i + b of 2b are "
                "two views, so their number must be even. Pass ids= otherwise."
            )

    # -- state -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_variants": [], "_latest": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._largest is not None:
            self._variant(self._largest)

    def extra_repr(self) -> str:
        latest = "not specialised yet" if self._latest is None else repr(self._latest.plan.schedule)
        return f"{self.signature.name}, {latest}"


__all__ = ["CallSignature", "CompiledLoss", "LoadedVariant", "LossSignature"]
