"""The zoo: every loss of ``docs`` and of the literature that the language should express.

Each entry pairs the loss, written in the language, with a dense float64 formula written by hand
from its paper: the two share no code.  ``cases()`` returns all entries.
"""

from __future__ import annotations

from cl_compiler import losses
from cl_compiler.losses.cross_entropy import clip, infonce
from cl_compiler.losses.further_negatives import hard_negatives
from cl_compiler.losses.retrieval import DIRECTIONS
from cl_compiler.losses.self_supervised import nt_xent
from tests.zoo_case import Case, paired
from tests.zoo_formulas import (
    batch_hard_formula,
    clip_formula,
    col_prior_formula,
    dcl_formula,
    dcl_views_weighted_formula,
    debiased_formula,
    distillation_formula,
    dual_softmax_formula,
    entropy_formula,
    gist_formula,
    gist_relative_formula,
    hard_negatives_formula,
    hard_weighted_formula,
    hardness_formula,
    infonce_formula,
    infonce_pairs_formula,
    label_smoothing_formula,
    matryoshka_formula,
    mnrl_formula,
    moco_formula,
    nt_xent_formula,
    nt_xent_pairs_formula,
    queue_formula,
    qwen3_formula,
    recall_columns_formula,
    recall_formula,
    row_temperature_formula,
    siglip_formula,
    siglip_plus_formula,
    sinkhorn_formula,
    squared_hinge_formula,
    supcon_formula,
    weighted_formula,
)
from tests.zoo_losses import (
    batch_hard,
    col_prior,
    distillation_two_sweeps,
    dual_softmax,
    entropy,
    recall_columns,
    row_temperature,
    sinkhorn,
    squared_hinge,
    weighted,
)

__all__ = ["cases", "clip", "hard_negatives", "infonce", "nt_xent", "weighted"]


def cases() -> tuple[Case, ...]:
    """Every entry; with one positive per row also as many rows as columns."""
    return (*_entries(), *(paired(c) for c in _entries() if c.can_pair))


def _entries() -> tuple[Case, ...]:
    scale, deb = {"logit_scale": 7.0}, {"logit_scale": 3.0, "tau_plus": 0.1}
    sigmoid = {"logit_scale": 7.0, "logit_bias": -3.0}
    ranks = {"tau_rank": 0.3, "tau_k": 0.7}
    smooth = {"logit_scale": 7.0, "eps": 0.1}
    distill = {"logit_scale": 7.0, "teacher_scale": 5.0}
    recall = losses.recall_at_k((1, 2, 4))
    matryoshka = losses.matryoshka((4, 3, 2), (1.0, 0.5, 0.25))
    hardness = losses.mnrl(hardness_mode="all_negatives")
    mnrl_hard = losses.mnrl(DIRECTIONS, "joint", "in_batch_negatives", hard_negatives=True)
    gist_hard = losses.gist("relative", hard_negatives=True)
    qwen3_all = losses.qwen3(query_query=True, doc_doc=True, hard_negatives=True)
    dcl_views = losses.dcl_views_weighted
    two = {"forward": 2, "backward": 2}
    return (
        Case("clip", clip, scale, clip_formula),
        Case("clip_ids", clip, scale, clip_formula, "ids"),
        Case("infonce", infonce, scale, infonce_formula),
        Case("infonce_ids", infonce, scale, infonce_formula, "ids"),
        Case("dcl", losses.dcl, scale, dcl_formula),
        Case("dcl_views", dcl_views, scale, dcl_views_weighted_formula, "views"),
        Case("nt_xent", nt_xent, scale, nt_xent_formula, "views"),
        Case("supcon", nt_xent, scale, supcon_formula, "ids"),
        Case("label_smoothing", losses.label_smoothing, smooth, label_smoothing_formula),
        Case("weighted", weighted, scale, weighted_formula),
        Case(
            "row_temperature",
            row_temperature,
            {},
            row_temperature_formula,
            ranges={"row_scale": (5.0, 9.0)},
        ),
        Case("col_prior", col_prior, scale, col_prior_formula),
        Case("hardness", hardness, {**scale, "hardness_strength": 2.0}, hardness_formula),
        Case("qwen3", losses.qwen3(), {**scale, "margin": 0.1}, qwen3_formula),
        Case("qwen3_all", qwen3_all, {**scale, "margin": 0.1}, qwen3_formula, square=True),
        Case("entropy", entropy, {**scale, "weight": 0.2}, entropy_formula),
        Case("siglip", losses.siglip, sigmoid, siglip_formula, backward=0),
        Case("siglip_ids", losses.siglip, sigmoid, siglip_formula, "ids", backward=0),
        Case("siglip_plus", losses.siglip_plus, sigmoid, siglip_plus_formula, "ids", backward=0),
        Case("squared_hinge", squared_hinge, {"margin": 0.3}, squared_hinge_formula, backward=0),
        Case("batch_hard", batch_hard, {"margin": 0.3}, batch_hard_formula, backward=2),
        Case("recall_at_k", recall, ranks, recall_formula),
        Case("recall_columns", recall_columns, ranks, recall_columns_formula),
        Case("debiased", losses.debiased, deb, debiased_formula),
        Case(
            "debiased_rows",
            losses.debiased_rows,
            {"logit_scale": 3.0},
            debiased_formula,
            ranges={"tau_plus": (0.05, 0.3)},
        ),
        Case("debiased_clamped", losses.debiased, {**deb, "tau_plus": 0.6}, debiased_formula),
        Case("hard_weighted", losses.hard_weighted, {**scale, "beta": 0.5}, hard_weighted_formula),
        Case("hard_negatives", hard_negatives, scale, hard_negatives_formula),
        Case("queue", losses.queue, scale, queue_formula),
        Case("moco", losses.moco, scale, moco_formula),
        Case("own_denominator", losses.nt_xent_pairs, scale, nt_xent_pairs_formula, "ids", 2, 1),
        Case("infonce_pairs", losses.infonce_pairs, scale, infonce_pairs_formula, "ids", 2, 1),
        Case("mnrl_joint", losses.mnrl(DIRECTIONS), scale, mnrl_formula, square=True),
        Case("mnrl_hard", mnrl_hard, {**scale, "hardness_strength": 2.0}, mnrl_formula),
        Case("gist", losses.gist(), {**scale, "margin": 0.1}, gist_formula, square=True),
        Case("gist_relative", gist_hard, {**scale, "margin": 0.1}, gist_relative_formula),
        Case("distillation", losses.distillation, distill, distillation_formula),
        # the student's tile is known in the second sweep, so only the teacher's costs a third
        Case(
            "distillation_two_sweeps",
            distillation_two_sweeps,
            distill,
            distillation_formula,
            forward=2,
        ),
        Case("matryoshka", matryoshka, scale, matryoshka_formula),
        Case("dual_softmax", dual_softmax, {**scale, "beta": 3.0}, dual_softmax_formula, **two),
        Case("sinkhorn", sinkhorn, {"logit_scale": 5.0}, sinkhorn_formula, **two),
    )
