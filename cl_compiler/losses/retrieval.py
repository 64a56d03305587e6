"""Multiple negatives ranking: queries ``x`` [M, D], documents ``y`` [N, D], in four directions.

The first M documents are the queries' own, in their order; what follows are hard negatives, M at a
time, in the same order.  ``mnrl`` is a factory: the structure is its arguments, the logit scale
(20 in sentence-transformers) and the hardness strength are the loss's.
"""

from collections.abc import Iterable
from functools import reduce

from cl_compiler import lang as cl
from cl_compiler.errors import ArgumentError, check_word

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")


def mnrl(
    directions=("query_to_doc",), partition_mode="joint", hardness_mode=None, hard_negatives=False
) -> cl.LossIR:
    """sentence-transformers' MultipleNegativesRankingLoss (Henderson et al. 2017) as a loss.

    Args:
        directions: what a row's denominator holds: its query against all documents; against all
            other queries; its document against all queries; against all other documents, those of
            its own query excepted (all four: Li et al. 2023).
        partition_mode: "joint", one softmax over all; "per_direction", the mean of one for each.
        hardness_mode: which negatives' logits are raised by hardness_strength · sim, as a constant:
            "in_batch_negatives" (Lan et al. 2025), "hard_negatives" (Schechter Vera et al. 2025),
            "all_negatives", or None.
        hard_negatives: whether there are more documents than queries.  The loss then also takes
            ``row_code`` and ``col_code``, whose inner product is positive where a document belongs
            to a query and not otherwise, and for "doc_to_doc" ``positives``, the first M documents.

    Raises:
        ArgumentError: a word that is none of these, or directions without "query_to_doc".
    """
    several = isinstance(directions, Iterable) and not isinstance(directions, str)
    directions = tuple(directions) if several else directions
    if not several or "query_to_doc" not in directions:
        raise ArgumentError(
            f"directions={directions!r}: give a tuple with 'query_to_doc', which is always in the "
            f"denominator, and any of {', '.join(DIRECTIONS[1:])}."
        )
    for direction in directions:
        check_word("directions", direction, DIRECTIONS)
    check_word("partition_mode", partition_mode, ("joint", "per_direction"))
    if hardness_mode is not None:
        check_word("hardness_mode", hardness_mode, HARDNESS_MODES)
    if hardness_mode == "hard_negatives" and not hard_negatives:
        hardness_mode = None
    constants = [
        ("directions", tuple(d for d in DIRECTIONS if d in directions)),
        ("partition_mode", partition_mode),
        ("hardness_mode", hardness_mode),
        ("hard_negatives", hard_negatives),
    ]

    def value(sim, logit_scale, hardness_strength=0):
        s = logit_scale * sim
        terms = [_query_to_doc(sim, s, hardness_strength, hardness_mode, hard_negatives)]
        if "query_to_query" in directions:
            queries = logit_scale * cl.similarity(cl.x, cl.x)
            terms.append(cl.logsumexp(queries, over=cl.rows2, where=~cl.is_self))
        if "doc_to_query" in directions:
            terms.append(cl.at_positive(cl.logsumexp(s, over=cl.rows), on=cl.rows))
        if "doc_to_doc" in directions:
            terms.append(_doc_to_doc(logit_scale, hard_negatives))
        joint = partition_mode == "joint"
        z = reduce(cl.logaddexp, terms) if joint else sum(terms) / len(terms)
        return cl.mean(z - cl.at_positive(s, on=cl.rows), over=cl.rows)

    if hardness_mode is None:

        @cl.define_loss(constants=constants)
        def mnrl(sim, logit_scale):
            return value(sim, logit_scale)

    else:

        @cl.define_loss(constants=constants)
        def mnrl(sim, logit_scale, hardness_strength):
            return value(sim, logit_scale, hardness_strength)

    return mnrl


def _own_documents(hard_negatives):
    """Which documents belong to a row's query: its positive, and its hard negatives."""
    if not hard_negatives:
        return cl.is_positive
    row_code = cl.operand("row_code", cl.rows, stop=True)
    col_code = cl.operand("col_code", cl.cols, stop=True)
    return cl.similarity(row_code, col_code) > 0


def _query_to_doc(sim, s, strength, mode, hard_negatives):
    raised = strength * cl.stop_gradient(sim)
    if mode == "in_batch_negatives":
        s = s + cl.where(_own_documents(hard_negatives), 0, raised)
    elif mode == "hard_negatives":
        s = s + cl.where(_own_documents(hard_negatives) & ~cl.is_positive, raised, 0)
    elif mode == "all_negatives":
        s = s + cl.where(cl.is_positive, 0, raised)
    return cl.logsumexp(s, over=cl.cols)


def _doc_to_doc(logit_scale, hard_negatives):
    if hard_negatives:
        s = logit_scale * cl.similarity(cl.operand("positives", cl.rows), cl.y)
        return cl.logsumexp(s, over=cl.cols, where=~_own_documents(hard_negatives))
    s = logit_scale * cl.similarity(cl.y, cl.y)
    return cl.at_positive(cl.logsumexp(s, over=cl.cols2, where=~cl.is_self), on=cl.rows)
