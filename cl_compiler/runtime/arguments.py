"""What a compiled loss is called with: names, shapes and dtypes checked, tensors made ready.

A call like an earlier one (same names, shapes, strides, dtypes and gradients wanted) is recognised
and not checked again: for small batches the checks would take longer than the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from cl_compiler.errors import ArgumentError, NonFiniteError
from cl_compiler.runtime.layouts import STRIDED, begins_well, read_in_place, whole_rows
from cl_compiler.runtime.signatures import CallSignature, LossSignature

_DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_REMEMBERED = 256
"""Kinds of calls that are recognised, at most."""

Kind = tuple[Any, ...]
Value = TypeVar("Value")


def remember(known: dict[Kind, Value], kind: Kind, value: Value) -> None:
    """Add a kind of call to those that are known; when they are too many, start again."""
    if len(known) >= _REMEMBERED:
        known.clear()
    known[kind] = value


@dataclass(frozen=True)
class Call:
    """One call: its arguments by name, ready for emitted code, and what decides that code."""

    values: Mapping[str, Tensor]
    signature: CallSignature
    outer_dtype: torch.dtype


class ArgumentChecker:
    """Checks the arguments of one loss.

    ``device_type``: where they have to lie, "cpu" or "cuda"; scalars may always be on the CPU.
    ``in_host_too``: or in host memory, all of them.
    ``nonfinite``: also look at every element.  ``may_be_empty``: a shard may have no rows.
    """

    def __init__(
        self,
        signature: LossSignature,
        device_type: str = "cpu",
        *,
        nonfinite: bool = False,
        may_be_empty: bool = False,
        in_host_too: bool = False,
    ) -> None:
        self.signature, self._nonfinite = signature, nonfinite
        self._may_be_empty = may_be_empty
        self._device_type, self._in_host_too = device_type, in_host_too
        self._known: dict[Kind, tuple[CallSignature, torch.dtype]] = {}

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Check one call.

        Raises:
            ArgumentError: wrong names, shapes, dtypes or devices.
            NonFiniteError: an element is not finite, and that was asked for.
        """
        if self._nonfinite:
            return self._check(args, kwargs)
        kind = self.kind(args, kwargs)
        known = self._known.get(kind)
        if known is not None:
            return self._ready(args, kwargs, *known)
        call = self._check(args, kwargs)
        if not call.signature.contiguous_copies:  # nothing was copied or cast
            remember(self._known, kind, (call.signature, call.outer_dtype))
        return call

    def kind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Kind:
        """What of a call decides whether it is valid, and what is done with its arguments."""
        found: list[Any] = [torch.is_grad_enabled()]
        for value in args:
            found.append(_kind(value))
        for name, value in kwargs.items():
            found.append(name)
            found.append(_kind(value))
        if self._device_type != "cpu":
            found += [isinstance(v, Tensor) and begins_well(v) for v in (*args, *kwargs.values())]
        return tuple(found)

    def is_known(self, kind: Kind) -> bool:
        """Whether a call of this kind was checked, and found to need no copies."""
        return kind in self._known

    def _ready(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        signature: CallSignature,
        dtype: torch.dtype,
    ) -> Call:
        """A call that was recognised."""
        sig = self.signature
        values = dict(zip(sig.positional, args, strict=False)) | dict(kwargs)
        for name, _ in sig.inputs:
            values[name] = values[name].reshape(-1).to(dtype)
        for name in sig.parameters:
            values[name] = _scalar(values[name])
        for name in ("ids", "row_ids", "col_ids"):
            if values.get(name) is not None:
                values[name] = values[name].to(torch.int64).contiguous()
        return Call(values, signature, dtype)

    def _check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        given = self._bind(args, kwargs)
        sig = self.signature
        operands = {n: self._operand(n, axes, given.pop(n)) for n, axes in sig.operands}
        dtype = torch.float32
        dtypes = {t.dtype for t in operands.values()}
        for found in dtypes:
            dtype = found if len(dtypes) == 1 else torch.promote_types(dtype, found)
        copies = 0
        for name, tensor in operands.items():
            ready = tensor.to(dtype)
            as_it_lies = whole_rows if ready.device.type != "cpu" else read_in_place
            if not as_it_lies(ready):
                ready = ready.clone(memory_format=torch.contiguous_format)
            if ready is not tensor:
                copies += ready.numel() * ready.element_size()
            operands[name] = ready
        lengths = self._lengths(operands)
        self._one_device({**operands, **given})
        outer = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = {n: self._input(n, axis, given.pop(n), lengths, outer) for n, axis in sig.inputs}
        parameters = {n: self._parameter(n, given.pop(n)) for n in sig.parameters}
        ids = self._ids(given, lengths)
        if ids and self.signature.one_positive:
            _check_one_positive(self.signature.name, list(ids.values()))
        positives = "ids"
        if not ids:
            positives = sig.positives(lengths["rows"], lengths["cols"])
        if sig.uses_positives:
            self._check_positives(positives, lengths)
        everything = {**operands, **inputs, **parameters}
        needs: frozenset[str] = frozenset()
        if torch.is_grad_enabled():
            needs = frozenset(
                n for n, t in everything.items() if t.requires_grad and n not in sig.stops
            )
        first = "z" if sig.single_set else sig.operands[0][0]
        if self._nonfinite:
            finite = {name: torch.isfinite(t).all() for name, t in everything.items()}
            device = operands[first].device
            if not torch.stack([f.to(device) for f in finite.values()]).all():  # one wait for all
                name = next(name for name, f in finite.items() if not f)
                raise NonFiniteError(f"{sig.name}: {name} has NaN or infinite elements.")
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
        return Call({**everything, **ids}, signature, outer)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        sig = self.signature
        positional = sig.positional
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
        self._check_storage(name, value)
        if value.dtype not in _DTYPES:
            raise ArgumentError(
                f"{self.signature.name}: {name} is {value.dtype}; operands are "
                f"{', '.join(_DTYPES.values())}. Convert it, with .float() for instance."
            )
        if 0 in (value.shape[1:] if self._may_be_empty else value.shape):
            raise ArgumentError(
                f"{self.signature.name}: {name} is empty (shape {list(value.shape)}); a loss needs "
                "at least one row, one column and one feature. Skip empty batches."
            )
        return value

    def _check_storage(self, name: str, value: Tensor, *, is_scalar: bool = False) -> None:
        """Whether emitted code can read the tensor where and how it lies."""
        if value.layout != torch.strided:
            raise ArgumentError(
                f"{self.signature.name}: {name} has layout {str(value.layout).partition('.')[2]}; "
                "emitted code reads dense tensors. Convert it with .to_dense()."
            )
        if value.device.type == "meta":
            raise ArgumentError(
                f"{self.signature.name}: {name} is on the meta device and has no elements; make it "
                "on the CPU."
            )
        elsewhere = value.device.type != self._device_type
        if elsewhere and not (value.is_cpu and (is_scalar or self._in_host_too)):
            wanted = self._device_type
            raise ArgumentError(
                f"{self.signature.name}: {name} is on {value.device}, and this loss was compiled "
                f"for tensors on {wanted}. Move it with .to({wanted!r}), or compile the loss for "
                "the machine that it runs on."
            )
        if value.is_complex():
            raise ArgumentError(
                f"{self.signature.name}: {name} is complex ({value.dtype}); a loss takes real "
                "numbers. Pass its .real part."
            )

    def _one_device(self, given: Mapping[str, Any]) -> None:
        """Of everything but scalars."""
        tensors = {
            n: t.device
            for n, t in given.items()
            if isinstance(t, Tensor) and n not in self.signature.parameters
        }
        if len(set(tensors.values())) > 1:
            places = ", ".join(f"{n} on {device}" for n, device in tensors.items())
            raise ArgumentError(
                f"{self.signature.name}: {places}; a call runs on one device. Move them together."
            )

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
        self._widths(operands)
        lengths.setdefault("rows", lengths.get("cols", 1))
        lengths.setdefault("cols", lengths["rows"])
        return lengths

    def _widths(self, operands: Mapping[str, Tensor]) -> None:
        for left, right in self.signature.compared:
            widths = [operands[name].shape[-1] for name in (left, right)]
            if widths[0] != widths[1]:
                raise ArgumentError(
                    f"{self.signature.name}: {left} has D={widths[0]} and {right} has "
                    f"D={widths[1]}; both live in one space, so D must be equal."
                )
        for name, columns in self.signature.prefixes:
            if columns > operands[name].shape[-1]:
                raise ArgumentError(
                    f"{self.signature.name}: {name} has D={operands[name].shape[-1]}, and the loss "
                    f"reads its first {columns} columns. Take prefixes of at most D columns."
                )

    def _input(
        self, name: str, axis: str, value: Any, lengths: Mapping[str, int], dtype: torch.dtype
    ) -> Tensor:
        length = lengths[axis]
        if not isinstance(value, Tensor) or value.numel() != length or value.dim() > 2:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
            raise ArgumentError(
                f"{self.signature.name}: {name} must be a vector of {length} {axis}, got {got}."
            )
        self._check_storage(name, value)
        return value.reshape(length).to(dtype)

    def _parameter(self, name: str, value: Any) -> Tensor:
        number = isinstance(value, Real)  # NumPy's numbers too
        if not number and (not isinstance(value, Tensor) or value.numel() != 1):
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(type(value))
            raise ArgumentError(
                f"{self.signature.name}: {name} must be a number or a tensor of shape [] or [1], "
                f"got {got}."
            )
        if isinstance(value, Tensor):
            self._check_storage(name, value, is_scalar=True)
        return _scalar(value)

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
            if not isinstance(value, Tensor):
                got = repr(type(value))
            else:
                got = f"{str(value.dtype).partition('.')[2]} {list(value.shape)}"
            ok = isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())
            if not ok or value.shape != (lengths[axis],):
                raise ArgumentError(
                    f"{self.signature.name}: {name} must be a tensor of integers "
                    f"[{lengths[axis]}], one per row of its operand; got {got}."
                )
            self._check_storage(name, value)
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


def _kind(value: Any) -> Any:
    """What of an argument decides whether it is valid, and what is done with it."""
    if not isinstance(value, Tensor):
        return type(value)
    if value.layout is not STRIDED:  # without strides; it will be refused
        return value.layout
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad


def _scalar(value: float | Tensor) -> Tensor:
    """A parameter as a tensor; emitted code reads it in fp64."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(float(value), dtype=torch.float64)


__all__ = ["ArgumentChecker", "Call", "Kind", "remember"]


def _check_one_positive(name: str, ids: Sequence[Tensor]) -> None:
    """Of one set [2b] each id may occur twice; of two, once among the columns that rows have.

    Raises:
        ArgumentError: a row has several positives.
    """
    rows, cols = ids[0], ids[-1]
    found, counts = torch.unique(cols, return_counts=True)
    crowded = found[counts > (2 if len(ids) == 1 else 1)]
    wrong = torch.isin(rows, crowded)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ArgumentError(
            f"{name} takes one positive per row, and row {row} (id {int(rows[row])}) has several "
            "columns with its id: give each row one of them, or use a loss that takes several."
        )
