"""sentence-transformers' ranking losses, plain and cached, without their score matrices.

    from cl_compiler.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss
    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)

Names, arguments, defaults and returns are those of sentence-transformers 6; pass arguments by
keyword, their order differs between its versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl_compiler.errors import ArgumentError
from cl_compiler.integrations.compiled import Compiled, MemoryBudget, check_budget
from cl_compiler.integrations.ranks import OfRanks, shards_of, world_size
from cl_compiler.integrations.replay import encode_columns, evaluated, mini_batches, replayed
from cl_compiler.losses.false_negatives import gist
from cl_compiler.losses.retrieval import DIRECTIONS, mnrl

__all__ = ["CachedGISTEmbedLoss", "CachedMultipleNegativesRankingLoss"]
__all__ += ["MultipleNegativesRankingLoss", "cos_sim", "dot_score"]

Features = Iterable[dict[str, Any]]
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """Marks cosine similarity, as sentence_transformers.util.cos_sim does."""
    return normalize(a, dim=1) @ normalize(b, dim=1).T


def dot_score(a: Tensor, b: Tensor) -> Tensor:
    """Marks inner products, as sentence_transformers.util.dot_score does."""
    return a @ b.T


class MultipleNegativesRankingLoss(nn.Module):
    """InfoNCE of (anchor, positive, negative …) with in-batch negatives.

    Args:
        model: features -> {"sentence_embedding": [b, D]}.
        scale: multiplies the similarities.
        similarity_fct: cos_sim or dot_score, sentence-transformers' or the ones here.
        gather_across_devices: the loss of all ranks' batches together, on every rank.
        directions: see ``cl_compiler.losses.mnrl``.
        partition_mode: "joint" or "per_direction".
        hardness_mode: None, "in_batch_negatives", "hard_negatives" or "all_negatives".
        hardness_strength: of the penalty, in units of similarity.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.

    Raises:
        ArgumentError: arguments that do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        memory_budget: MemoryBudget = None,
    ) -> None:
        super().__init__()
        _check_ranking(scale, directions, partition_mode, hardness_mode, hardness_strength)
        if getattr(similarity_fct, "__name__", "") not in ("cos_sim", "dot_score"):
            raise ArgumentError(
                f"similarity_fct={similarity_fct!r}: compiled are cos_sim and dot_score; for "
                "another one use sentence-transformers' loss."
            )
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength
        check_budget(memory_budget)
        self.memory_budget = memory_budget
        self._compiled: dict[tuple[bool, bool], Compiled | OfRanks] = {}

    @property
    def temperature(self) -> float:
        return 1.0 / self.scale

    def forward(self, sentence_features: Features, labels: Tensor | None = None) -> Tensor:
        """The loss of one batch; labels are not used."""
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: Sequence[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        """The loss of anchors, positives and any number of negatives, [b, D] each."""
        if len(embeddings) < 2:
            raise ArgumentError(f"{len(embeddings)} columns: anchors and positives are needed.")
        cosine = getattr(self.similarity_fct, "__name__", "") == "cos_sim"
        queries, *documents = (normalize(e, dim=1) if cosine else e for e in embeddings)
        arguments: dict[str, Any] = {}
        together = self.gather_across_devices and world_size() > 1
        hard = len(documents) > 1
        loss = self._compiled.get((hard, together))
        if loss is None:
            mode = self.hardness_mode if self.hardness_strength > 0 else None
            ir = mnrl(self.directions, self.partition_mode, mode, hard)
            loss = (OfRanks if together else Compiled)(ir, self.memory_budget)
            self._compiled[hard, together] = loss
        needed = {op.name for op in loss.loss.operands} | set(loss.loss.parameters)  # type: ignore[union-attr]
        if "row_code" in needed:
            first, count = 0, queries.shape[0]
            if together:
                shards = shards_of(queries)
                first, count = shards.start, shards.total
            own = torch.arange(first, first + len(queries), device=queries.device)
            every = own.repeat(len(documents))
            arguments["row_code"] = group_code(own, count, of_rows=True).to(queries)
            arguments["col_code"] = group_code(every, count, of_rows=False).to(queries)
        if "positives" in needed:
            arguments["positives"] = documents[0]
        if "hardness_strength" in needed:
            arguments["hardness_strength"] = self.hardness_strength
        documents_in_one = documents[0] if len(documents) == 1 else torch.cat(documents)
        value: Tensor = loss(queries, documents_in_one, logit_scale=self.scale, **arguments)
        return value

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        return {
            "scale": self.scale,
            "similarity_fct": getattr(self.similarity_fct, "__name__", ""),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }


def _check_ranking(
    scale: float, directions: Sequence[str], partition: str, hardness: str | None, strength: float
) -> None:
    unknown = set(directions) - set(DIRECTIONS)
    if unknown or "query_to_doc" not in directions:
        raise ArgumentError(
            f"directions={tuple(directions)}: use some of {', '.join(DIRECTIONS)}, and always "
            "'query_to_doc', which has the positive."
        )
    if partition not in ("joint", "per_direction"):
        raise ArgumentError(f"partition_mode={partition!r}: use 'joint' or 'per_direction'.")
    if partition == "per_direction" and set(directions) & {"query_to_query", "doc_to_doc"}:
        raise ArgumentError(
            "partition_mode='per_direction' with 'query_to_query' or 'doc_to_doc': a softmax "
            "without the positive has no loss. Use 'joint'."
        )
    if hardness not in HARDNESS:
        raise ArgumentError(f"hardness_mode={hardness!r}: use one of {HARDNESS}.")
    if not scale > 0 or strength < 0:
        raise ArgumentError(
            f"scale={scale}, hardness_strength={strength}: the one must be positive, the other not "
            "negative."
        )


def group_code(numbers: Tensor, count: int, *, of_rows: bool) -> Tensor:
    """[n, bits + 1] of small integers: the product of a row's with a column's is 1 where their
    numbers are equal, and at most -1 where not; exact in every floating-point type.

    Args:
        numbers: [n], each less than ``count``.
        count: of groups.
        of_rows: the left or the right side of the product.
    """
    bits = max(1, (count - 1).bit_length())
    ones = 2 * ((numbers[:, None] >> torch.arange(bits, device=numbers.device)) & 1) - 1
    last = torch.full_like(ones[:, :1], 1 if of_rows else 1 - bits)
    return torch.cat([ones, last], 1)


class _Cached(nn.Module):
    """The first and the second pass in mini-batches; the backward of the result is the second."""

    uses_gradient_cache = True

    def __init__(
        self,
        model: nn.Module,
        mini_batch_size: int,
        mini_batch_num_tokens: int | None,
        show_progress_bar: bool,
    ) -> None:
        super().__init__()
        if mini_batch_num_tokens is not None and mini_batch_num_tokens < 1:
            raise ArgumentError(f"mini_batch_num_tokens={mini_batch_num_tokens}: at least 1.")
        self.model = model
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def _batches(self, sentence_features: Features) -> list[list[dict[str, Any]]]:
        return [
            mini_batches(features, self.mini_batch_size, self.mini_batch_num_tokens)
            for features in sentence_features
        ]

    def _embed(self, features: dict[str, Any]) -> Tensor:
        embedding: Tensor = self.model(dict(features))["sentence_embedding"]
        return embedding


class CachedMultipleNegativesRankingLoss(_Cached):
    """The same loss, with the graph of one mini-batch at a time.

    The returned loss's ``backward`` encodes again and leaves the parameters' gradients.

    Args:
        model: features -> {"sentence_embedding": [b, D]}.
        scale: multiplies the similarities.
        similarity_fct: cos_sim or dot_score.
        mini_batch_size: samples per encoding.
        mini_batch_num_tokens: instead, tokens that are not padding.
        gather_across_devices: the loss of all ranks' batches together, on every rank.
        directions: as in the plain loss.
        partition_mode: as in the plain loss.
        show_progress_bar: over the first pass.
        hardness_mode: as in the plain loss.
        hardness_strength: as in the plain loss.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        memory_budget: MemoryBudget = None,
    ) -> None:
        super().__init__(model, mini_batch_size, mini_batch_num_tokens, show_progress_bar)
        self.loss = MultipleNegativesRankingLoss(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
            memory_budget=memory_budget,
        )

    @property
    def scale(self) -> float:
        return self.loss.scale

    def forward(self, sentence_features: Features, labels: Tensor | None = None) -> Tensor:
        """The loss of one batch; labels are not used."""
        batches = self._batches(sentence_features)
        columns = encode_columns(self._embed, batches, progress=self.show_progress_bar)
        return replayed(columns, self.model, self.calculate_loss)

    def calculate_loss(
        self, reps: Sequence[Sequence[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """The loss of each column's mini-batches; MatryoshkaLoss puts shortened ones in between.

        Args:
            reps: embeddings [b, D] of the mini-batches of anchors, of positives, of negatives.
            with_backward: also leave the gradients of ``reps``, and return the value alone.
        """
        value = self.loss.compute_loss_from_embeddings([torch.cat(list(parts)) for parts in reps])
        return evaluated(value, with_backward=with_backward)

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        more = {"mini_batch_size", "mini_batch_num_tokens"}
        return {**self.loss.get_config_dict(), **{name: getattr(self, name) for name in more}}


class CachedGISTEmbedLoss(_Cached):
    """A guide drops false negatives; the graph of one mini-batch at a time.

    Args:
        model: features -> {"sentence_embedding": [b, D]}, with a tokenizer.
        guide: the same; it never trains.
        temperature: similarities are divided by it.
        mini_batch_size: samples per encoding.
        mini_batch_num_tokens: instead, tokens that are not padding.
        show_progress_bar: over the first pass.
        margin_strategy: "absolute" or "relative".
        margin: how much closer than the positive a negative may be to the guide.
        contrast_anchors: also anchors against anchors.
        contrast_positives: also positives against positives.
        gather_across_devices: the loss of all ranks' batches together, on every rank; anchors, too,
            are contrasted with those of all ranks.
        memory_budget: of the loss on this device; by default in proportion to the embeddings.

    Raises:
        ArgumentError: an unknown strategy, or models without tokenizers.
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        temperature: float = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: str = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
        *,
        memory_budget: MemoryBudget = None,
    ) -> None:
        super().__init__(model, mini_batch_size, mini_batch_num_tokens, show_progress_bar)
        if margin_strategy not in ("absolute", "relative"):
            raise ArgumentError(f"margin_strategy={margin_strategy!r}: 'absolute' or 'relative'.")
        self.guide = guide
        self.temperature = temperature
        self.margin_strategy = margin_strategy
        self.margin = margin
        self.contrast_anchors = contrast_anchors
        self.contrast_positives = contrast_positives
        self.gather_across_devices = gather_across_devices
        self.must_retokenize = _differs(model, guide)
        self._compiled = {
            (hard, kind is OfRanks): kind(
                gist(margin_strategy, contrast_anchors, contrast_positives, hard), memory_budget
            )
            for hard in (False, True)
            for kind in (Compiled, OfRanks)
        }

    def forward(self, sentence_features: Features, labels: Tensor | None = None) -> Tensor:
        """The loss of one batch; labels are not used."""
        batches = self._batches(sentence_features)
        columns = encode_columns(self._embed, batches, progress=self.show_progress_bar)
        guides = [[self._guide(part) for part in column] for column in batches]

        def loss_of(reps: Sequence[Sequence[Tensor]], *, with_backward: bool) -> Tensor:
            return self.calculate_loss(reps, guides, with_backward=with_backward)

        return replayed(columns, self.model, loss_of)

    def calculate_loss(
        self,
        reps: Sequence[Sequence[Tensor]],
        reps_guided: Sequence[Sequence[Tensor]],
        *,
        with_backward: bool = False,
    ) -> Tensor:
        """The loss of each column's mini-batches; MatryoshkaLoss puts shortened ones in between.

        Args:
            reps: embeddings [b, D] of the mini-batches of anchors, of positives, of negatives.
            reps_guided: the guide's, [b, G].
            with_backward: also leave the gradients of ``reps``, and return the value alone.
        """
        x, *candidates = (normalize(torch.cat(list(parts)), dim=1) for parts in reps)
        guide_x, *guide_candidates = (
            normalize(torch.cat(list(parts)), dim=1) for parts in reps_guided
        )
        hard, together = len(candidates) > 1, self.gather_across_devices and world_size() > 1
        arguments = {}
        if hard and self.contrast_positives:
            arguments = {"positives": candidates[0], "guide_positives": guide_candidates[0]}
        value: Tensor = self._compiled[hard, together](
            x,
            torch.cat(candidates) if hard else candidates[0],
            guide_x=guide_x,
            guide_y=torch.cat(guide_candidates) if hard else guide_candidates[0],
            logit_scale=1 / self.temperature,
            margin=self.margin,
            **arguments,
        )
        return evaluated(value, with_backward=with_backward)

    @torch.no_grad()
    def _guide(self, features: dict[str, Any]) -> Tensor:
        if self.must_retokenize:
            tokenizer: Any = self.model.tokenizer
            texts = tokenizer.batch_decode(features["input_ids"], skip_special_tokens=True)
            guide: Any = self.guide
            again = (
                guide.preprocess(texts) if hasattr(guide, "preprocess") else guide.tokenize(texts)
            )
            device = features["input_ids"].device
            features = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in again.items()}
        embedding: Tensor = self.guide(dict(features))["sentence_embedding"]
        return embedding

    def get_config_dict(self) -> dict[str, Any]:
        """What a model card says of the loss."""
        names = "guide temperature mini_batch_size margin_strategy margin"
        names += " contrast_anchors contrast_positives gather_across_devices"
        return {name: getattr(self, name) for name in names.split()}


def _differs(model: Any, guide: Any) -> bool:
    """Whether the guide reads other tokens than the model, or fewer."""
    if not hasattr(model, "tokenizer") or not hasattr(guide, "tokenizer"):
        raise ArgumentError("model and guide must both have a tokenizer.")
    same: bool = model.tokenizer.get_vocab() == guide.tokenizer.get_vocab()
    return not same or bool(guide.max_seq_length < model.max_seq_length)
