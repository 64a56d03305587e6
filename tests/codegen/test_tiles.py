"""Emitted tiles against the dense float64 reference: the zoo, and losses drawn from the grammar.

Tiles of 3 by 4 on 5 by 7 pairs have interior, edge and ragged blocks; everything runs in float64,
so 1e-9 separates a wrong formula from rounding.
"""

from random import Random

import pytest
import torch

from cl_compiler.lang.program import Schedule
from cl_compiler.lang.schedules import valid_schedules
from cl_compiler.lang.sweeps import plan_sweeps
from cl_compiler.plan.types import Tile
from tests import losses_zoo as zoo
from tests.random_losses import draw
from tests.tiles import emit, errors, load, run, schedules_of
from tests.zoo_case import Case, Sample, sample

TOLERANCE = 1e-9
SEEDS = 200
SHAPES = ((2, 3), (6, 8), (13, 29))
TILES = (Tile(1, 1), Tile(5, 2), Tile(4, 64))

CASES = {case.name: case for case in zoo.cases()}
PAIRS = [(name, schedule) for name, case in CASES.items() for schedule in schedules_of(case)]


def assert_right(source: str, inputs: Sample, grad_output: float = 1.0) -> None:
    """Value and every gradient that the file gives, against the reference."""
    result = run(source, inputs, grad_output)
    for name, gradient in result.gradients.items():
        result.gradients[name] = gradient / grad_output
    found = errors(result, inputs)
    given = {"value", *result.gradients}
    wrong = {name: error for name, error in found.items() if name in given and error > TOLERANCE}
    assert not wrong, f"{wrong}\n{source}"


def some_of(case: Case, rng: Random) -> frozenset[str]:
    """A random subset of what can have a gradient; never empty."""
    names = sorted(case.needs)
    return frozenset(rng.sample(names, rng.randint(1, len(names))))


def schedules_with(case: Case, needs: frozenset[str]) -> list[Schedule]:
    """The schedules that a case can use where only ``needs`` have gradients."""
    reasons = valid_schedules(plan_sweeps(case.loss, case.positives, needs))
    return [schedule for schedule, reason in reasons.items() if not reason]


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_zoo(name: str, schedule: Schedule):
    case = CASES[name]
    source = emit(case, schedule)
    assert set(load(source).GRADIENTS) == case.needs
    assert_right(source, sample(case, seed=1), grad_output=-1.7)


@pytest.mark.parametrize("name", CASES)
def test_zoo_with_some_gradients_only(name: str):
    """Each file gives exactly the gradients that were asked for, and they are right."""
    rng = Random(name)
    case = CASES[name]
    for _ in range(2):
        needs = some_of(case, rng)
        source = emit(case, rng.choice(schedules_with(case, needs)), needs=needs)
        assert set(load(source).GRADIENTS) == needs
        assert_right(source, sample(case, seed=rng.randint(0, 99)))


@pytest.mark.parametrize("name", CASES)
def test_zoo_value_alone(name: str):
    case = CASES[name]
    inputs = sample(case, seed=2)
    module = load(emit(case, "spill", needs=frozenset()))
    values = {**inputs.tensors, **inputs.parameters, **inputs.ids}
    value = module.Loss.apply(*(values[name] for name in module.ARGUMENTS))[0]
    expected = inputs.reference()
    assert module.GRADIENTS == ()
    torch.testing.assert_close(value, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_loss(seed: int):
    """One schedule per loss; together the seeds visit each schedule tens of times."""
    case = draw(seed)
    schedules = schedules_of(case)
    schedule = schedules[seed % len(schedules)]
    assert_right(emit(case, schedule), sample(case, seed=seed))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_loss_in_every_schedule_size_and_tile(seed: int):
    case, rng = draw(seed), Random(seed)
    for schedule in schedules_of(case):
        for tile in TILES:
            source = emit(case, schedule, tile=tile, kept_tiles=rng.randint(0, 5))
            for m, n in SHAPES:
                assert_right(source, sample(case, m, n, seed=seed))


IGNORED = (7, 94, 165)
"""Seeds of losses that ignore all that needs a gradient, once in four draws."""


@pytest.mark.parametrize(
    "seed", [s if s in IGNORED else pytest.param(s, marks=pytest.mark.full) for s in range(SEEDS)]
)
def test_random_loss_with_some_gradients_only(seed: int):
    case, rng = draw(seed), Random(seed)
    for _ in range(4):
        needs = some_of(case, rng)
        source = emit(case, rng.choice(schedules_with(case, needs)), needs=needs)
        inputs, given = sample(case, seed=seed), set(load(source).GRADIENTS)
        wanted = inputs.gradients(inputs.reference())
        assert given <= needs
        assert not any(wanted[name].any() for name in needs - given)  # what the loss ignores
        assert_right(source, inputs)


@pytest.mark.full
@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_zoo_in_every_size_and_tile(name: str, schedule: Schedule):
    case, rng = CASES[name], Random(name)
    for tile in TILES:
        source = emit(case, schedule, tile=tile, kept_tiles=rng.randint(0, 5))
        for m, n in ((1, 1), *SHAPES):
            inputs = sample(case, m, n, seed=3)
            if torch.isfinite(inputs.reference()):
                assert_right(source, inputs)
