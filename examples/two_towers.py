"""Train two towers with open_clip's loss, in chunks that the planner finds for a memory budget.

    python -m examples.two_towers

A transformer reads descriptions, a bag of words reads code; the logit scale is learned and clamped
as in CLIP.  The budget is kept by force.  About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl_compiler import GradientCache
from cl_compiler.integrations.open_clip import ClipLoss
from cl_compiler.units import format_bytes, parse_bytes
from examples.finetune_cached import SmallTransformer
from examples.memory_limit import MemoryLimit, draw
from examples.real_pairs import BUCKETS, real_pairs, recall_at_10, tokens

TEXT_WORDS, CODE_WORDS = 32, 96


class TextTower(SmallTransformer):
    """[n, words] and their mask → [n, dim] of length 1."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        return normalize(super().forward(features)["sentence_embedding"], dim=1)


class CodeTower(nn.Module):
    """A bag of hashed words and a small perceptron → [n, dim] of length 1."""

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(BUCKETS, dim, mode="mean", padding_idx=0)
        self.layers = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        bag = self.words(input_ids)
        return normalize(bag + self.layers(bag), dim=1)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--budget", default="64MiB", help="of live tensors beyond model and batch")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--max-files", type=int, help="of each package; default: all")
    parser.add_argument("--out", type=Path, default=Path("two-towers.svg"))
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    budget = parse_bytes(given.budget)

    train, test = real_pairs(given.max_files)
    test = test[:1000]
    text, code = TextTower(), CodeTower()
    log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    parameters = [*text.parameters(), *code.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
    for parameter in parameters:  # optimiser state is no part of the budget
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    loss = ClipLoss(memory_budget=budget // 4)
    step = GradientCache([text, code], loss, chunk_sizes="auto", memory_budget=budget)
    order = torch.randperm(len(train)).tolist()

    def batch(number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        chosen = [train[order[(number * given.batch + n) % len(train)]] for n in range(given.batch)]
        texts = tokens([pair.text for pair in chosen], TEXT_WORDS)
        return texts, tokens([pair.code for pair in chosen], CODE_WORDS)

    @torch.no_grad()
    def recall() -> float:
        sides = [pair.text for pair in test], [pair.code for pair in test]
        text.eval()
        found = recall_at_10(
            text(**tokens(sides[0], TEXT_WORDS)), code(**tokens(sides[1], CODE_WORDS))
        )
        text.train()
        return found

    print(f"{len(train):,} pairs, batches of {given.batch:,}, budget {format_bytes(budget)}")
    before, losses, batches = recall(), [], [batch(n) for n in range(given.steps)]
    with MemoryLimit(budget) as live:
        for number, (texts, codes) in enumerate(batches):
            optimizer.zero_grad()
            value = step(texts, codes, logit_scale=log_scale.exp().clamp(max=100.0))
            optimizer.step()
            losses.append(value.item())
            if number == 0 and step.plan is not None:
                print(step.plan.explain())
            print(f"step {number + 1}: loss {losses[-1]:.3f}, scale {log_scale.exp():.1f}")
    after = recall()
    draw({"step": live}, budget, given.out)
    print(f"peak {format_bytes(live.peak_bytes)} of {format_bytes(budget)}")
    print(f"recall@10 of {len(test):,} unseen pairs: {before:.1%} before, {after:.1%} after")
    print(f"figure: {given.out}")
    return {
        "first": losses[0],
        "last": losses[-1],
        "before": before,
        "after": after,
        "peak_bytes": live.peak_bytes,
        "limit_bytes": budget,
    }


if __name__ == "__main__":
    main()
