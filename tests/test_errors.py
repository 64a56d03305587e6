"""Messages name the word that was meant, if one is near, and all that are known."""

import pytest

from cl_compiler.errors import instead_of

PRECISIONS = ("auto", "ieee", "bf16", "fp16", "tf32")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("spil", ("recompute", "spill"), "spill"),
        ("CLIP", ("clip", "siglip"), "clip"),
        ("simclr", ("siglip", "nt_xent"), "nt_xent"),
        ("fp32", PRECISIONS, "ieee"),
        ("fp32", DTYPES, "float32"),
        ("BF16", DTYPES, "bfloat16"),
        ("BF16", PRECISIONS, "bf16"),
        ("torch.float16", DTYPES, "float16"),
        ("torch.float16", PRECISIONS, "fp16"),
        ("double", DTYPES, "float64"),
    ],
)
def test_the_word_that_was_meant(word: str, known: tuple[str, ...], meant: str):
    message = instead_of(word, known)
    assert message == f"did you mean {meant!r}? use one of {', '.join(known)}"


@pytest.mark.parametrize(
    ("word", "known"),
    [("ring", ("recompute", "spill", "retain")), ("fast", PRECISIONS), (3, DTYPES), ("", DTYPES)],
)
def test_nothing_is_guessed_where_nothing_is_near(word: object, known: tuple[str, ...]):
    assert instead_of(word, known, "known:") == f"known: {', '.join(known)}"


def test_several_may_be_near():
    assert instead_of("h100", ("h100x1", "h100x8", "b2"), most=2).count("h100x") == 4
