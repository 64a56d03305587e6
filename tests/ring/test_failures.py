"""Every way in which a rank can fail: the others raise, in time, and say which and why."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.links import NoLinksError, obstacle, shaped
from cl_compiler.errors import ArgumentError
from cl_compiler.runtime.guard import (
    FAILED,
    RECORD_BYTES,
    Record,
    check_agreement,
    check_compiled,
    check_factors,
    differing,
    packed,
    packed_factor,
    ranks_in_words,
)
from cl_compiler.runtime.watch import CLOSED, Beat, absent
from tests.ring import ending, ranks
from tests.ring.processes import launch

SLACK_S = 2.0


@pytest.fixture(scope="module")
def disagreements() -> list[dict[str, tuple[str, float]]]:
    return [outcome.needed() for outcome in launch(ranks.disagreements, 3)]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("width", ["ArgumentError", "D, the operands", "rank 1: 12", "ranks 0, 2: 8"]),
        ("dtype", ["ArgumentError", "dtype", "rank 1: float64", "ranks 0, 2: float32"]),
        ("scale", ["ArgumentError", "rank 1: logit_scale=11.0", "ranks 0, 2: logit_scale=10.0"]),
        ("needs", ["ArgumentError", "rank 1: y", "ranks 0, 2: x, y"]),
        ("factor", ["ArgumentError: clip: ", "gradient", "rank 1: 0.05", "ranks 0, 2: 0.025"]),
        ("ids", ["ArgumentError", "rank 1: no ids", "ranks 0, 2: ids"]),
        ("empty", ["ArgumentError", "all 3 ranks are empty"]),
        ("loss", ["ArgumentError: the loss must", "rank 1: infonce", "ranks 0, 2: clip"]),
        ("operands", ["rank 1: nt_xent, fingerprint", "ranks 0, 2: clip, fingerprint"]),
        ("plan", ["rank 1: schedule=ring_travel.", "ranks 0, 2: schedule=ring_owner;"]),
        ("convention", ["rank 1: grad_convention=sum.", "ranks 0, 2: grad_convention=mean;"]),
        ("budget", ["rank 1: memory_budget=32.0 MiB.", "ranks 0, 2: memory_budget=16.0 MiB;"]),
        ("problem", ["rank 1: problem=(M=60, N=60, D=8,", "ranks 0, 2: problem=none;"]),
    ],
)
def test_ranks_that_differ_all_raise_the_same(disagreements, what, words):
    """And nothing but what differs is said."""
    texts = {found[what][0] for found in disagreements}
    assert len(texts) == 1, texts
    (text,) = texts
    assert all(word in text for word in words), text
    if what in ("plan", "convention", "budget"):
        assert text.count("=") == 2 and text.endswith(" Pass the same on every rank."), text
    assert max(found[what][1] for found in disagreements) < 2.0


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([2], "rank 2"),
        ([0, 1], "ranks 0, 1"),
        ([0, 1, 2, 3, 7], "ranks 0-3, 7"),
        ([0, 2, 3, 5, 6, 7], "ranks 0, 2, 3, 5-7"),
        (list(range(0, 64, 2)), "ranks 0, 2, 4, 6, 8, 10, 12, 14, … (32 ranks)"),
        (list(range(1024)), "ranks 0-1023"),
    ],
)
def test_ranks_are_named_in_few_words(ranks, words):
    assert ranks_in_words(ranks) == words


def test_what_is_alike_is_not_said():
    first = packed({"a": "1", "b": "2", "c": "3"})
    other = packed({"a": "1", "b": "5", "c": "4"})
    assert differing([first] * 4 + [other]) == (
        "ranks 0-3: b=2; rank 4: b=5; ranks 0-3: c=3; rank 4: c=4"
    )
    third = packed({"a": "1", "b": "2", "c": "9"})  # ranks are grouped for each of them anew
    assert differing([first, third, other]).startswith("ranks 0, 1: b=2; rank 2: b=5; rank 0: c=3")
    assert differing([first, "unknown"]) == f"rank 0: {first}; rank 1: unknown"


def test_a_loss_is_named_once():
    records = [Record("forward", 1, rows=20, cols=20), Record("forward", 1, flags=FAILED)]
    of_ranks = ["", "nt_xent: z has 21 rows, not nt_xent: 20."]
    with pytest.raises(ArgumentError) as caught:
        check_agreement("nt_xent", records, lambda _: of_ranks)
    assert str(caught.value) == "nt_xent: rank 1: z has 21 rows, not nt_xent: 20."


def test_wrong_arguments_of_one_rank_are_told_to_all(disagreements):
    own, *others = (disagreements[k]["arguments"][0] for k in (1, 0, 2))
    assert "20 rows and 3 columns" in own
    assert all("rank 1: " in text and "20 rows and 3 columns" in text for text in others)


def test_integers_on_one_rank_are_named_so(disagreements):
    """And not as what would follow: that they need no gradient."""
    own, *others = (disagreements[k]["integers"][0] for k in (1, 0, 2))
    said = "x is torch.int64; operands are float64, float32, bfloat16, float16. Convert it"
    assert own.startswith(f"ArgumentError: clip: {said}")
    assert all(text.startswith(f"ArgumentError: clip: rank 1: {said}") for text in others)


def test_a_record_of_another_version():
    """Is not read any further, and said before anything else: other fields may have moved."""
    own = Record("backward", 7, rows=3, loss=b"another.")
    later = bytearray(replace(own, version=own.version + 1).pack())
    later[7:] = b"\xff" * (RECORD_BYTES - 7)
    records = [own, Record.unpack(bytes(later)), own]
    with pytest.raises(ArgumentError, match="Install the same cl_compiler on every rank") as caught:
        check_compiled("clip", records, lambda _: [])
    told = f"rank 1: {own.version + 1}"
    assert f"protocol must be the same on every rank: ranks 0, 2: {own.version}; {told}." in str(
        caught.value
    )


def test_after_such_an_error_the_group_goes_on(disagreements):
    assert [found["fine"][0] for found in disagreements] == [""] * 3


def test_a_factor_that_all_ranks_have_is_fine(disagreements):
    """Also one that depends on the value, of which every rank has all bits."""
    assert [found["scaled"][0] for found in disagreements] == [""] * 3


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ([1.0, 1.0 + 2.0**-22], ""),  # one expression, on two kinds of cores
        ([0.0, -0.0], ""),
        ([math.nan, -math.nan], ""),
        ([math.inf, math.inf], ""),
        ([1 / 65536, 1 / 65535], "rank 0: 1.52587891e-05; rank 1: 1.52590219e-05"),
        ([1.0, math.nan], "rank 0: 1; rank 1: nan"),
        ([0.0, 1e-30], "rank 0: 0; rank 1: 1e-30"),
        ([math.inf, 2.0**127], "rank 0: inf; rank 1: 1.70141183e+38"),
    ],
)
def test_what_counts_as_one_factor(factors, said):
    records = [Record("backward", 1, scalars=packed_factor(factor)) for factor in factors]
    with pytest.raises(ArgumentError, match=re.escape(said)) if said else contextlib.nullcontext():
        check_factors("clip", records)


def test_elements_that_are_not_finite(disagreements):
    """nonfinite="error": all raise; "propagate": NaN on every rank, as the formula gives."""
    for found in disagreements:
        assert "NonFiniteError" in found["nonfinite"][0]
        assert found["propagate"][0] == "nan"
    assert "rank 1" in disagreements[0]["nonfinite"][0]


def test_ranks_that_are_out_of_step():
    """A second backward is seen at once, a call that does not come at the timeout, or a rank."""
    outcomes = [outcome.needed() for outcome in launch(ranks.out_of_step, 3)]
    first = {texts[0] for texts in outcomes}
    assert len(first) == 1
    (text,) = first
    assert "rank 1: the backward of call 1" in text
    assert text.endswith("Compile the loss again, on a new group if a rank is gone.")
    for rank in (0, 2):
        assert "GroupError" in outcomes[rank][1]
        assert "rank 1: " in outcomes[rank][1] and "call 3" in outcomes[rank][1]
        assert float(outcomes[rank][2]) < ranks.TIMEOUT_S + SLACK_S
        assert "GroupError: rank 1 did not come within 2 s" in outcomes[rank][3]
        assert float(outcomes[rank][4]) < ranks.TIMEOUT_S + SLACK_S


def test_a_rank_that_closed_its_loss_is_named_so():
    said, _ = (outcome.needed() for outcome in launch(ranks.closed, 2))
    assert said.startswith("GroupError: clip: rank 0 ")
    assert "rank 1 closed its loss after call 1. Compile the loss again" in said


def test_the_same_is_said_wherever_a_failure_is_seen():
    """By a call that waits, by one that looks first, and by the next ones."""
    waiting, own, late = (outcome.needed() for outcome in launch(ranks.told_by_one, 3))
    (text,) = {*waiting, *late}
    assert text.startswith("clip: rank 1 failed: RuntimeError: my data is bad. Compile the loss")
    assert own == [text.replace("rank 1 failed", "this rank failed")] * 2


def test_where_a_rank_is_in_words():
    assert Beat().entered == "no call yet" and Beat().where == "before its first call"
    assert Beat(3, 2, "backward").where == "in the backward of call 2"
    beats = {0: Beat(3, -1, CLOSED), 1: Beat(3, 4, CLOSED), 2: Beat()}
    assert absent([0, 1, 2], beats) == (
        "rank 0 closed its loss before its first call; rank 1 closed its loss after call 4."
    )


def survive(limit_s: float, victim: int, words: str, world_size: int, *args, **how) -> None:
    """The others raise, and say so, each time; and in time, unless the machine was busy elsewhere.

    ``args``: what ``launch`` takes after the number of ranks, a path for the time of the failure
    last; three attempts, of which one must be in time.
    """
    function, *rest, marker = args
    for _ in range(3):
        outcomes = launch(function, world_size, victim, *rest, str(marker), **how)
        happened = float(marker.read_text())
        late = 0.0
        for rank, outcome in enumerate(outcomes):
            if rank != victim:
                assert outcome.ended and "GroupError" in outcome.error, outcome
                assert words in outcome.error, outcome.error
                late = max(late, outcome.at - happened - limit_s)
        if late <= 0:
            return
    pytest.fail(f"{late:.1f} s too late")


GONE = "rank {} gave no sign of life"


def test_a_killed_rank(tmp_path):
    """In the backward: the survivors raise within two seconds."""
    survive(2.0, 1, GONE.format(1), 3, ranks.die, 5, "SIGKILL", tmp_path / "at")


def test_the_rank_that_keeps_the_store_is_killed(tmp_path):
    survive(2.0, 0, GONE.format(0), 3, ranks.die, 1, "SIGKILL", tmp_path / "at", store="tcp")


def test_the_rank_that_keeps_the_store_is_stopped(tmp_path):
    """No call of the store returns any more: neither the error nor its diagnosis waits for it."""
    limit_s = ranks.TIMEOUT_S + SLACK_S
    args = (ranks.die, 1, "SIGSTOP", tmp_path / "at")
    survive(limit_s, 0, GONE.format(0), 3, *args, store="tcp")


def test_survivors_end_as_any_script_with_an_error(tmp_path):
    """Exit code 1 and a traceback: no abort by a thread that comes back too late, and no hang."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", ending.__name__, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        timeout=2 * ending.LIMIT_S,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, (code, written) in enumerate(json.loads(done.stdout)):
        if rank != ending.VICTIM:
            assert code == 1, (rank, code, written[-2000:])
            assert "Traceback" in written and "GroupError" in written
            assert "terminate called" not in written


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("step", range(18))
def test_a_rank_killed_at_each_step(step, victim, tmp_path):
    """Forward: three shards and their statistics pass by, in 6 posts; backward: 12."""
    survive(2.0, victim, GONE.format(victim), 4, ranks.die, step, "SIGKILL", tmp_path / "at")


