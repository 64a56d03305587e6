"""Cutting inputs: what is data, what is structure, where token counts put the borders."""

from __future__ import annotations

import pytest
import torch

from cl_compiler.errors import ArgumentError
from cl_compiler.step.inputs import Rows, Tokens, Whole, chunk_ranges, cut, sample_count

LENGTHS = [5, 1, 2, 9, 3, 3, 3, 1]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("limit", [1, 6, 9, 12, 1000])
def test_token_chunks_cover_the_input_and_keep_the_limit(limit, padded):
    ranges = chunk_ranges(torch.zeros(8, 9), Tokens(limit, lambda _: LENGTHS, padded), "x")
    assert [n for a, b in ranges for n in range(a, b)] == list(range(8))

    def tokens(a: int, b: int) -> int:
        return (b - a) * max(LENGTHS[a:b]) if padded else sum(LENGTHS[a:b])

    for a, b in ranges:
        assert tokens(a, b) <= limit or b == a + 1
        assert b == 8 or tokens(a, b + 1) > limit  # and no chunk could take one more


def test_without_lengths_every_sample_counts_with_its_padding():
    value = {"scale": 2.0, "ids": torch.zeros(10, 7), "mask": torch.ones(10, 7)}
    assert chunk_ranges(value, Tokens(21), "x") == ((0, 3), (3, 6), (6, 9), (9, 10))


def test_lists_of_token_numbers_count_what_they_have():
    value = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    assert chunk_ranges(value, Tokens(6), "x") == ((0, 2), (2, 3), (3, 4))
    assert cut(value, 1, 3) == [[4], [5, 6]]


def test_lengths_may_be_a_tensor_of_the_input():
    value = {"ids": torch.zeros(4, 9), "mask": torch.tensor([[1, 1, 1], [1, 0, 0]] * 2)}
    size = Tokens(4, lambda v: v["mask"].sum(1), padded=False)
    assert chunk_ranges(value, size, "x") == ((0, 2), (2, 4))


def test_marks_overrule():
    images = [torch.full((n + 1,), float(n)) for n in range(3)]
    value = {"images": Rows(images), "table": Whole(torch.eye(5))}
    assert sample_count(value, "x") == 3
    chunk = cut(value, 1, 3)
    assert [image.tolist() for image in chunk["images"]] == [[1.0, 1.0], [2.0, 2.0, 2.0]]
    assert torch.equal(chunk["table"], torch.eye(5))


def test_chunks_are_views():
    value = torch.arange(6.0)
    assert cut(value, 2, 4).data_ptr() == value[2:].data_ptr()


def test_the_input_is_left_as_it_was():
    value = {"ids": torch.arange(4), "more": [torch.arange(4), {"deep": torch.arange(4)}]}
    chunk = cut(value, 1, 2)
    assert chunk["more"][1]["deep"].tolist() == [1]
    assert len(value["ids"]) == len(value["more"][1]["deep"]) == 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(0, 3), "no samples.*skip empty"),
        ({"a": 1, "b": "text"}, "no samples: a dict"),
        ([], "no samples: a list"),
        ({"a": torch.zeros(3), "b": [torch.zeros(2)]}, r"\['a'\]: 3, \['b'\]\[0\]: 2.*Whole"),
    ],
)
def test_inputs_that_cannot_be_cut(value, message):
    with pytest.raises(ArgumentError, match=message):
        sample_count(value, "x")


def test_tokens_need_something_to_count():
    with pytest.raises(ArgumentError, match="no second dimension"):
        chunk_ranges(torch.zeros(4), Tokens(2), "x")
    with pytest.raises(ArgumentError, match=r"4 samples.*returned 3 lengths"):
        chunk_ranges(torch.zeros(4), Tokens(2, lambda _: [1, 1, 1]), "x")
