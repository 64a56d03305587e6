"""sentence-transformers' losses: against formulas written out here, and against itself."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.sentence_transformers import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
    dot_score,
    group_code,
)
from cl_compiler.losses.retrieval import DIRECTIONS
from tests.integrations.compare import TextModel, assert_same, texts, unit

ALL = (*DIRECTIONS,)
SUBSETS = [(ALL[0], *more) for n in range(4) for more in combinations(ALL[1:], n)]
MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")


def columns(count: int, rows: int = 7, dim: int = 6):
    """Embeddings of anchors, positives and negatives, of any length."""
    return [unit(rows, dim, seed=n, scale=n + 1.0) for n in range(count)]


def plain(model, *given):
    return [model(dict(features))["sentence_embedding"] for features in given]


def of(loss, embeddings):
    return lambda: loss.compute_loss_from_embeddings(embeddings, None)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_ranking_is_a_cross_entropy_over_all_documents(count):
    leaves = columns(count)

    def formula():
        x, *ys = (normalize(e, dim=1) for e in leaves)
        return cross_entropy(20 * x @ torch.cat(ys).T, torch.arange(len(x)))

    assert_same(of(MultipleNegativesRankingLoss(TextModel(0)), leaves), formula, leaves)


def test_inner_products_where_they_are_asked_for():
    leaves = columns(2)
    loss = MultipleNegativesRankingLoss(TextModel(0), scale=1.0, similarity_fct=dot_score)
    target = torch.arange(7)
    assert_same(of(loss, leaves), lambda: cross_entropy(leaves[0] @ leaves[1].T, target), leaves)


def test_documents_of_ones_own_query_are_no_negatives_of_each_other():
    """Pain 6: with hard negatives a document's own group is left out of doc_to_doc."""
    leaves = columns(3, rows=4)

    def formula():
        q, d, n = (normalize(e, dim=1) for e in leaves)
        docs, own = torch.cat([d, n]), torch.eye(4, dtype=torch.bool).repeat(1, 2)
        logits = torch.cat([20 * q @ docs.T, (20 * d @ docs.T).masked_fill(own, float("-inf"))], 1)
        return cross_entropy(logits, torch.arange(4))

    loss = MultipleNegativesRankingLoss(TextModel(0), directions=("query_to_doc", "doc_to_doc"))
    assert_same(of(loss, leaves), formula, leaves)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_tell_groups_apart_exactly(count, dtype):
    numbers = torch.arange(count)
    left, right = (group_code(numbers, count, of_rows=side).to(dtype) for side in (True, False))
    products = (left @ right.T).float()
    same = torch.eye(count, dtype=torch.bool)
    assert (products[same] == 1).all()
    assert (products[~same] <= -1).all()


# ---- cached -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("count", [2, 4])
def test_cached_is_plain(size, count):
    model, given = TextModel(0), [texts(8, seed=n) for n in range(count)]
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=size)

    def formula():
        x, *ys = (normalize(e, dim=1) for e in plain(model, *given))
        return cross_entropy(20 * x @ torch.cat(ys).T, torch.arange(len(x)))

    assert_same(lambda: loss(given, None), formula, list(model.parameters()))


def test_dropout_two_batches_in_flight_and_a_scaled_backward():
    """Pain 5: a second forward before the first backward, and masks that are drawn once."""
    model = TextModel(0, dropout=0.4)
    batches = [[texts(6, seed=2 * n), texts(6, seed=2 * n + 1)] for n in range(2)]
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)

    def formula():
        total = 0.0
        for columns_ in batches:
            x, y = (
                torch.cat([plain(model, _part(c, a, a + 2))[0] for a in (0, 2, 4)])
                for c in columns_
            )
            s = 20 * normalize(x, dim=1) @ normalize(y, dim=1).T
            total = total + cross_entropy(s, torch.arange(6)) / 3
        return total

    def ours():
        first, second = (loss(columns_, None) for columns_ in batches)
        return (first + second) / 3

    def seeded(function):
        def run():
            torch.manual_seed(11)
            return function()

        return run

    assert_same(seeded(ours), seeded(formula), list(model.parameters()))


def _part(features, start, stop):
    """One mini-batch, its padding cut off: dropout is drawn for what is left."""
    used = int(features["attention_mask"][start:stop].sum(1).max())
    return {name: value[start:stop, :used] for name, value in features.items()}


def test_a_backward_again_is_refused():
    model = TextModel(0)
    value = CachedMultipleNegativesRankingLoss(model)([texts(4, seed=0), texts(4, seed=1)], None)
    value.backward()
    with pytest.raises(ArgumentError, match="backward ran twice"):
        value.backward()


def test_mini_batches_by_tokens_and_no_gradients():
    model, given = TextModel(0), [texts(8, seed=n) for n in range(2)]
    tokens = CachedMultipleNegativesRankingLoss(model, mini_batch_num_tokens=10)
    whole = CachedMultipleNegativesRankingLoss(model, mini_batch_size=100)
    parameters = list(model.parameters())
    assert_same(lambda: tokens(given, None), lambda: whole(given, None), parameters)
    with torch.no_grad():
        value = tokens(given, None)
    assert not value.requires_grad
    torch.testing.assert_close(value, whole(given, None).detach(), rtol=1e-12, atol=0)


def test_a_frozen_model_has_a_loss():
    model = TextModel(0).requires_grad_(False)
    value = CachedMultipleNegativesRankingLoss(model)([texts(4, seed=0), texts(4, seed=1)], None)
    assert value > 0
    assert not value.requires_grad