@pytest.mark.full
@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ("half_ring", (1, 4, 7)),
        ("both_ways", (1, 4, 6, 17)),
        ("host", (1, 4, 6, 17)),
        ("two_level", (1, 4, 6, 17)),
        ("all_gather", (0, 1, 2, 3)),
        ("canonical", (1, 7, 8, 15)),
    ],
)
def test_a_rank_killed_where_shards_travel_in_another_way(schedule, steps, tmp_path):
    """In the first, the last and some other posts of both passes."""
    for step in steps:
        survive(2.0, 2, GONE.format(2), 4, ranks.die_along, step, schedule, tmp_path / "at")


def test_a_rank_killed_before_it_has_made_the_second_group(tmp_path):
    """In the first call, where the others wait for it to make one."""
    survive(2.0, 1, GONE.format(1), 3, ranks.die_unconnected, tmp_path / "at")


def test_a_stopped_rank(tmp_path):
    limit_s = ranks.TIMEOUT_S + SLACK_S
    args = (ranks.die, 1, "SIGSTOP", tmp_path / "at")
    survive(limit_s, 2, GONE.format(2), 3, *args)


@pytest.mark.skipif(bool(obstacle()), reason=f"links cannot be shaped: {obstacle()}")
def test_a_slow_link():
    """One of three links at 1 Mb/s: two megabytes do not pass within the timeout."""
    for _ in range(3):  # of which one must be in time, as in ``survive``
        try:
            with shaped([1e9, 1e6, 1e9]) as places:
                outcomes = launch(ranks.send_slowly, 3, places=places)
        except NoLinksError as error:
            pytest.skip(str(error))
        found = [outcome.needed() for outcome in outcomes]
        assert all("GroupError" in text for text, _ in found), found
        if all(seconds < ranks.TIMEOUT_S + SLACK_S for _, seconds in found):
            return
    pytest.fail(f"too late: {found}")


