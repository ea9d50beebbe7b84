"""The evaluation threshold gives the trained rate on new data, however the logits lie."""

import pytest
import torch

from dtpvit.encoder import Tokens
from dtpvit.encoder.reducers import DynamicPooling, Evidence
from dtpvit.encoder.reducers.calibration import BoundaryCalibration


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("share", [0.08, 0.25, 0.5])
def test_threshold_is_the_quantile_at_any_scale(scale, share):
    calibration = BoundaryCalibration()
    for _ in range(5):
        calibration.observe(torch.randn(5000) * scale - 40 * scale, share)
    above = (torch.randn(20000) * scale - 40 * scale > calibration.boundary_threshold).double().mean()
    assert abs(above - share) < 0.01


def test_threshold_follows_logits_that_drift():
    calibration = BoundaryCalibration(window=8)
    for step in range(200):
        calibration.observe(torch.randn(2000) + 0.05 * step, 0.25)
    above = (torch.randn(20000) + 0.05 * 199 > calibration.boundary_threshold).double().mean()
    assert abs(above - 0.25) < 0.07  # the window's middle lags by 4 steps of 0.05


def test_a_step_that_is_no_number_is_as_if_it_had_not_been():
    calibration = BoundaryCalibration()
    calibration.observe(torch.full((100,), float("nan")), 0.25)
    assert calibration.boundary_threshold.isnan()  # still never calibrated
    calibration.observe(torch.randn(4000), 0.25)
    before = calibration.boundary_threshold.clone()
    calibration.observe(torch.full((100,), float("nan")), 0.25)
    assert torch.equal(calibration.boundary_threshold, before)


def test_an_unsure_predictor_keeps_its_rate_at_evaluation():
    """The trap: trained with noise, a predictor with p = 1/4 everywhere would place no boundary at logit > 0."""
    torch.manual_seed(0)
    reducer = DynamicPooling(16, compression=4, rate="binomial", estimator="dtp")

    def draw():
        return Tokens.from_dense(torch.randn(64, 65, 16), num_prefix=1, grid=(8, 8), seed=torch.randint(1 << 62, (64,)))

    for _ in range(3):
        reducer.train()(draw(), Evidence())
    out = reducer.eval()(draw(), Evidence()).tokens
    assert abs(float((out.lengths - 1).sum()) / (64 * 64) - 0.25) < 0.02
    assert out.lengths.min() < out.lengths.max()  # images still differ
