import numpy as np

from precision_lab.curves import curve, drift, smooth
from precision_lab.results import Row


def test_smooth_is_the_mean_of_what_was():
    np.testing.assert_allclose(smooth([4.0, 2.0, 0.0, 1.0], 2), [4, 3, 1, 0.5])
    np.testing.assert_allclose(smooth([4.0, 2.0], 1), [4, 2])


def test_curve_and_drift_of_a_row():
    row, reference = Row("32-true", losses=[float(n) for n in range(31)]), Row("64-true", losses=[2.0] * 40)
    steps, losses = curve(row)
    assert steps[0] == 1 and losses[0] == 0 and losses[-1] == 29.5  # the mean of a fifteenth, two
    values = drift(row, reference)
    assert np.isnan(values[2]) and values[0] == 1 and values[6] == 2
