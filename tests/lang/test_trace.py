"""What ``define_loss`` records, and that each misuse is named with its fix."""

import pickle

import numpy as np
import pytest
import sympy as sp
import torch

from cl_compiler import lang as cl
from cl_compiler.errors import LossDefinitionError
from tests.losses_zoo import cases

MISUSES = {}


def misuse(message):
    """Register a loss function whose definition must fail with ``message``."""

    def register(function):
        MISUSES[function.__name__] = (function, message)
        return function

    return register


@misuse(r"returns something that varies over cols; a loss is a scalar")
def non_scalar(sim):
    return cl.mean(sim, over=cl.rows)


@misuse(r"returns something that varies over rows, cols")
def mask_as_value(sim):
    return cl.where(cl.is_positive, 1, 0)


@misuse(r"sum over rows, but the expression varies over no axis")
def absent_axis(sim):
    return cl.sum(cl.mean(cl.mean(sim, over=cl.rows), over=cl.cols), over=cl.rows)


@misuse(r"sum over diagonal, but the expression varies over rows")
def unknown_axis(sim):
    return cl.sum(cl.sum(sim, over=cl.cols), over="diagonal")


@misuse(r"spans the axes rows, cols, rows2; the language has pairs only")
def triple(sim):
    return cl.mean(cl.sum(sim + cl.similarity(cl.x, cl.x), over=cl.cols), over=cl.rows)


@misuse(r"no truth value: `if`.*cl\.where")
def python_if(sim, margin):
    return sim if sim > margin else margin


@misuse(r"no truth value")
def chained_comparison(sim, margin):
    return cl.mean(cl.sum(sim, over=cl.cols, where=0 < sim < margin), over=cl.rows)


@misuse(r"no truth value")
def builtin_max(sim):
    return cl.mean(cl.sum(max(sim, 0), over=cl.cols), over=cl.rows)


@misuse(r"math\.\* and float\(\) cannot be traced")
def python_math(sim):
    import math

    return cl.mean(cl.sum(math.exp(sim), over=cl.cols), over=cl.rows)


@misuse(r"cannot be iterated")
def iteration(sim):
    return sum(sim)


@misuse(r"the argument 'x' is reserved; use cl\.x")
def reserved_argument(sim, x):
    return cl.mean(cl.sum(sim, over=cl.cols), over=cl.rows)


@misuse(r"input 'row_ids': the name is reserved")
def reserved_input(sim):
    return cl.mean(cl.row_input("row_ids") * cl.sum(sim, over=cl.cols), over=cl.rows)


@misuse(r"operand 'ids': the name is reserved")
def reserved_operand(sim):
    return cl.mean(
        cl.sum(cl.similarity(cl.x, cl.operand("ids", cl.cols)), over=cl.cols), over="rows"
    )


@misuse(r"\*scales cannot be traced; name each parameter")
def star_arguments(sim, *scales):
    return cl.mean(cl.sum(sim, over=cl.cols), over=cl.rows)


@misuse(r"the name 'weight' is used for two different things \(parameter.*input")
def name_twice(sim, weight):
    return cl.mean(cl.row_input("weight") * cl.sum(sim, over=cl.cols), over=cl.rows)


@misuse(r"is_self compares a set with itself, here the axes are \('rows', 'cols'\)")
def is_self_of_two_sets(sim):
    return cl.mean(cl.logsumexp(sim, over=cl.cols, where=~cl.is_self), over=cl.rows)


@misuse(r"is_self outside of a reduction")
def is_self_of_nothing(sim):
    return cl.is_self * cl.mean(cl.sum(sim, over=cl.cols), over=cl.rows)


@misuse(r"uses z beside x or y.*leave it out and use cl\.similarity\(cl\.z, cl\.z\)")
def z_beside_sim(sim):
    return cl.mean(cl.sum(cl.similarity(cl.z, cl.z), over=cl.cols), over=cl.rows)


@misuse(r"value depends on no similarity, only on scale;.*use sim or cl\.similarity")
def nothing_to_tile(scale):
    return scale


@misuse(r"value depends on no similarity, only on scale")
def sim_that_is_not_used(sim, scale):
    return 2 * scale


