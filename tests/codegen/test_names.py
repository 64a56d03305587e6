"""A loss may call its arguments what it likes: emitted code gives its own locals other names."""

import pytest

from cl_compiler import lang as cl
from cl_compiler.errors import LossDefinitionError
from tests.tiles import emit, errors, run
from tests.zoo_case import Case, sample

NAMES = (
    *("i", "k", "step", "width", "rows", "half", "kept", "store", "value", "saved", "math", "D"),
    *("t0_buffer", "m1", "x_i", "a0", "s0", "y_j", "d_x", "along", "block", "forward"),
    *("row_lse", "row_lse_sum", "row_lse_shift"),
)
TAKEN = ("logits", "logits_pos", "n_rows", "n_cols", "r1", "t0", "a_r1", "ids", "group")


def infonce_with(scale: str, weight: str = "weight") -> Case:
    namespace = {"cl": cl}
    exec(
        f"""
def named(sim, {scale}):
    s, w = {scale} * sim, cl.row_input({weight!r})
    row = w * (cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows))
    return cl.mean(row, over=cl.rows)
""",
        namespace,
    )
    return Case(f"named_{scale}", cl.define_loss(namespace["named"]), {scale: 5.0})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["spill", "panel"])
def test_a_parameter_may_have_any_name(name: str, schedule: str):
    case = infonce_with(name)
    inputs = sample(case)
    result = run(emit(case, schedule), inputs)
    assert set(result.gradients) == {"x", "y", name, "weight"}
    assert max(errors(result, inputs).values()) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_may_have_any_name(name: str):
    case = infonce_with("scale", name)
    inputs = sample(case)
    assert max(errors(run(emit(case, "spill"), inputs), inputs).values()) < 1e-9


@pytest.mark.parametrize("name", TAKEN)
def test_a_name_of_the_compiler_is_an_error(name: str):
    with pytest.raises(LossDefinitionError, match=f"'{name}'.*reserved.*another"):
        infonce_with(name)
    with pytest.raises(LossDefinitionError, match=f"'{name}'.*reserved.*another"):
        infonce_with("scale", name)


@pytest.mark.parametrize("name", ["m0", "x_i", "rows", "d_x"])
def test_an_operand_of_a_name_that_emitted_code_uses_is_an_error(name: str):
    @cl.define_loss
    def guided(sim):
        guide = cl.similarity(cl.operand(name, cl.rows), cl.y)
        return cl.mean(cl.logsumexp(sim + guide, over=cl.cols), over=cl.rows)

    with pytest.raises(LossDefinitionError, match=f"operand '{name}'.*another name"):
        emit(Case("guided", guided, {}), "spill")
