"""``GroupLoss``: a compiled loss whose rows and columns are spread over the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from cl_compiler.errors import ArgumentError, CompilerError, GroupError, NonFiniteError
from cl_compiler.runtime.arguments import ArgumentChecker, Call
from cl_compiler.runtime.function import CompiledLoss, Specialise
from cl_compiler.runtime.group import RankGroup
from cl_compiler.runtime.guard import (
    FAILED,
    IN_HOST,
    NOT_FINITE,
    Record,
    check_agreement,
    check_chunks,
    check_compiled,
    check_factors,
    check_place,
    digest,
    joint_positives,
    packed,
    packed_factor,
)
from cl_compiler.runtime.guarded_ring import guarded_ring
from cl_compiler.runtime.signatures import CallSignature, LossSignature


class GroupLoss(CompiledLoss):
    """As ``CompiledLoss``, called with this rank's shards by every rank of a group.

    The value is that of all ranks' rows and columns together, on every rank.  ``chunk``: rows of
    which every shard must be a multiple; 0: any shard will do.  ``asked``: what ``compile_loss``
    was asked for, by its arguments' names, which all ranks have to have alike.

    Raises, beside what ``CompiledLoss`` raises, and on every rank alike:
        ArgumentError: the ranks' arguments do not fit together; the message names ranks and values.
        GroupError: a rank is gone, late, or in another call.
    """

    def __init__(
        self,
        signature: LossSignature,
        specialise: Specialise,
        ranks: RankGroup,
        *,
        loss_text: str,
        asked: Mapping[str, str],
        planned: CallSignature | None = None,
        nonfinite: Any = "propagate",
        device_type: str = "cpu",
        chunk: int = 0,
    ) -> None:
        super().__init__(
            signature, specialise, planned=planned, nonfinite=nonfinite, device_type=device_type
        )
        self._ranks: RankGroup | None = ranks
        ranks.loss = signature.name
        self._texts = {"loss": loss_text, "request": packed(asked)}
        self._chunk = chunk
        self._group_options = (ranks.world_size, ranks.timeout_s, ranks.convention)
        self._on_gpu = device_type != "cpu"
        self._check = ArgumentChecker(
            signature,
            device_type,
            nonfinite=nonfinite == "error",
            may_be_empty=True,
            in_host_too=self._on_gpu,  # the plan says where they have to be
        )

    @property
    def ranks(self) -> RankGroup:
        """The group that the loss runs on.

        Raises:
            ArgumentError: it was lost with pickling.
        """
        if self._ranks is None:
            raise ArgumentError(
                f"{self.signature.name}: a process group cannot be pickled, and this loss was; "
                "give it one with loss_fn.with_group(group)."
            )
        return self._ranks

    def with_group(self, group: dist.ProcessGroup) -> GroupLoss:
        """The same loss on another group; every rank of it calls this.

        Raises:
            ArgumentError: the group has another number of ranks than the loss was compiled for.
        """
        size, timeout_s, convention = self._group_options
        if dist.get_world_size(group) != size:
            raise ArgumentError(
                f"{self.signature.name} was compiled for {size} ranks and the group has "
                f"{dist.get_world_size(group)}; compile it again with group=."
            )
        other = self.__deepcopy__({})
        other._ranks = RankGroup(group, timeout_s, convention)
        other._ranks.loss = self.signature.name
        return other

    def close(self) -> None:
        """Take the process group down; every rank calls it, or the processes just end.

        A loss that is closed cannot be called any more; closing it again does nothing.
        """
        if self._ranks is not None:
            self._ranks.close()

    # -- calling ---------------------------------------------------------------------------------

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        ranks = self.ranks
        ranks.check_alive()
        ranks.calls += 1
        sequence = ranks.calls
        try:
            call, records = self._meet(args, kwargs, sequence)
            variant = self._variant(self._joint(call.signature, records))
            of = variant.plan.cluster
            if self._on_gpu:
                check_place(self.signature.name, records, of.schedule, of.inputs_in_host)
            ranks.connect(self._device_of(call), of.two_groups)
            lengths = {
                "rows": tuple(r.rows for r in records),
                "cols": tuple(r.cols for r in records),
            }
            ring = guarded_ring(
                variant.module,
                ranks,
                lengths,
                lambda by: self._meet_again(records, sequence, by),
                of.two_groups,
            )
            arguments = [call.values[name] for name in variant.module.ARGUMENTS]
            return self._run(variant.module, [ring, *arguments])
        except CompilerError as error:  # on every rank alike, or told already
            ranks.raised_alike(error)
            raise
        except BaseException as error:
            ranks.fail(error)
            raise

    def _device_of(self, call: Call) -> torch.device:
        """Where products are made: where shards are, or what streams them from host memory."""
        given = call.values[self.signature.operands[0][0]].device
        if given.type != "cpu" or not self._on_gpu:
            return given
        return torch.device("cuda", torch.cuda.current_device())

    def _meet(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], sequence: int
    ) -> tuple[Call, list[Record]]:
        """This rank's arguments checked, and every rank's record.

        Raises:
            ArgumentError, NonFiniteError, GroupError: see ``check_agreement``.
        """
        call: Call | None = None
        problem: CompilerError | None = None
        details = self._texts
        try:
            call = self._check(args, kwargs)
            details = self._details(call)
            record = self._record(call, sequence, details)
        except CompilerError as error:
            problem = error
            flag = NOT_FINITE if isinstance(error, NonFiniteError) else FAILED
            loss, request = self._code
            record = Record("forward", sequence, flags=flag, loss=loss, request=request)
        records = self.ranks.meet(record)
        own = {"failed": "" if problem is None else str(problem), **details}
        check_compiled(self.signature.name, records, self._describe(sequence, own))
        try:
            self._agree(records, sequence, own)
        except (ArgumentError, NonFiniteError) as error:
            raise problem or error from None
        assert call is not None
        return call, records

    def _meet_again(self, records: Sequence[Record], sequence: int, factor: torch.Tensor) -> None:
        """Before the backward of a call, of ``factor`` times its value."""
        own = replace(records[self.ranks.rank], phase="backward", sequence=sequence)
        if factor.is_cpu:  # a device is not waited for
            own = replace(own, scalars=packed_factor(factor.item()))
        records = self.ranks.meet(own)
        check_compiled(self.signature.name, records, self._describe(sequence, {}))
        if factor.is_cpu:
            check_factors(self.signature.name, records)

    def _describe(self, sequence: int, own: Mapping[str, str]) -> Callable[[str], list[str]]:
        """Of a field of records, what it stands for on every rank; every rank asks alike."""
        return lambda field: self.ranks.tell(f"{field}/{sequence}", own.get(field, ""))

    def _agree(self, records: Sequence[Record], sequence: int, own: Mapping[str, str]) -> None:
        describe = self._describe(sequence, own)
        check_agreement(self.signature.name, records, describe)
        if self._chunk:
            check_chunks(self.signature.name, records, self._chunk)

    def _record(self, call: Call, sequence: int, details: Mapping[str, str]) -> Record:
        signature = call.signature
        names = [n for n, _ in (*self.signature.operands, *self.signature.inputs)]
        bits = [n in signature.needs for n in (*names, *self.signature.parameters)]
        in_host = self._on_gpu and call.values[self.signature.operands[0][0]].is_cpu
        return Record(
            "forward",
            sequence,
            flags=IN_HOST * in_host,
            rows=signature.M,
            cols=signature.N,
            width=signature.D,
            dtype=signature.dtype,
            positives=signature.positives,
            needs=sum(1 << (i % 16) for i, bit in enumerate(bits) if bit) & 0xFFFF,
            loss=self._code[0],
            request=self._code[1],
            shapes=digest(details["shapes"]),
            scalars=digest(details["scalars"]),
            copies_kib=-(-signature.contiguous_copies // 1024),
        )

    @property
    def _code(self) -> tuple[bytes, bytes]:
        """Of a record, what says which code this rank runs: loss and request."""
        return digest(self._texts["loss"]), digest(self._texts["request"])

    def _details(self, call: Call) -> dict[str, str]:
        """What the record's digests stand for, as text."""
        signature = call.signature
        shapes = dict(signature.widths) | {"slots": signature.slots, "bank": signature.bank}
        names = self.signature.parameters
        values = [call.values[name].detach().double().reshape(()) for name in names]
        home = values[0].device if values else "cpu"
        told = torch.stack([v.to(home) for v in values]).tolist() if values else []
        scalars = dict(zip(names, told, strict=True))  # a device is waited for once
        return {
            **self._texts,
            "shapes": packed({k: str(v) for k, v in shapes.items()}),
            "scalars": packed({k: repr(v) for k, v in scalars.items()}),
            "needs": ", ".join(sorted(signature.needs)) or "none",
        }

    def _joint(self, own: CallSignature, records: Sequence[Record]) -> CallSignature:
        """What decides the code of all ranks: the largest shard of any."""
        return replace(
            own,
            M=max(1, *(r.rows for r in records)),
            N=max(1, *(r.cols for r in records)),
            positives=joint_positives(records),
            contiguous_copies=1024 * max(r.copies_kib for r in records),
        )

    # -- state -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ranks": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupLoss:
        """A copy on the same group."""
        other = self.__class__.__new__(self.__class__)
        other.__dict__.update(self.__dict__)
        return other


__all__ = ["GroupError", "GroupLoss"]
