import numpy as np
import pytest

from fastlatent.workflows.condition_statistics import condition_statistics

CONDITIONS = (("a", 2), ("b", 1))


@pytest.mark.parametrize("rows", [50, 7, 1])
def test_mean_and_std_of_what_is_there(rows):
    """Whatever parts they come in; numbers of samples without the condition are no numbers."""
    rng = np.random.default_rng(0)
    values = rng.normal((1e6, 0, 5), (1, 0, 1e-3), (50, 3))  # a mean far from 0, and a number that never changes
    present = rng.integers(0, 2, (50, 2))
    present[:7] = 0  # a part in which nobody has anything
    values[~np.repeat(present, (2, 1), axis=1).astype(bool)] = 1e9
    parts = [(values[i : i + rows], present[i : i + rows].tolist()) for i in range(0, 50, rows)]
    mean, std = condition_statistics(CONDITIONS, parts)
    for i, which in enumerate((0, 0, 1)):
        known = values[present[:, which] == 1, i]
        assert mean[i] == pytest.approx(known.mean(), rel=1e-12)
        assert std[i] == pytest.approx(known.std() or 1.0, rel=1e-6)


def test_a_condition_that_nobody_has():
    parts = [(np.zeros((3, 3)), np.array([[1, 0]] * 3))] * 2
    with pytest.raises(ValueError, match="--condition-spec: no image has numbers for 'b'; leave it out, or correct"):
        condition_statistics(CONDITIONS, parts)
    with pytest.raises(ValueError, match="numbers for 'a'"):
        condition_statistics(CONDITIONS, [])
    assert condition_statistics((), parts) == ([], [])
