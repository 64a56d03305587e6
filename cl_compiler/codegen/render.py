"""Render a plan: strict Jinja templates in, formatted Python text out."""

from __future__ import annotations

import re
from functools import lru_cache

import jinja2

from cl_compiler.codegen.context import build_context
from cl_compiler.codegen.layout import drop_unused, fit
from cl_compiler.codegen.library import library_products
from cl_compiler.codegen.templates import template_root
from cl_compiler.lang.program import Program
from cl_compiler.plan.types import Plan


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """Strict: an undefined name is an error, not an empty string."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_root()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def render(plan: Plan, program: Program, variant: str, device: str = "cpu") -> str:
    """The text of the file that runs ``plan``; ``variant`` is its name in the header.

    ``device``: "cpu", or "cuda" where what is allocated must lie beside the operands.  The text
    depends on its arguments only: no timestamps, no paths.
    """
    context = build_context(plan, program) | {
        "variant": variant,
        "device": device,
        "products": library_products(device, plan.precision, plan.library),
        "scalar_home": '"cpu", ',
        "beside": "",
        "operand_dtype": "",
        "whole_rows": False,
    }
    if device != "cpu":
        context["beside"] = f"{context['arguments'][0]}.device, "
    text = environment().get_template("torch/loss.py.jinja").render(context)
    return fit(drop_unused(tidy_text(text)))


def tidy_text(text: str) -> str:
    """Two blank lines between definitions, no trailing spaces, no blank line after a colon."""
    lines = [line.rstrip() for line in text.split("\n")]
    text = "\n".join(lines)
    text = re.sub(r"\n{4,}", "\n\n\n", text)
    text = re.sub(r"\n\n+(?=    )", "\n\n", text)
    text = re.sub(r"\n\n(?= +else:)", "\n", text)
    return text.strip("\n") + "\n"
