"""Complementary partitions by brute force: every two ids are told apart, and sizes are the smallest allowed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recemb.partitions import FAMILIES, Partitions, check_complementary, choose_partitions, class_dtypes


@settings(max_examples=150, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    num_embeddings=st.integers(1, 701),
    num_collisions=st.integers(1, 800),
    num_partitions=st.integers(1, 5),
)
def test_every_two_ids_differ_in_some_class(
    family: str, num_embeddings: int, num_collisions: int, num_partitions: int
) -> None:
    partitions = choose_partitions(family, num_embeddings, num_collisions, num_partitions)
    codes = [partitions.classes(i) for i in range(num_embeddings)]
    assert len(set(codes)) == num_embeddings
    assert len(partitions.sizes) == len(partitions.divisors) == num_partitions
    for index, size in enumerate(partitions.sizes):
        assert {code[index] for code in codes} <= set(range(size))
    in_first = [code[0] for code in codes]
    assert max(in_first.count(value) for value in set(in_first)) <= num_collisions


@pytest.mark.parametrize("num_embeddings", [1, 2, 7, 101, 999, 1001])
def test_quotient_remainder_is_the_cheapest_divisor_up_to_c(num_embeddings: int) -> None:
    for c in range(1, 40):
        partitions = choose_partitions("mixed_radix", num_embeddings, c, 2)
        assert partitions.total_classes == min(-(-num_embeddings // d) + d for d in range(1, c + 1))
        quotients, divisor = partitions.sizes
        assert partitions.divisors == (divisor, 1)
        for i in range(num_embeddings):
            assert partitions.classes(i) == divmod(i, divisor)
        assert quotients == -(-num_embeddings // divisor)


@pytest.mark.parametrize("num_embeddings", [1, 2, 7, 101, 999, 1001])
@pytest.mark.parametrize("num_partitions", [2, 3, 4])
def test_remainder_first_is_the_remainder_and_then_the_quotient_s_digits(
    num_embeddings: int, num_partitions: int
) -> None:
    for c in range(1, 40):
        partitions = choose_partitions("remainder_first", num_embeddings, c, num_partitions)
        first, *others = partitions.sizes
        assert partitions.sizes == choose_partitions("mixed_radix", num_embeddings, c, num_partitions).sizes
        for i in range(num_embeddings):
            quotient, *classes = divmod(i, first)
            for size in others:
                quotient, digit = divmod(quotient, size)
                classes.append(digit)
            assert partitions.classes(i) == tuple(classes)


def test_only_remainders_keep_the_first_ids_apart() -> None:
    """Ids below the number of classes, the most frequent where ids are in order of frequency."""
    for family, shared in (("remainder_first", 1), ("chinese_remainder", 1), ("mixed_radix", 4)):
        partitions = choose_partitions(family, 1000, 4, 2)
        in_first = [partitions.classes(i)[0] for i in range(250)]
        assert max(in_first.count(value) for value in in_first) == shared


def test_the_paper_s_size_is_reached_below_the_optimum() -> None:
    """(ceil(n / c) + c) classes for c collisions, as long as c <= sqrt(n)."""
    for c in (2, 4, 60):
        for family in ("mixed_radix", "remainder_first"):
            assert choose_partitions(family, 10_131_227, c, 2).sizes == (-(-10_131_227 // c), c)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_partitions", [2, 3, 4])
def test_more_collisions_never_cost_more(family: str, num_partitions: int) -> None:
    for num_embeddings in (1, 6, 101, 5003):
        totals = [
            choose_partitions(family, num_embeddings, c, num_partitions).total_classes
            for c in range(1, num_embeddings + 1)
        ]
        assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("num_partitions", [2, 3, 4])
def test_the_smallest_size_is_about_k_kth_roots(num_partitions: int) -> None:
    n = 1_000_001
    for family, slack in (("mixed_radix", 1.05), ("remainder_first", 1.05), ("chinese_remainder", 1.6)):
        total = choose_partitions(family, n, n, num_partitions).total_classes
        root = num_partitions * n ** (1 / num_partitions)
        assert root <= total <= slack * root


def test_chinese_remainders_have_coprime_divisors_and_keep_neighbours_apart() -> None:
    for n, c, k in itertools.product((101, 999), (3, 20, 101), (2, 3, 4)):
        partitions = choose_partitions("chinese_remainder", n, c, k)
        assert all(math.gcd(a, b) == 1 for a, b in itertools.combinations(partitions.sizes, 2))
        assert math.prod(partitions.sizes) >= n
        assert set(partitions.divisors) == {1}


def test_costly_classes_of_later_partitions_are_taken_sparingly() -> None:
    """A remainder class costs 16 quotient ones: ceil(n / d) + 16 d is least at d = 25 for n = 10,000."""
    partitions = choose_partitions("mixed_radix", 10_000, 10_000, 2, cost_ratio=16)
    best = min(range(1, 200), key=lambda d: -(-10_000 // d) + 16 * d)
    assert partitions == Partitions((best, 1), (-(-10_000 // best), best))


def test_billions_of_ids_take_a_moment() -> None:
    partitions = choose_partitions("mixed_radix", 10**10, 10**10, 2)
    assert partitions.sizes == (10**5, 10**5)


def test_known_classes_are_checked() -> None:
    good = torch.tensor([[0, 1], [1, 1], [0, 0]])
    check_complementary("t_a", 3, good)
    with pytest.raises(ValueError, match=r"'t_a'.*ids 1 and 3 agree in all classes \(1, 1\) \(1 ids are not told"):
        check_complementary("t_a", 4, torch.tensor([[0, 1], [1, 1], [0, 0], [1, 1]]))
    with pytest.raises(ValueError, match=r"must be \(4, k\), got \(3, 2\)"):
        check_complementary("t_a", 4, good)
    with pytest.raises(ValueError, match=r"must be integers, got torch.float32"):
        check_complementary("t_a", 3, good.float())
    with pytest.raises(ValueError, match="at least 0, got -1"):
        check_complementary("t_a", 3, good - 1)


def test_the_paper_s_triple_of_partitions_is_complementary() -> None:
    """{0}{1,3,4}{2}, {0,1,3}{2,4}, {0,3}{1,2,4} on five ids."""
    check_complementary("t_a", 5, torch.tensor([[0, 0, 0], [1, 0, 1], [2, 1, 1], [1, 0, 0], [1, 1, 1]]))


def test_classes_are_kept_in_the_smallest_integers() -> None:
    classes = {"a": torch.tensor([[255, 256, 3]]), "b": torch.tensor([[0, 40_000, 2**40]])}
    assert class_dtypes(classes) == [torch.uint8, torch.int32, torch.int64]
    assert class_dtypes({}) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("modular", 10, 2, 2), "one of the families"),
        (("mixed_radix", 10, 0, 2), "must be at least 1, got 0 and 2"),
        (("mixed_radix", 10, 2, 0), "must be at least 1, got 2 and 0"),
    ],
)
def test_options_are_checked(options: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_partitions(*options)