@pytest.mark.parametrize(
    ("victim", "told", "store"),
    [
        (0, "", "tcp"),
        (0, "guarded", "tcp"),
        pytest.param(2, "guarded", "file", marks=pytest.mark.full),
        pytest.param(2, "by hand", "file", marks=pytest.mark.full),
    ],
)
def test_an_exception_of_one_rank_reaches_the_others(victim, told, store, tmp_path):
    """Whether it ends the process, or is caught where the group is told of it."""
    words = f"rank {victim} failed: ValueError: the data loader broke"
    args = (ranks.raise_instead, told, tmp_path / "at")
    survive(3.0, victim, words, 3, *args, store=store)


GROWTH_BYTES = 4 << 20
"""Of resident memory, over all cycles after the first few: two chunks of one cycle."""


CYCLES_S = 60.0
"""Of fifty cycles in all, at most."""


@pytest.mark.parametrize(
    ("cycles", "anew"),
    [(6, False), *(pytest.param(50, anew, marks=pytest.mark.full) for anew in (False, True))],
)
def test_groups_leave_nothing_behind(cycles, anew, tmp_path):
    """Made and taken down again and again, alone or with all groups of the process; what was
    closed is held on to."""
    folder, warm = str(tmp_path) if anew else "", max(3, cycles // 10)
    began = time.monotonic()
    outcomes = launch(ranks.again_and_again, 3, cycles, folder, seconds=60.0 + 4 * cycles)
    assert cycles < 50 or time.monotonic() - began < CYCLES_S
    for outcome in outcomes:
        found = outcome.needed()
        before, after = found[:warm], found[warm:]
        for what in ("descriptors", "threads", "storages", "storage_bytes"):
            most = max(getattr(held, what) for held in before)
            assert all(getattr(held, what) <= most for held in after), (what, found)
        grown = after[-1].resident_bytes - before[-1].resident_bytes
        assert grown < GROWTH_BYTES, (grown, found)