# ---- what does not fit together -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": ("doc_to_query",)}, "always 'query_to_doc'"),
        ({"directions": ("query_to_doc", "up")}, "use some of"),
        ({"partition_mode": "both"}, "'joint' or 'per_direction'"),
        ({"partition_mode": "per_direction", "directions": ALL}, "without the positive"),
        ({"hardness_mode": "most"}, "hardness_mode='most'"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"similarity_fct": torch.cdist}, "similarity_fct="),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    for kind in (MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss):
        with pytest.raises(ArgumentError, match=message):
            kind(TextModel(0), **options)


def test_packed_features_are_refused():
    packed = {"input_ids": torch.ones(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 9])}
    with pytest.raises(ArgumentError, match="packed into one sequence"):
        CachedMultipleNegativesRankingLoss(TextModel(0))([packed, packed], None)


# ---- beside the peer ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer():
    return pytest.importorskip("sentence_transformers.sentence_transformer.losses")


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("directions", SUBSETS, ids=lambda d: "+".join(d[1:]) or "one")
def test_ranking_is_that_of_sentence_transformers(peer, directions, mode, count):
    options = {"directions": directions, "hardness_mode": mode, "scale": 15.0}
    options["hardness_strength"] = 0.0 if mode is None else 5.0
    leaves = columns(count)
    joint = [{**options, "partition_mode": "joint"}]
    if not {"query_to_query", "doc_to_doc"} & set(directions):
        joint.append({**options, "partition_mode": "per_direction"})
    for given in joint:
        ours = MultipleNegativesRankingLoss(TextModel(0), **given)
        theirs = peer.MultipleNegativesRankingLoss(TextModel(0), **given)
        assert_same(of(ours, leaves), of(theirs, leaves), leaves)
        config = theirs.get_config_dict()
        assert {**ours.get_config_dict(), "similarity_fct": 0} == {**config, "similarity_fct": 0}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("size", [{"mini_batch_size": 3}, {"mini_batch_num_tokens": 12}])
def test_cached_ranking_is_that_of_sentence_transformers(peer, count, size):
    """With dropout: both draw the same masks, mini-batch by mini-batch."""
    model, given = TextModel(0, dropout=0.3), [texts(8, seed=n) for n in range(count)]
    size = {"mini_batch_size": 32, **size}
    losses = [
        kind(model, **size)
        for kind in (CachedMultipleNegativesRankingLoss, peer.CachedMultipleNegativesRankingLoss)
    ]

    def seeded(loss):
        def run():
            torch.manual_seed(2)
            return loss([dict(features) for features in given], None)

        return run

    assert_same(*map(seeded, losses), list(model.parameters()))


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{n}": n for n in range(50)}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("contrast", [(True, True), (True, False), (False, True), (False, False)])
def test_gist_is_that_of_sentence_transformers(peer, tokenizer, contrast, strategy, count):
    """Pain 6: among the guide's similarities of positives some are negative."""
    model, guide = TextModel(0), TextModel(1, dim=4)
    model.tokenizer = guide.tokenizer = tokenizer
    given = [texts(8, seed=n) for n in range(count)]
    own = [normalize(e, dim=1) for e in plain(guide, *given[:2])]
    similarity = (own[0] * own[1]).sum(1)
    assert similarity.min() < 0 < similarity.max()
    options = {"margin_strategy": strategy, "margin": 0.1, "mini_batch_size": 3}
    options |= dict(zip(("contrast_anchors", "contrast_positives"), contrast, strict=True))
    options |= {"temperature": 0.1}
    losses = [
        kind(model, guide, **options) for kind in (CachedGISTEmbedLoss, peer.CachedGISTEmbedLoss)
    ]
    runs = [lambda f=f: f([dict(features) for features in given], None) for f in losses]
    assert_same(*runs, list(model.parameters()))


class _Sized(TextModel):
    """With the one method more that MatryoshkaLoss asks of a model."""

    def get_embedding_dimension(self):
        return 6


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, 0.3]])
def test_matryoshka_loss_goes_around_cached_losses(peer, tokenizer, guided, weights):
    """It shortens the embeddings between the two passes, in ``calculate_loss``."""
    model, guide, given = _Sized(0, dropout=0.3), TextModel(1, dim=4), texts(8, seed=1)
    model.tokenizer = guide.tokenizer = tokenizer
    kinds = [CachedMultipleNegativesRankingLoss, peer.CachedMultipleNegativesRankingLoss]
    options = {"mini_batch_size": 3}
    if guided:
        kinds = [CachedGISTEmbedLoss, peer.CachedGISTEmbedLoss]
        options |= {"guide": guide, "temperature": 0.1, "margin": 0.1}
    losses = [peer.MatryoshkaLoss(model, kind(model, **options), [6, 2], weights) for kind in kinds]
    columns = [given, texts(8, seed=2)]

    def seeded(loss):
        def run():
            torch.manual_seed(2)
            return loss([dict(features) for features in columns], None)

        return run

    assert_same(*map(seeded, losses), list(model.parameters()))


def test_matryoshka_loss_goes_around_the_plain_loss(peer):
    """There it shortens what the model returns."""
    model = _Sized(0)
    columns = [texts(8, seed=n) for n in range(3)]
    runs = []
    for kind in (MultipleNegativesRankingLoss, peer.MultipleNegativesRankingLoss):
        loss = peer.MatryoshkaLoss(model, kind(model), [6, 4, 2])
        runs.append(lambda f=loss: f([dict(features) for features in columns], None))
    assert_same(*runs, list(model.parameters()))