@misuse(r"value depends on no similarity, only on weight")
def sim_that_is_only_returned(sim):
    cl.output("total", cl.sum(sim, over=cl.cols))
    return cl.mean(cl.row_input("weight"), over=cl.rows)


@misuse(r"value depends on no similarity, on nothing")
def sim_that_cancels(sim):
    return 1.0 + 0 * sim


@misuse(r"`//` and `%` are not in the loss language.*Use / and compare")
def floor_division(sim):
    return cl.mean(cl.sum(sim // 2, over=cl.cols), over=cl.rows)


@misuse(r"`@` multiplies matrices.*cl\.similarity\(a, b\)")
def matrix_product(sim):
    return cl.mean(cl.sum(sim @ sim, over=cl.cols), over=cl.rows)


@misuse(r"no elements to pick: cl\.at_positive")
def element(sim):
    return cl.mean(cl.sum(sim[0], over=cl.cols), over=cl.rows)


@misuse(r"torch\.exp does not know a symbolic value\. Use cl\.exp\.")
def torch_function(sim):
    return cl.mean(cl.sum(torch.exp(sim), over=cl.cols), over=cl.rows)


@misuse(r"torch\.tanh does not know.*The functions of the language are cl\.exp")
def torch_function_without_a_twin(sim):
    return cl.mean(cl.sum(torch.tanh(sim), over=cl.cols), over=cl.rows)


@misuse(r"a tensor cannot enter a loss expression.*cl\.row_input")
def tensor_factor(sim):
    return cl.mean(cl.sum(torch.ones(3) * sim, over=cl.cols), over=cl.rows)


@misuse(r"numpy\.exp does not know a symbolic value\. Use cl\.exp\.")
def numpy_function(sim):
    return cl.mean(cl.sum(np.exp(sim), over=cl.cols), over=cl.rows)


@misuse(r"has no \.logsumexp: it is neither a tensor.*Use cl\.logsumexp\.")
def method_of_a_tensor(sim):
    return cl.mean(sim.logsumexp(1), over=cl.rows)


@misuse(r"at_positive without on=.*Say on=cl\.rows for")
def positive_of_what(sim):
    return cl.mean(cl.at_positive(sim), over=cl.rows)


@misuse(r"logsumexp without over=: say which axis it folds, over=cl\.rows or over=cl\.cols")
def reduction_of_what(sim):
    return cl.mean(cl.logsumexp(sim), over=cl.rows)


@misuse(r"cl\.count counts what a mask leaves: give where=")
def count_of_what(sim):
    return cl.mean(cl.sum(sim, over=cl.cols) / cl.count(over=cl.cols), over=cl.rows)


@misuse(r"cl\.size\('diagonal'\): the axes are cl\.rows")
def size_of_no_axis(sim):
    return cl.mean(cl.sum(sim, over=cl.cols), over=cl.rows) / cl.size("diagonal")


@misuse(r"is not a mask; masks are cl\.is_positive, cl\.is_self, comparisons")
def value_as_mask(sim):
    return cl.mean(cl.sum(sim, over=cl.cols, where=sim), over=cl.rows)


@misuse(r"is not a mask")
def inverted_value(sim):
    return cl.mean(cl.sum(sim, over=cl.cols, where=~sim), over=cl.rows)


@misuse(r"similarity\(y, x\) runs over \('cols', 'rows'\).*Swap the arguments")
def reversed_operands(sim):
    return cl.mean(cl.sum(cl.similarity(cl.y, cl.x), over=cl.cols), over=cl.rows)


@misuse(r"only prefixes of the columns exist, e\.g\. x\[:64\]")
def column_slice(sim):
    return cl.mean(cl.sum(cl.similarity(cl.x[2:4], cl.y[2:4]), over=cl.cols), over=cl.rows)


@misuse(r"3 columns of x with 2 of y.*Take the same prefix of both")
def unequal_prefixes(sim):
    return cl.mean(cl.sum(cl.similarity(cl.x[:3], cl.y[:2]), over=cl.cols), over=cl.rows)


@misuse(r"cl\.similarity takes two operands")
def similarity_of_a_vector(sim):
    return cl.mean(cl.sum(cl.similarity(cl.x, cl.norm(cl.x)), over=cl.cols), over=cl.rows)


@misuse(r"axis 'slots' is not one of rows, cols, bank, \(rows, slots\)")
def operand_axis(sim):
    return cl.similarity(cl.x, cl.operand("hard", cl.slots))


@misuse(r"operand 'guide' is declared twice")
def operand_twice(sim):
    first = cl.similarity(cl.operand("guide", cl.rows), cl.operand("guide", cl.cols))
    return cl.mean(cl.sum(first, over=cl.cols), over=cl.rows)


@misuse(r"positives join rows and cols only")
def positive_of_a_slot(sim):
    return cl.mean(cl.at_positive(sim, on=cl.slots), over=cl.rows)


@misuse(r"at_positive: the value must run over rows and cols only")
def positive_of_a_second_copy(sim):
    return cl.mean(cl.at_positive(cl.similarity(cl.x, cl.x), on=cl.rows), over=cl.rows)


@misuse(r"output 'pairs': only vectors and scalars")
def output_of_pairs(sim):
    cl.output("pairs", sim)
    return cl.mean(cl.sum(sim, over=cl.cols), over=cl.rows)


@misuse(r"output 'rank' is defined twice")
def output_twice(sim):
    rank = cl.sum(sim, over=cl.cols)
    cl.output("rank", rank)
    cl.output("rank", 2 * rank)
    return cl.mean(rank, over=cl.rows)


@misuse(r"no_return returns nothing: end it with `return`")
def no_return(sim):
    cl.mean(cl.sum(sim, over=cl.cols), over=cl.rows)


@misuse(r"division_by_zero divides by zero")
def division_by_zero(sim):
    return cl.mean(cl.sum(sim / 0, over=cl.cols), over=cl.rows)


@misuse(r"'2' \(str\) cannot enter a loss expression")
def text_as_number(sim):
    return cl.mean(cl.sum(sim * "2", over=cl.cols), over=cl.rows)


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_named(name):
    function, message = MISUSES[name]
    with pytest.raises(LossDefinitionError, match=message):
        cl.define_loss(function)


def test_what_is_no_function_defines_no_loss():
    with pytest.raises(
        LossDefinitionError, match=r"define_loss got 3 \(int\), which is no function"
    ):
        cl.define_loss(3)


def test_outside_of_a_loss_the_language_is_not_spoken():
    with pytest.raises(LossDefinitionError, match="inside a function decorated with @define_loss"):
        cl.logsumexp(cl.is_positive, over=cl.cols)


def test_a_failed_definition_leaves_no_trace_behind():
    with pytest.raises(LossDefinitionError):
        cl.define_loss(non_scalar)
    with pytest.raises(LossDefinitionError, match="inside a function decorated"):
        cl.similarity(cl.x, cl.y)


def test_equal_reductions_are_one():
    @cl.define_loss
    def twice(sim, scale):
        s = scale * sim
        first, second = (cl.logsumexp(s, over=cl.cols) for _ in range(2))
        return cl.mean(first + second, over=cl.rows)

    assert [r.monoid for r in twice.reductions] == ["logsumexp", "sum"]
    assert twice.reductions[1].operand == 2 * twice.leaves["r0"].symbol


def test_a_mask_as_a_factor_selects():
    """0 * inf is NaN, so a mask never becomes a factor."""

    @cl.define_loss
    def factor(sim):
        return cl.sum(cl.sum(cl.is_positive * cl.exp(sim), over=cl.cols), over=cl.rows)

    operand = factor.reductions[0].operand
    assert not operand.is_Mul
    assert operand.args[0].name == "is_positive" and operand.args[2] == 0


def test_a_mean_of_positives_skips_rows_without_one():
    @cl.define_loss
    def positives(sim):
        return cl.mean(cl.at_positive(sim, on=cl.rows), over=cl.rows)

    counted, number, total = positives.reductions[1:]
    assert str(counted.where) == "is_positive" and counted.over == "cols"
    assert str(number.where) == str(total.where) == f"greater({counted.name}, 0)"
    assert [message for message, _ in positives.required] == ["the mean over rows has no element"]


def test_a_mean_without_positives_is_over_all():
    @cl.define_loss
    def everything(sim):
        return cl.mean(cl.mean(sim, over=cl.cols), over=cl.rows)

    assert everything.required == () and all(r.where == 1 for r in everything.reductions)


def test_is_self_is_bound_to_the_axes_of_its_use():
    @cl.define_loss
    def both(sim):
        left = cl.logsumexp(cl.similarity(cl.x, cl.x), over=cl.rows2, where=~cl.is_self)
        right = cl.logsumexp(cl.similarity(cl.y, cl.y), over=cl.cols2, where=~cl.is_self)
        return cl.mean(left, over=cl.rows) + cl.mean(right, over=cl.cols)

    axes = [leaf.axes for leaf in both.leaves.values() if leaf.kind == "is_self"]
    assert axes == [("rows", "rows2"), ("cols", "cols2")]


def test_a_vector_moved_to_its_positive_changes_axis():
    @cl.define_loss
    def moved(sim):
        column = cl.logsumexp(sim, over=cl.rows)
        return cl.mean(cl.at_positive(column, on=cl.rows), over=cl.rows)

    assert moved.leaves["r0"].axes == ("cols",) and moved.leaves["r1"].axes == ("rows",)


def test_arguments_and_operands_in_a_fixed_order():
    @cl.define_loss(constants=[("k", 3)])
    def many(second, first, sim):
        extra = cl.similarity(cl.operand("a", cl.rows), cl.operand("b", cl.cols, stop=True))
        pairs = first * sim + second * extra
        return cl.mean(cl.sum(pairs, over=cl.cols), over=cl.rows)

    assert many.parameters == ("second", "first")
    assert [(op.name, op.stop) for op in many.operands] == [
        ("x", False),
        ("y", False),
        ("a", False),
        ("b", True),
    ]
    assert many.constants == (("k", 3),)


@pytest.mark.parametrize("case", cases(), ids=lambda c: c.name)
def test_a_loss_is_a_value_that_pickles(case):
    again = pickle.loads(pickle.dumps(case.loss))
    assert again == case.loss
    assert again.value == case.loss.value and isinstance(again.value, sp.Expr)


def test_a_default_that_could_not_be_kept_is_refused():
    with pytest.raises(LossDefinitionError, match="has a default"):

        @cl.define_loss
        def loss(sim, logit_scale=2.0):
            return cl.mean(cl.logsumexp(logit_scale * sim, over=cl.cols), over=cl.rows)


def test_arithmetic_on_an_operand_is_refused():
    with pytest.raises(LossDefinitionError, match="is an operand"):

        @cl.define_loss
        def loss(logit_scale):
            return cl.mean(cl.logsumexp(cl.x * 2, over=cl.cols), over=cl.rows)


def test_numpys_numbers_are_numbers():
    """On either side of an operator, and as exactly the number that they are."""

    def loss(number):
        @cl.define_loss
        def weighted(sim):
            pairs = number * sim + sim / number - (number - sim)
            return cl.mean(cl.sum(pairs, over=cl.cols, where=number > sim), over=cl.rows)

        return weighted

    expected = [str(r) for r in loss(0.5).reductions]
    for number in (np.float32(0.5), np.float64(0.5), np.float16(0.5)):
        assert [str(r) for r in loss(number).reductions] == expected
    assert loss(np.int64(3)).reductions == loss(3).reductions


def test_a_loss_prints_as_what_it_is_called_with():
    @cl.define_loss
    def weighted(sim, logit_scale):
        rows = cl.row_input("weight") * cl.logsumexp(logit_scale * sim, over=cl.cols)
        return cl.mean(rows, over=cl.rows)

    assert repr(weighted) == "<loss weighted(x, y, weight, logit_scale)>"


def test_every_word_says_what_it_is():
    words = {name: getattr(cl, name) for name in cl.__all__}
    silent = [n for n, word in words.items() if callable(word) and not (word.__doc__ or "").strip()]
    assert silent == []
