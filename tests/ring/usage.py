"""What ranks do in ``test_samples.py``: run emitted files as their own docstrings say."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

LENGTHS = {"clip-canonical": (512, 256)}
"""Of both ranks, where any will not do."""
ANY = (37, 20)
SCALE = 3.0
CONVENTIONS = {"mean": ("float(P), 1.0", 2.0, 1.0), "sum": ("1.0, 1.0 / P", 1.0, 0.5)}
"""What a docstring gives for it; multiples of a shard's and of a scalar's gradient."""


def follow(rank: int, paths: list[str]) -> dict[str, float]:
    """Of symmetric losses' files and conventions: the worst relative error against float64."""
    torch.set_num_threads(1)
    return {
        f"{Path(path).stem}, {convention}": _one(rank, Path(path), convention)
        for path in paths
        for convention in CONVENTIONS
    }


def _one(rank: int, path: Path, convention: str) -> float:
    source = path.read_text()
    doc = ast.get_docstring(ast.parse(source)) or ""
    code = "\n".join(re.findall(r"^    .+$", doc, re.M))
    scales, of_shards, of_scalars = CONVENTIONS[convention]
    assert scales in doc and f'"{convention}"' in doc
    file: dict[str, Any] = {"__name__": path.stem}
    exec(compile(source, str(path), "exec"), file)

    lengths = LENGTHS.get(path.stem, ANY)
    generator = torch.Generator().manual_seed(len(path.stem))
    whole = [torch.randn(sum(lengths), file["D"], generator=generator) for _ in range(2)]
    whole = [nn.functional.normalize(t, dim=1) for t in whole]
    x, y = (t.split(lengths)[rank].clone().requires_grad_() for t in whole)
    logit_scale = torch.tensor(SCALE, requires_grad=True)
    file |= {
        "group": dist.group.WORLD,
        "second": dist.new_group(),
        "x": x,
        "y": y,
        "logit_scale": logit_scale,
    }
    file |= {f"{axis}{r}": lengths[r] for axis in "MN" for r in (0, 1)}
    file["shard_scale"], file["scalar_scale"] = eval(scales, {"P": 2})
    exec(textwrap.dedent(code), file)

    dense = [t.double().requires_grad_() for t in whole]
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    logits, labels = scale * dense[0] @ dense[1].T, torch.arange(sum(lengths))
    loss = nn.functional.cross_entropy(logits, labels)
    loss = (loss + nn.functional.cross_entropy(logits.T, labels)) / 2
    loss.backward()
    wanted = [loss.detach(), of_scalars * scale.grad]
    wanted += [of_shards * t.grad.split(lengths)[rank] for t in dense]
    found = [file["value"].detach(), logit_scale.grad, x.grad, y.grad]
    return max(
        float((got.double() - want).norm() / want.norm())
        for got, want in zip(found, wanted, strict=True)
    )
