"""InfoNCE without the negatives that look like positives, to the model itself or to a guide.

Both are factories: which terms there are is structure; logit scale and margin are the loss's.
"""

from functools import reduce

from cl_compiler import lang as cl
from cl_compiler.errors import check_word


def qwen3(query_query=False, doc_doc=False, hard_negatives=False) -> cl.LossIR:
    """Qwen3-Embedding's loss (Zhang et al. 2025), without what exceeds the positive by ``margin``.

    ``memeff`` takes a margin of 0.1 and a temperature of 0.07.

    Args:
        query_query: also each query against the other queries.
        doc_doc: also each query's document against the other documents.
        hard_negatives: also K of each row's own, ``hard`` [M, K, D].
    """
    constants = [("query_query", query_query), ("doc_doc", doc_doc), ("hard", hard_negatives)]

    @cl.define_loss(constants=constants)
    def qwen3(sim, logit_scale, margin):
        limit = cl.at_positive(sim, on=cl.rows) + margin
        keep = ~(sim > limit) | cl.is_positive
        terms = [cl.logsumexp(logit_scale * sim, over=cl.cols, where=keep)]
        if query_query:
            other = cl.similarity(cl.x, cl.x)
            keep = ~(other > limit) & ~cl.is_self
            terms.append(cl.logsumexp(logit_scale * other, over=cl.rows2, where=keep))
        if doc_doc:
            other = cl.similarity(cl.y, cl.y)
            keep = ~(other > cl.at_positive(sim, on=cl.cols) + margin) & ~cl.is_self
            documents = cl.logsumexp(logit_scale * other, over=cl.cols2, where=keep)
            terms.append(cl.at_positive(documents, on=cl.rows))
        if hard_negatives:
            own = cl.similarity(cl.x, cl.operand("hard", (cl.rows, cl.slots)))
            terms.append(cl.logsumexp(logit_scale * own, over=cl.slots, where=~(own > limit)))
        z = reduce(cl.logaddexp, terms)
        return cl.mean(z - cl.at_positive(logit_scale * sim, on=cl.rows), over=cl.rows)

    return qwen3


def gist(
    margin_strategy="absolute", contrast_anchors=True, contrast_positives=True, hard_negatives=False
) -> cl.LossIR:
    """GISTEmbed (Solatorio 2024): what a guide finds closer than the positive is left out.

    Takes ``guide_x`` [M, G] and ``guide_y`` [N, G], unit length, no gradient.
    sentence-transformers takes a temperature of 0.01 and a margin of 0.

    Args:
        margin_strategy: dropped is what exceeds g - margin ("absolute") or g - |g| · margin
            ("relative"), where g is the guide's similarity of the row with its positive.
        contrast_anchors: also each anchor against the other anchors.
        contrast_positives: also each positive against the other positives.
        hard_negatives: whether there are more columns than rows; then contrast_positives takes the
            first M of them once more, as ``positives`` and ``guide_positives``.
    """
    check_word("margin_strategy", margin_strategy, ("absolute", "relative"))
    constants = [
        ("margin_strategy", margin_strategy),
        ("contrast_anchors", contrast_anchors),
        ("contrast_positives", contrast_positives),
        ("hard_negatives", hard_negatives),
    ]

    def limit_of(own, margin):
        return own - (abs(own) * margin if margin_strategy == "relative" else margin)

    @cl.define_loss(constants=constants)
    def gist(sim, logit_scale, margin):
        guide_x = cl.operand("guide_x", cl.rows, stop=True)
        guide_y = cl.operand("guide_y", cl.cols, stop=True)
        guide = cl.similarity(guide_x, guide_y)
        limit = limit_of(cl.at_positive(guide, on=cl.rows), margin)
        s = logit_scale * sim
        keep = ~(guide > limit) | cl.is_positive
        terms = [cl.logsumexp(s, over=cl.cols, where=keep)]

        def others(a, guide_a, limit, over):
            keep = ~(cl.similarity(guide_a, guide_a) > limit) & ~cl.is_self
            return cl.logsumexp(logit_scale * cl.similarity(a, a), over=over, where=keep)

        if contrast_anchors:
            terms.append(others(cl.x, guide_x, limit, cl.rows2))
        if contrast_positives and hard_negatives:
            first = cl.operand("positives", cl.rows)
            guide_first = cl.operand("guide_positives", cl.rows, stop=True)
            terms.append(others(first, guide_first, limit, cl.rows2))
        elif contrast_positives:
            own = limit_of(cl.at_positive(guide, on=cl.cols), margin)
            terms.append(cl.at_positive(others(cl.y, guide_y, own, cl.cols2), on=cl.rows))
        z = reduce(cl.logaddexp, terms)
        return cl.mean(z - cl.at_positive(s, on=cl.rows), over=cl.rows)

    return gist
