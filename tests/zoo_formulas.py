"""Dense float64 formulas of losses, written by hand from their papers.

They share no code with the losses.  ``t`` are tensors, ``pos`` the positive mask [M, N], ``p`` the
parameters; ``_ce`` is the cross-entropy whose target is spread evenly over a row's positives,
averaged over the rows that have one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


def clip_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t)
    return (_ce(s, pos) + _ce(s.T, pos.T)) / 2


def infonce_formula(t, pos, p):
    return _ce(p["logit_scale"] * _sim(t), pos)


def dcl_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t)
    return (torch.logsumexp(s.masked_fill(pos, NINF), 1) - _at_positive(s, pos)).mean()


def nt_xent_formula(t, pos, p):
    s = (p["logit_scale"] * _sim(t, "z", "z")).masked_fill(_eye(t, "z"), NINF)
    return F.cross_entropy(s, pos.double().argmax(1))


def supcon_formula(t, pos, p):
    return _ce((p["logit_scale"] * _sim(t, "z", "z")).masked_fill(_eye(t, "z"), NINF), pos)


def label_smoothing_formula(t, pos, p):
    log_prob = F.log_softmax(p["logit_scale"] * _sim(t), 1)
    eps = p["eps"]
    return -((1 - eps) * _at_positive(log_prob, pos) + eps * log_prob.mean(1)).mean()


def weighted_formula(t, pos, p):
    log_prob = F.log_softmax(p["logit_scale"] * _sim(t), 1)
    return -(t["weight"] * _at_positive(log_prob, pos)).sum() / t["weight"].sum()


def row_temperature_formula(t, pos, p):
    return _ce(t["row_scale"][:, None] * _sim(t), pos)


def col_prior_formula(t, pos, p):
    return _ce(p["logit_scale"] * _sim(t) + t["log_prior"], pos)


def hardness_formula(t, pos, p):
    s = _sim(t)
    return _ce(p["logit_scale"] * s + p["hardness_strength"] * s.detach() * ~pos, pos)


def entropy_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t)
    prob = torch.softmax(s, 1)
    return _ce(s, pos) + p["weight"] * (prob * prob.log()).sum(1).mean()


def siglip_formula(t, pos, p):
    sign = 2 * pos.double() - 1
    logits = p["logit_scale"] * _sim(t) + p["logit_bias"]
    return -F.logsigmoid(sign * logits).sum() / len(pos)


def siglip_plus_formula(t, pos, p):
    weight = torch.where(pos, 1 / pos.double().sum(1, keepdim=True).clamp(min=1), 1.0)
    logits = p["logit_scale"] * _sim(t) + p["logit_bias"]
    return -(weight * F.logsigmoid((2 * pos.double() - 1) * logits)).sum() / len(pos)


def squared_hinge_formula(t, pos, p):
    s = _sim(t)
    gap = torch.relu(p["margin"] - _at_positive(s, pos)[:, None] + s)
    return (gap**2 * ~pos).sum(1).mean()


def batch_hard_formula(t, pos, p):
    s = _sim(t)
    hardest = s.masked_fill(pos, NINF).amax(1)
    return torch.relu(p["margin"] + hardest - _at_positive(s, pos)).mean()


def recall_formula(t, pos, p):
    s = _sim(t)
    above = torch.sigmoid((s - _at_positive(s, pos)[:, None]) / p["tau_rank"])
    rank = 1 + (above * ~pos).sum(1)
    return sum(torch.sigmoid((rank - k) / p["tau_k"]).mean() for k in (1, 2, 4))


def recall_columns_formula(t, pos, p):
    s = _sim(t)
    above = torch.sigmoid((s - _at_positive(s, pos)[:, None]) / p["tau_rank"])
    return torch.sigmoid(((above * ~pos).sum(0) - 2) / p["tau_k"]).mean()


def debiased_formula(t, pos, p):
    tau, n = (p if "tau_plus" in p else t)["tau_plus"], pos.shape[1] - 1
    e = torch.exp(p["logit_scale"] * _sim(t))
    positive, negative = (e * pos).sum(1), (e * ~pos).sum(1)
    estimate = (negative / n - tau * positive) / (1 - tau)
    z = n * torch.maximum(estimate, torch.exp(-p["logit_scale"]))
    return -torch.log(positive / (positive + z)).mean()


def hard_weighted_formula(t, pos, p):
    s, n = p["logit_scale"] * _sim(t), pos.shape[1] - 1
    importance = torch.exp(p["beta"] * s) * ~pos
    weight = importance / (importance.sum(1, keepdim=True) / n)
    negative = (weight * torch.exp(s) * ~pos).sum(1)
    positive = _at_positive(torch.exp(s), pos)
    return -torch.log(positive / (positive + negative)).mean()


def hard_negatives_formula(t, pos, p):
    own = torch.einsum("id,ikd->ik", t["x"], t["hard"])
    return _ce(p["logit_scale"] * torch.cat([_sim(t), own], 1), pos)


def queue_formula(t, pos, p):
    return _ce(p["logit_scale"] * torch.cat([_sim(t), _sim(t, "x", "queue")], 1), pos)


def distillation_formula(t, pos, p):
    target = torch.softmax(p["teacher_scale"] * _sim(t, "teacher_x", "teacher_y"), 1)
    return -(target * F.log_softmax(p["logit_scale"] * _sim(t), 1)).sum(1).mean()


def matryoshka_formula(t, pos, p):
    total = 0.0
    for prefix, weight in ((4, 1.0), (3, 0.5), (2, 0.25)):
        x, y = (F.normalize(t[k][:, :prefix], dim=1) for k in "xy")
        total = total + weight * _ce(p["logit_scale"] * x @ y.T, pos)
    return total


def dual_softmax_formula(t, pos, p):
    s = _sim(t)
    return _ce(p["logit_scale"] * s * torch.softmax(p["beta"] * s, 0), pos)


def sinkhorn_formula(t, pos, p):
    return torch.logsumexp(F.log_softmax(p["logit_scale"] * _sim(t), 1), 0).mean()


def qwen3_formula(t, pos, p):
    """In batch only, or with other queries, other documents and each row's own negatives."""
    a, eye, s = p["logit_scale"], _eye(t), _sim(t)
    limit = _at_positive(s, pos)[:, None] + p["margin"]
    terms = [(s, (s > limit) & ~pos)]
    if "hard" in t:
        own = torch.einsum("id,ikd->ik", t["x"], t["hard"])
        terms.append((own, own > limit))
        terms += [(m, (m > limit) | eye) for m in (_sim(t, "x", "x"), _sim(t, "y", "y"))]
    return _ce(torch.cat([(a * m).masked_fill(dropped, NINF) for m, dropped in terms], 1), pos)


