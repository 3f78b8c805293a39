"""Where the fast sum cannot tell what the output is, the exact one decides; and only there."""

import numpy as np
import pytest

import clipcore as cc
from clipcore.clipping import kernels, measure


def misjudged():
    """Gradients whose fast norm is not the exact one, with a limit that lies between the two."""
    for seed in range(300):
        array = np.random.default_rng(seed).standard_normal(2000).astype(np.float32)
        fast, exact = (float(norm) for norm in (kernels.norms([array], 2.0)[0], kernels.exact_norm([array], 2.0)))
        if fast != exact:
            yield array, exact, min(fast, exact)


def clipped_as_the_exact_norm_says(array, exact, limit):
    clipped, report = cc.clip([array], cc.ClipByGlobalNorm(limit))
    return report.clipped == (exact > limit) and (report.clipped or clipped[0] is array)


def test_whether_a_norm_is_over_its_limit_is_decided_exactly():
    cases = list(misjudged())
    assert len(cases) > 5
    assert all(clipped_as_the_exact_norm_says(*case) for case in cases)


def test_the_fast_sum_alone_would_be_wrong_there(monkeypatch):
    monkeypatch.setattr(measure.Measure, "settled", lambda self, limit, floor: self.norms)
    assert not all(clipped_as_the_exact_norm_says(*case) for case in misjudged())


def test_the_exact_sum_is_not_asked_for_where_the_output_is_clear(monkeypatch):
    monkeypatch.setattr(kernels, "exact_norm", lambda *args: pytest.fail("summed exactly"))
    array = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    for limit in (1e-3, 1.0, 40.0, 50.0, 1e30):
        cc.clip([array], cc.ClipByGlobalNorm(limit))


def test_a_p_beyond_any_exponent_is_summed_exactly_too():
    array = np.array([4.0, 3.0, -4.0], np.float32)
    for p in (1e20, 1e300):
        clipped, report = cc.clip([array], cc.ClipByGlobalNorm(4.0, p=p))
        assert (report.norm, report.clipped, clipped[0] is array) == (4.0, False, True)
