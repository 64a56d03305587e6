"""The words of the loss language, for whoever looks for another."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

OPERATORS: Mapping[str, str] = MappingProxyType(
    {
        "add": "add", "subtract": "sub", "multiply": "mul", "divide": "truediv",
        "true_divide": "truediv", "power": "pow", "greater": "gt", "greater_equal": "ge",
        "less": "lt", "less_equal": "le",
    }
)  # fmt: skip
"""NumPy's word for an operator → Python's."""
_WORDS = (
    "exp", "log", "sqrt", "sigmoid", "softplus", "relu", "maximum", "clamp", "logaddexp", "where",
    "sum", "max", "min", "mean", "logsumexp", "softmean", "count",
)  # fmt: skip
_OTHER_WORDS: Mapping[str, str] = MappingProxyType(
    {"abs": "abs(v)", "absolute": "abs(v)", "amax": "cl.max", "detach": "cl.stop_gradient"}
)
_SORTING = frozenset({"topk", "sort", "argsort", "rank", "argmax", "argmin", "quantile", "median"})


def no_such_word(name: str) -> str:
    """The language's word for a function of torch or NumPy, or which words there are."""
    if name in _OTHER_WORDS:
        return f"Use {_OTHER_WORDS[name]}."
    if name in _WORDS:
        return f"Use cl.{name}."
    order = (
        "Tiles know no order of a row's elements: select by a threshold, as where=s > "
        "cl.at_positive(s) - margin does, by cl.max, or softly by cl.softmean. "
    )
    words = f"The functions of the language are {', '.join(f'cl.{w}' for w in _WORDS)}."
    return (order if name in _SORTING else "") + words


__all__ = ["OPERATORS", "no_such_word"]
