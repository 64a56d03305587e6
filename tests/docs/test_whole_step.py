"""The page's code runs as it is printed, and leaves the gradients that it promises."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "whole_step.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def plain_gradients(names: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of a step that keeps all graphs; dropout is off or seeded as in the page's."""
    x = torch.cat([names["image_encoder"](part) for part in names["images"].split(64)])
    y = names["text_encoder"](names["texts"])
    logits, target = names["log_scale"].exp() * x @ y.T, torch.arange(len(x))
    cross_entropy = torch.nn.functional.cross_entropy
    value = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
    return value.detach(), torch.autograd.grad(value, names["parameters"])


def test_the_page_runs():
    names: dict = {}
    for block in BLOCKS:
        torch.manual_seed(3)
        exec(compile(block, str(PAGE), "exec"), names)
        torch.testing.assert_close(names["value"].dim(), 0)
        assert all(p.grad.abs().max() > 0 for p in names["parameters"])
    # The last block took no optimiser's step: the same weights give the same gradients.
    torch.manual_seed(3)
    value, gradients = plain_gradients(names)
    torch.testing.assert_close(names["value"].detach(), value, rtol=1e-5, atol=1e-6)
    for parameter, gradient in zip(names["parameters"], gradients, strict=True):
        bound = 1e-4 * gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=bound)
