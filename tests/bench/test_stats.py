"""Medians, quartiles, ratios and ceilings against numbers worked out by hand."""

import pytest

from bench.stats import least_ms, pairwise_ratio, summary


def test_summary_of_an_odd_number_of_samples():
    expected = {"median": 3, "q1": 2, "q3": 4, "iqr": 2, "min": 1, "max": 100}
    assert summary([100, 2, 3, 1, 4]) == expected


def test_summary_interpolates():
    assert summary([1, 2, 3, 4]) == {"median": 2.5, "q1": 1.75, "q3": 3.25, "iqr": 1.5, "min": 1, "max": 4}


def test_summary_of_two_samples():
    assert summary([10, 20]) == {"median": 15, "q1": 12.5, "q3": 17.5, "iqr": 5, "min": 10, "max": 20}


def test_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians():
    # Pairs: 0.5, 0.1, 4. Of the medians it would be 2 / 4.
    assert pairwise_ratio([1, 2, 40], [2, 20, 10]) == {"median": 0.5, "min": 0.1, "max": 4}
    assert pairwise_ratio([2, 4, 6], [1, 8, 3]) == {"median": 2, "min": 0.5, "max": 2}
    assert pairwise_ratio([2, 3], [123456, 123456]) == {"median": 2.025e-05, "min": 1.62e-05, "max": 2.43e-05}


def test_ratio_wants_a_pair_for_every_sample():
    with pytest.raises(ValueError, match="shorter"):
        pairwise_ratio([1, 2], [1])


def test_the_least_time_is_that_of_the_scarcer_resource():
    # 20 G operations at 1000 G/s take 20 ms; 256 MiB at 10 GB/s take 26.8 ms.
    assert least_ms(20e9, 100, 1000, 10.48576) == 20
    assert least_ms(20e9, 256, 1000, 10) == 26.8435