def nt_xent_pairs_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t, "z", "z")
    lse = torch.logsumexp(s.masked_fill(pos | _eye(t, "z"), NINF), 1, keepdim=True)
    return (torch.logaddexp(s, lse) - s)[pos].mean()


def infonce_pairs_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t)
    lse = torch.logsumexp(s.masked_fill(pos, NINF), 1, keepdim=True)
    return (torch.logaddexp(s, lse) - s)[pos].mean()


def moco_formula(t, pos, p):
    own = _at_positive(_sim(t), pos)[:, None]
    logits = p["logit_scale"] * torch.cat([own, _sim(t, "x", "queue")], 1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def dcl_views_weighted_formula(t, pos, p):
    s = p["logit_scale"] * _sim(t, "z", "z")
    lse = torch.logsumexp(s.masked_fill(pos | _eye(t, "z"), NINF), 1)
    return (lse - t["weight"] * _at_positive(s, pos)).mean()


def mnrl_formula(t, pos, p):
    """All four directions in one softmax; "own" documents by codes where they are given."""
    a, eye, s = p["logit_scale"], _eye(t), _sim(t)
    own = _sim(t, "row_code", "col_code") > 0 if "row_code" in t else pos
    documents = _sim(t, "positives") if "positives" in t else _sim(t, "y")
    raised = p["hardness_strength"] * s.detach() * ~own if "hardness_strength" in p else 0.0
    back = s.T[: len(s)]
    queries = (a * _sim(t, "x", "x")).masked_fill(eye, NINF)
    terms = [a * s + raised, queries, a * back, (a * documents).masked_fill(own, NINF)]
    return (torch.logsumexp(torch.cat(terms, 1), 1) - _at_positive(a * s, pos)).mean()


def _guided(t, p, anchors, bar, positives):
    a, eye = p["logit_scale"], _eye(t)
    terms = [anchors]
    for one, guide in (("x", "guide_x"), (positives, f"guide_{positives}")):
        dropped = (_sim(t, guide, guide) > bar) | eye
        terms.append((a * _sim(t, one, one)).masked_fill(dropped, NINF))
    return torch.cat(terms, 1)


def gist_formula(t, pos, p):
    guide = _sim(t, "guide_x", "guide_y")
    bar = _at_positive(guide, pos)[:, None] - p["margin"]
    anchors = (p["logit_scale"] * _sim(t)).masked_fill((guide > bar) & ~pos, NINF)
    return _ce(_guided(t, p, anchors, bar, "y"), pos)


def gist_relative_formula(t, pos, p):
    """Relative margin, and further columns that are nobody's positive."""
    guide = _sim(t, "guide_x", "guide_y")
    own = _at_positive(guide, pos)[:, None]
    bar = own - own.abs() * p["margin"]
    anchors = (p["logit_scale"] * _sim(t)).masked_fill((guide > bar) & ~pos, NINF)
    return _ce(_guided(t, p, anchors, bar, "positives"), pos)
