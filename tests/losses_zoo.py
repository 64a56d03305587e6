"""The zoo: every loss of ``docs`` and of the literature that the language should express.

Each entry pairs the loss, written in the language, with a dense float64 formula written by hand
from its paper: the two share no code.  ``cases()`` returns all entries.  In the formulas ``t`` are
tensors, ``pos`` the positive mask [M, N], ``p`` the parameters; ``_ce`` is the cross-entropy whose
target is spread evenly over a row's positives, averaged over the rows that have one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_compiler import lang as cl
from tests.zoo_case import Case, paired

NINF = float("-inf")


def _sim(t, left="x", right="y"):
    return t[left] @ t[right].T


def _eye(t, name="x"):
    return torch.eye(t[name].shape[0], dtype=torch.bool)


def _ce(logits: Tensor, pos: Tensor) -> Tensor:
    """``logits`` may have more columns than ``pos`` (further negatives)."""
    k = pos.sum(1)
    log_prob = F.log_softmax(logits, 1)[:, : pos.shape[1]]
    row = -torch.where(pos, log_prob, 0.0).sum(1)[k > 0] / k[k > 0]
    return row.mean()


def _at_positive(values: Tensor, pos: Tensor) -> Tensor:
    return torch.where(pos, values, 0.0).sum(1)


# ---- cross-entropies --------------------------------------------------------------------------


@cl.define_loss
def clip(sim, logit_scale):
    s = logit_scale * sim
    rows = cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)
    cols = cl.mean(cl.logsumexp(s, over=cl.rows) - cl.at_positive(s, on=cl.cols), over=cl.cols)
    return (rows + cols) / 2


def clip_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t)
    return (_ce(s, pos) + _ce(s.T, pos.T)) / 2


@cl.define_loss
def infonce(sim, logit_scale):
    s = logit_scale * sim
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


def infonce_formula(t, pos, p):
    return _ce(p["logit_scale"] * _sim(t), pos)


@cl.define_loss
def dcl(sim, logit_scale):
    s = logit_scale * sim
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_positive)
    return cl.mean(lse - cl.at_positive(s, on=cl.rows), over=cl.rows)


def dcl_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t)
    return (torch.logsumexp(s.masked_fill(pos, NINF), 1) - _at_positive(s, pos)).mean()


@cl.define_loss
def nt_xent(logit_scale):
    s = logit_scale * cl.similarity(cl.z, cl.z)
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_self)
    return cl.mean(lse - cl.at_positive(s, on=cl.rows), over=cl.rows)


def nt_xent_formula(t, pos, p):
    s = (p["logit_scale"] * _sim(t, "z", "z")).masked_fill(_eye(t, "z"), NINF)
    return F.cross_entropy(s, pos.double().argmax(1))


def supcon_formula(t, pos, p):
    return _ce((p["logit_scale"] * _sim(t, "z", "z")).masked_fill(_eye(t, "z"), NINF), pos)


@cl.define_loss
def label_smoothing(sim, logit_scale, eps):
    s = logit_scale * sim
    even = cl.sum(s, over=cl.cols) / cl.size(cl.cols)
    row = cl.logsumexp(s, over=cl.cols) - (1 - eps) * cl.at_positive(s, on=cl.rows) - eps * even
    return cl.mean(row, over=cl.rows)


def label_smoothing_formula(t, pos, p):
    log_prob = F.log_softmax(p["logit_scale"] * _sim(t), 1)
    eps = p["eps"]
    return -((1 - eps) * _at_positive(log_prob, pos) + eps * log_prob.mean(1)).mean()


@cl.define_loss
def weighted(sim, logit_scale):
    s, w = logit_scale * sim, cl.row_input("weight")
    row = w * (cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows))
    return cl.sum(row, over=cl.rows) / cl.sum(w, over=cl.rows)


def weighted_formula(t, pos, p):
    log_prob = F.log_softmax(p["logit_scale"] * _sim(t), 1)
    return -(t["weight"] * _at_positive(log_prob, pos)).sum() / t["weight"].sum()


@cl.define_loss
def row_temperature(sim):
    s = cl.row_input("row_scale") * sim
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


def row_temperature_formula(t, pos, p):
    return _ce(t["row_scale"][:, None] * _sim(t), pos)


@cl.define_loss
def col_prior(sim, logit_scale):
    s = logit_scale * sim + cl.col_input("log_prior")
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


def col_prior_formula(t, pos, p):
    return _ce(p["logit_scale"] * _sim(t) + t["log_prior"], pos)


@cl.define_loss
def hardness(sim, logit_scale, alpha):
    s = logit_scale * sim + cl.where(cl.is_positive, 0, alpha * cl.stop_gradient(sim))
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


def hardness_formula(t, pos, p):
    s = _sim(t)
    return _ce(p["logit_scale"] * s + p["alpha"] * s.detach() * ~pos, pos)


@cl.define_loss
def qwen3(sim, logit_scale, margin):
    s = logit_scale * sim
    too_close = (sim > cl.at_positive(sim, on=cl.rows) + margin) & ~cl.is_positive
    lse = cl.logsumexp(s, over=cl.cols, where=~too_close)
    return cl.mean(lse - cl.at_positive(s, on=cl.rows), over=cl.rows)


def qwen3_formula(t, pos, p):
    s = _sim(t)
    drop = (s > _at_positive(s, pos)[:, None] + p["margin"]) & ~pos
    return _ce((p["logit_scale"] * s).masked_fill(drop, NINF), pos)


@cl.define_loss
def entropy(sim, logit_scale, weight):
    s = logit_scale * sim
    lse = cl.logsumexp(s, over=cl.cols)
    row_entropy = lse - cl.softmean(s, s, over=cl.cols)
    cross = cl.mean(lse - cl.at_positive(s, on=cl.rows), over=cl.rows)
    return cross - weight * cl.mean(row_entropy, over=cl.rows)


def entropy_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t)
    prob = torch.softmax(s, 1)
    return _ce(s, pos) + p["weight"] * (prob * prob.log()).sum(1).mean()


# ---- pairwise losses --------------------------------------------------------------------------


@cl.define_loss
def siglip(sim, logit_scale, logit_bias):
    sign = 2 * cl.is_positive - 1
    pairs = cl.softplus(-sign * (logit_scale * sim + logit_bias))
    return cl.sum(cl.sum(pairs, over=cl.cols), over=cl.rows) / cl.size(cl.rows)


def siglip_formula(t, pos, p):
    sign = 2 * pos.double() - 1
    logits = p["logit_scale"] * _sim(t) + p["logit_bias"]
    return -F.logsigmoid(sign * logits).sum() / len(pos)


@cl.define_loss
def siglip_plus(sim, logit_scale, logit_bias):
    k = cl.count(over=cl.cols, where=cl.is_positive)
    sign = 2 * cl.is_positive - 1
    pairs = cl.softplus(-sign * (logit_scale * sim + logit_bias))
    pairs = cl.where(cl.is_positive, pairs / k, pairs)
    return cl.sum(cl.sum(pairs, over=cl.cols), over=cl.rows) / cl.size(cl.rows)


def siglip_plus_formula(t, pos, p):
    weight = torch.where(pos, 1 / pos.double().sum(1, keepdim=True).clamp(min=1), 1.0)
    logits = p["logit_scale"] * _sim(t) + p["logit_bias"]
    return -(weight * F.logsigmoid((2 * pos.double() - 1) * logits)).sum() / len(pos)


@cl.define_loss
def squared_hinge(sim, margin):
    gap = cl.relu(margin - cl.at_positive(sim, on=cl.rows) + sim)
    return cl.mean(cl.sum(gap**2, over=cl.cols, where=~cl.is_positive), over=cl.rows)


def squared_hinge_formula(t, pos, p):
    s = _sim(t)
    gap = torch.relu(p["margin"] - _at_positive(s, pos)[:, None] + s)
    return (gap**2 * ~pos).sum(1).mean()


@cl.define_loss
def batch_hard(sim, margin):
    hardest = cl.max(sim, over=cl.cols, where=~cl.is_positive)
    return cl.mean(cl.relu(margin + hardest - cl.at_positive(sim, on=cl.rows)), over=cl.rows)


def batch_hard_formula(t, pos, p):
    s = _sim(t)
    hardest = s.masked_fill(pos, NINF).amax(1)
    return torch.relu(p["margin"] + hardest - _at_positive(s, pos)).mean()


def recall_at_k(ks: tuple[int, ...]):
    @cl.define_loss(constants=[("ks", ks)])
    def recall(sim, tau_rank, tau_k):
        above = cl.sigmoid((sim - cl.at_positive(sim, on=cl.rows)) / tau_rank)
        rank = 1 + cl.sum(above, over=cl.cols, where=~cl.is_positive)
        return sum(cl.mean(cl.sigmoid((rank - k) / tau_k), over=cl.rows) for k in ks)

    return recall


def recall_formula(t, pos, p):
    s = _sim(t)
    above = torch.sigmoid((s - _at_positive(s, pos)[:, None]) / p["tau_rank"])
    rank = 1 + (above * ~pos).sum(1)
    return sum(torch.sigmoid((rank - k) / p["tau_k"]).mean() for k in (1, 2, 4))


@cl.define_loss
def recall_columns(sim, tau_rank, tau_k):
    above = cl.sigmoid((sim - cl.at_positive(sim, on=cl.rows)) / tau_rank)
    rank = cl.sum(above, over=cl.rows, where=~cl.is_positive)
    return cl.mean(cl.sigmoid((rank - 2) / tau_k), over=cl.cols)


def recall_columns_formula(t, pos, p):
    s = _sim(t)
    above = torch.sigmoid((s - _at_positive(s, pos)[:, None]) / p["tau_rank"])
    return torch.sigmoid(((above * ~pos).sum(0) - 2) / p["tau_k"]).mean()


# ---- debiased and hard negatives --------------------------------------------------------------


@cl.define_loss
def debiased(sim, logit_scale, tau_plus):
    s = logit_scale * sim
    p, n = cl.at_positive(s, on=cl.rows), cl.size(cl.cols) - 1
    negatives = cl.logsumexp(s, over=cl.cols, where=~cl.is_positive) - cl.log(n)
    floor = cl.log(1 - tau_plus) - logit_scale
    z = cl.logsubexp(negatives, cl.log(tau_plus) + p, floor) - cl.log(1 - tau_plus) + cl.log(n)
    return cl.mean(cl.logaddexp(p, z) - p, over=cl.rows)


def debiased_formula(t, pos, p):
    tau, n = p["tau_plus"], pos.shape[1] - 1
    e = torch.exp(p["logit_scale"] * _sim(t))
    positive, negative = (e * pos).sum(1), (e * ~pos).sum(1)
    estimate = (negative / n - tau * positive) / (1 - tau)
    z = n * torch.maximum(estimate, torch.exp(-p["logit_scale"]))
    return -torch.log(positive / (positive + z)).mean()


@cl.define_loss
def hard_weighted(sim, logit_scale, beta):
    s = logit_scale * sim
    p, n = cl.at_positive(s, on=cl.rows), cl.size(cl.cols) - 1
    tilted = cl.logsumexp((1 + beta) * s, over=cl.cols, where=~cl.is_positive)
    normaliser = cl.logsumexp(beta * s, over=cl.cols, where=~cl.is_positive)
    return cl.mean(cl.logaddexp(p, tilted - normaliser + cl.log(n)) - p, over=cl.rows)


def hard_weighted_formula(t, pos, p):
    s, n = p["logit_scale"] * _sim(t), pos.shape[1] - 1
    importance = torch.exp(p["beta"] * s) * ~pos
    weight = importance / (importance.sum(1, keepdim=True) / n)
    negative = (weight * torch.exp(s) * ~pos).sum(1)
    positive = _at_positive(torch.exp(s), pos)
    return -torch.log(positive / (positive + negative)).mean()


@cl.define_loss
def hard_negatives(sim, logit_scale):
    own = logit_scale * cl.similarity(cl.x, cl.operand("hard", (cl.rows, cl.slots)))
    s = logit_scale * sim
    z = cl.logaddexp(cl.logsumexp(s, over=cl.cols), cl.logsumexp(own, over=cl.slots))
    return cl.mean(z - cl.at_positive(s, on=cl.rows), over=cl.rows)


def hard_negatives_formula(t, pos, p):
    own = torch.einsum("id,ikd->ik", t["x"], t["hard"])
    return _ce(p["logit_scale"] * torch.cat([_sim(t), own], 1), pos)


@cl.define_loss
def queue(sim, logit_scale):
    old = logit_scale * cl.similarity(cl.x, cl.operand("queue", cl.bank, stop=True))
    s = logit_scale * sim
    z = cl.logaddexp(cl.logsumexp(s, over=cl.cols), cl.logsumexp(old, over=cl.bank))
    return cl.mean(z - cl.at_positive(s, on=cl.rows), over=cl.rows)


def queue_formula(t, pos, p):
    return _ce(p["logit_scale"] * torch.cat([_sim(t), _sim(t, "x", "queue")], 1), pos)


@cl.define_loss
def own_denominator(logit_scale):
    s = logit_scale * cl.similarity(cl.z, cl.z)
    lse = cl.logsumexp(s, over=cl.cols, where=~cl.is_positive & ~cl.is_self)
    total = cl.sum(cl.sum(cl.softplus(lse - s), over=cl.cols, where=cl.is_positive), over=cl.rows)
    return total / cl.sum(cl.count(over=cl.cols, where=cl.is_positive), over=cl.rows)


def own_denominator_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t, "z", "z")
    lse = torch.logsumexp(s.masked_fill(pos | _eye(t, "z"), NINF), 1, keepdim=True)
    return (torch.logaddexp(s, lse) - s)[pos].mean()


# ---- several similarity matrices --------------------------------------------------------------


@cl.define_loss
def mnrl_joint(sim, logit_scale):
    s = logit_scale * sim
    queries = cl.logsumexp(
        logit_scale * cl.similarity(cl.x, cl.x), over=cl.rows2, where=~cl.is_self
    )
    documents = cl.logsumexp(
        logit_scale * cl.similarity(cl.y, cl.y), over=cl.cols2, where=~cl.is_self
    )
    back = cl.logsumexp(s, over=cl.rows, where=~cl.is_positive)
    on_cols = cl.at_positive(cl.logaddexp(back, documents), on=cl.rows)
    z = cl.logaddexp(cl.logaddexp(cl.logsumexp(s, over=cl.cols), queries), on_cols)
    return cl.mean(z - cl.at_positive(s, on=cl.rows), over=cl.rows)


def mnrl_joint_formula(t, pos, p):
    a, eye = p["logit_scale"], _eye(t)
    terms = (_sim(t).T, _sim(t, "x", "x"), _sim(t, "y", "y"))
    masked = [(a * term).masked_fill(eye, NINF) for term in terms]
    return _ce(torch.cat([a * _sim(t), *masked], 1), pos)


@cl.define_loss
def gist(sim, logit_scale, margin):
    guide_x = cl.operand("guide_x", cl.rows, stop=True)
    guide_y = cl.operand("guide_y", cl.cols, stop=True)
    guide = cl.similarity(guide_x, guide_y)
    own_row, own_col = (cl.at_positive(guide, on=axis) for axis in (cl.rows, cl.cols))
    s = logit_scale * sim
    keep = ~(guide > own_row - margin) | cl.is_positive
    xy = cl.logsumexp(s, over=cl.cols, where=keep)
    keep = ~(cl.similarity(guide_x, guide_x) > own_row - margin) & ~cl.is_self
    xx = cl.logsumexp(logit_scale * cl.similarity(cl.x, cl.x), over=cl.rows2, where=keep)
    keep = ~(cl.similarity(guide_y, guide_y) > own_col - margin) & ~cl.is_self
    yy = cl.logsumexp(logit_scale * cl.similarity(cl.y, cl.y), over=cl.cols2, where=keep)
    z = cl.logaddexp(cl.logaddexp(xy, xx), cl.at_positive(yy, on=cl.rows))
    return cl.mean(z - cl.at_positive(s, on=cl.rows), over=cl.rows)


def gist_formula(t, pos, p):
    a, eye = p["logit_scale"], _eye(t)
    guide = _sim(t, "guide_x", "guide_y")
    bar = _at_positive(guide, pos)[:, None] - p["margin"]
    xy = (a * _sim(t)).masked_fill((guide > bar) & ~pos, NINF)
    xx = (a * _sim(t, "x", "x")).masked_fill((_sim(t, "guide_x", "guide_x") > bar) | eye, NINF)
    yy = (a * _sim(t, "y", "y")).masked_fill((_sim(t, "guide_y", "guide_y") > bar) | eye, NINF)
    return _ce(torch.cat([xy, xx, yy], 1), pos)


def _teacher():
    return cl.similarity(cl.operand("teacher_x", cl.rows), cl.operand("teacher_y", cl.cols))


@cl.define_loss
def distillation(sim, logit_scale, teacher_scale):
    s = logit_scale * sim
    target = cl.softmean(s, teacher_scale * _teacher(), over=cl.cols)
    return cl.mean(cl.logsumexp(s, over=cl.cols) - target, over=cl.rows)


def distillation_formula(t, pos, p):
    target = torch.softmax(p["teacher_scale"] * _sim(t, "teacher_x", "teacher_y"), 1)
    return -(target * F.log_softmax(p["logit_scale"] * _sim(t), 1)).sum(1).mean()


@cl.define_loss
def distillation_two_sweeps(sim, logit_scale, teacher_scale):
    s, teacher = logit_scale * sim, teacher_scale * _teacher()
    prob = cl.exp(teacher - cl.logsumexp(teacher, over=cl.cols))
    row = cl.logsumexp(s, over=cl.cols) - cl.sum(prob * s, over=cl.cols)
    return cl.mean(row, over=cl.rows)


def matryoshka_of(prefixes: tuple[int, ...], weights: tuple[float, ...]):
    @cl.define_loss(constants=[("prefixes", prefixes), ("weights", weights)])
    def matryoshka(logit_scale):
        total = 0
        for prefix, weight in zip(prefixes, weights, strict=True):
            x, y = cl.x[:prefix], cl.y[:prefix]
            s = logit_scale * cl.similarity(x, y) / (cl.norm(x) * cl.norm(y))
            row = cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows)
            total = total + weight * cl.mean(row, over=cl.rows)
        return total

    return matryoshka


def matryoshka_formula(t, pos, p):
    total = 0.0
    for prefix, weight in ((4, 1.0), (3, 0.5), (2, 0.25)):
        x, y = (F.normalize(t[k][:, :prefix], dim=1) for k in "xy")
        total = total + weight * _ce(p["logit_scale"] * x @ y.T, pos)
    return total


# ---- statistics inside statistics -------------------------------------------------------------


@cl.define_loss
def dual_softmax(sim, logit_scale, beta):
    prior = cl.exp(beta * sim - cl.logsumexp(beta * sim, over=cl.rows))
    s = logit_scale * sim * prior
    return cl.mean(cl.logsumexp(s, over=cl.cols) - cl.at_positive(s, on=cl.rows), over=cl.rows)


def dual_softmax_formula(t, pos, p):
    s = _sim(t)
    return _ce(p["logit_scale"] * s * torch.softmax(p["beta"] * s, 0), pos)


@cl.define_loss
def sinkhorn(sim, logit_scale):
    s = logit_scale * sim
    scaled = s - cl.logsumexp(s, over=cl.cols)
    return cl.mean(cl.logsumexp(scaled, over=cl.rows), over=cl.cols)


def sinkhorn_formula(t, pos, p):
    return torch.logsumexp(F.log_softmax(p["logit_scale"] * _sim(t), 1), 0).mean()


def cases() -> tuple[Case, ...]:
    """Every entry; with one positive per row also as many rows as columns."""
    return (*_entries(), *(paired(c) for c in _entries() if c.can_pair))


def _entries() -> tuple[Case, ...]:
    scale, deb = {"logit_scale": 7.0}, {"logit_scale": 3.0, "tau_plus": 0.1}
    sigmoid = {"logit_scale": 7.0, "logit_bias": -3.0}
    ranks = {"tau_rank": 0.3, "tau_k": 0.7}
    distill = {"logit_scale": 7.0, "teacher_scale": 5.0}
    recall = recall_at_k((1, 2, 4))
    matryoshka = matryoshka_of((4, 3, 2), (1.0, 0.5, 0.25))
    two = {"forward": 2, "backward": 2}
    return (
        Case("clip", clip, scale, clip_formula),
        Case("clip_ids", clip, scale, clip_formula, "ids"),
        Case("infonce", infonce, scale, infonce_formula),
        Case("infonce_ids", infonce, scale, infonce_formula, "ids"),
        Case("dcl", dcl, scale, dcl_formula),
        Case("nt_xent", nt_xent, scale, nt_xent_formula, "views"),
        Case("supcon", nt_xent, scale, supcon_formula, "ids"),
        Case("label_smoothing", label_smoothing, {**scale, "eps": 0.1}, label_smoothing_formula),
        Case("weighted", weighted, scale, weighted_formula),
        Case(
            "row_temperature",
            row_temperature,
            {},
            row_temperature_formula,
            ranges={"row_scale": (5.0, 9.0)},
        ),
        Case("col_prior", col_prior, scale, col_prior_formula),
        Case("hardness", hardness, {**scale, "alpha": 2.0}, hardness_formula),
        Case("qwen3", qwen3, {**scale, "margin": 0.1}, qwen3_formula),
        Case("entropy", entropy, {**scale, "weight": 0.2}, entropy_formula),
        Case("siglip", siglip, sigmoid, siglip_formula, backward=0),
        Case("siglip_ids", siglip, sigmoid, siglip_formula, "ids", backward=0),
        Case("siglip_plus", siglip_plus, sigmoid, siglip_plus_formula, "ids", backward=0),
        Case("squared_hinge", squared_hinge, {"margin": 0.3}, squared_hinge_formula, backward=0),
        Case("batch_hard", batch_hard, {"margin": 0.3}, batch_hard_formula, backward=2),
        Case("recall_at_k", recall, ranks, recall_formula),
        Case("recall_columns", recall_columns, ranks, recall_columns_formula),
        Case("debiased", debiased, deb, debiased_formula),
        Case("debiased_clamped", debiased, {**deb, "tau_plus": 0.6}, debiased_formula),
        Case("hard_weighted", hard_weighted, {**scale, "beta": 0.5}, hard_weighted_formula),
        Case("hard_negatives", hard_negatives, scale, hard_negatives_formula),
        Case("queue", queue, scale, queue_formula),
        Case("own_denominator", own_denominator, scale, own_denominator_formula, "ids", 2, 1),
        Case("mnrl_joint", mnrl_joint, scale, mnrl_joint_formula, square=True),
        Case("gist", gist, {**scale, "margin": 0.1}, gist_formula, square=True),
        Case("distillation", distillation, distill, distillation_formula),
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
