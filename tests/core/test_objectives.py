# SPDX-License-Identifier: Apache-2.0
"""The four objectives: values against plain-Python oracles, identities to the bit, gradients, masks, dtypes."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import preference_losses
from trl_sipo.core.importance import log_importance_weight
from trl_sipo.core.objectives import diffusion_dpo_loss, dpo_cm_loss, poly_dpo_loss, sipo_loss
from trl_sipo.core.objectives._preference_nll import preference_nll
from trl_sipo.core.objectives.dpo_cm import masked_weighted_nll
from trl_sipo.core.objectives.sipo import masked_scaled_nll
from trl_sipo.errors import ConfigurationError

WEIGHTED = {"dpo_cm": dpo_cm_loss, "sipo": sipo_loss, "sipo_no_grad": partial(sipo_loss, weight_grad=False)}
weighted = pytest.mark.parametrize("loss", WEIGHTED.values(), ids=WEIGHTED.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def _logratios(dtype=torch.float64, size=64):
    pair = torch.randn(2, size, generator=torch.Generator().manual_seed(4), dtype=dtype) * 1e-3
    return [values.clone().requires_grad_() for values in pair]


def _log_weights(dtype=torch.float64, size=64, scale=0.2):
    """Half inside the clip range of 0.1, half outside; never positive, as in training."""
    pair = torch.rand(2, size, generator=torch.Generator().manual_seed(5), dtype=dtype) * -scale
    return [values.clone().requires_grad_() for values in pair]


def _unit_weights(like):
    return [torch.zeros_like(like, requires_grad=True) for _ in range(2)]


def _gradients(loss, inputs):
    return torch.autograd.grad(loss.sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("z", [-80.0, -3.0, -0.1, 0.0, 0.2, 5.0, 90.0])
@pytest.mark.parametrize("alpha", [-1.0, -0.3, 0.0, 8.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_preference_nll_value(z, alpha, label_smoothing):
    loss = preference_nll(torch.tensor([z], dtype=torch.float64), alpha=alpha, label_smoothing=label_smoothing)
    expected = preference_losses.preference_nll(z, alpha, label_smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-15)


@settings(max_examples=60, deadline=None)
@given(st.floats(-30, 30), st.floats(-1, 10))
def test_polynomial_gradient(z, alpha):
    """dL/dz = -(1 - p)(1 + alpha p)."""
    logit = torch.tensor([z], dtype=torch.float64, requires_grad=True)
    (gradient,) = _gradients(preference_nll(logit, alpha=alpha), [logit])
    p = preference_losses.sigmoid(z)
    one_minus_p = preference_losses.sigmoid(-z)
    assert gradient.item() == pytest.approx(-one_minus_p * (1 + alpha * p), rel=1e-10, abs=1e-15)
    assert gradient.item() <= 0


@pytest.mark.parametrize(("alpha", "times_dpo"), [(0.0, 1.0), (8.0, 5.0), (-1.0, 0.5)])
def test_polynomial_gradient_at_the_start(alpha, times_dpo):
    zero = torch.zeros(1, requires_grad=True)
    (gradient,) = _gradients(poly_dpo_loss(zero, torch.zeros(1), beta=1.0, alpha=alpha), [zero])
    assert gradient.item() == pytest.approx(-(2 + alpha) / 4) == pytest.approx(-0.5 * times_dpo)


@settings(max_examples=60, deadline=None)
@given(st.floats(-20, 20), st.floats(-1, 10), st.floats(0.0, 0.49))
def test_label_smoothing_mixes_both_labels_of_the_objectives_own_loss(z, alpha, label_smoothing):
    chosen, rejected = torch.tensor([z / 2], dtype=torch.float64), torch.tensor([-z / 2], dtype=torch.float64)
    loss = partial(poly_dpo_loss, beta=1.0, alpha=alpha)
    expected = (1 - label_smoothing) * loss(chosen, rejected) + label_smoothing * loss(rejected, chosen)
    torch.testing.assert_close(loss(chosen, rejected, label_smoothing=label_smoothing), expected)


def test_diffusion_dpo_by_hand():
    """beta 5000, chosen error .10 against .11, rejected .20 against .19: z = 5000 * (.005 + .005) = 50."""
    chosen, rejected = (torch.tensor([value], dtype=torch.float64) for value in (0.01 / 2, -0.01 / 2))
    assert diffusion_dpo_loss(chosen, rejected, beta=5000).item() == pytest.approx(math.log1p(math.exp(-50)), rel=1e-9)
    assert diffusion_dpo_loss(rejected, chosen, beta=5000).item() == pytest.approx(50, rel=1e-12)


@pytest.mark.parametrize("mask_threshold", [0.0, 0.85, None])
@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["dpo_cm", "sipo"])
def test_weighted_losses_against_the_oracle(name, mask_threshold, alpha, label_smoothing):
    chosen, rejected = _logratios()
    log_w_chosen, log_w_rejected = _log_weights()
    settings_ = {"clip_range": 0.1, "alpha": alpha, "label_smoothing": label_smoothing}
    loss = WEIGHTED[name](
        chosen, rejected, log_w_chosen, log_w_rejected, beta=2000, mask_threshold=mask_threshold, **settings_
    )
    threshold = 0.9 if mask_threshold is None else mask_threshold
    expected = [
        getattr(preference_losses, name)(
            2000 * (c - r), math.exp(wc), math.exp(wr), mask_threshold=threshold, **settings_
        )
        for c, r, wc, wr in zip(*(v.tolist() for v in (chosen, rejected, log_w_chosen, log_w_rejected)), strict=True)
    ]
    torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert ((loss == 0).sum() > 5) == (threshold > 0)


@weighted
def test_weights_above_one_are_clipped_too(loss):
    chosen, rejected = _logratios(size=1)
    name = "dpo_cm" if loss is dpo_cm_loss else "sipo"
    log_weights = [torch.full((1,), value, dtype=torch.float64) for value in (1.5, 0.7)]
    got = loss(chosen, rejected, *log_weights, beta=2000, clip_range=0.2)
    z = 2000 * (chosen - rejected).item()
    expected = getattr(preference_losses, name)(z, math.exp(1.5), math.exp(0.7), clip_range=0.2, mask_threshold=0.8)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@every_dtype
@weighted
@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_unit_weight_without_mask_is_diffusion_dpo_to_the_bit(loss, dtype, alpha, label_smoothing):
    ratios = _logratios(dtype)
    got = loss(
        *ratios,
        *_unit_weights(ratios[0]),
        beta=5000,
        clip_range=0.1,
        mask_threshold=0.0,
        alpha=alpha,
        label_smoothing=label_smoothing,
    )
    if alpha == 0:
        expected = diffusion_dpo_loss(*ratios, beta=5000, label_smoothing=label_smoothing)
    else:
        expected = poly_dpo_loss(*ratios, beta=5000, alpha=alpha, label_smoothing=label_smoothing)
    assert torch.equal(got, expected)
    for mine, theirs in zip(_gradients(got, ratios), _gradients(expected, ratios), strict=True):
        assert torch.equal(mine, theirs)


@every_dtype
def test_poly_with_alpha_zero_is_diffusion_dpo_to_the_bit(dtype):
    ratios = _logratios(dtype)
    got, expected = poly_dpo_loss(*ratios, beta=5000, alpha=0.0), diffusion_dpo_loss(*ratios, beta=5000)
    assert torch.equal(got, expected)
    for mine, theirs in zip(_gradients(got, ratios), _gradients(expected, ratios), strict=True):
        assert torch.equal(mine, theirs)


@every_dtype
def test_no_label_smoothing_is_plain_to_the_bit(dtype):
    z = torch.linspace(-90, 90, 181, dtype=dtype)
    assert torch.equal(preference_nll(z, label_smoothing=0.0), -torch.nn.functional.logsigmoid(z))


@weighted
def test_a_fresh_adapter_gives_ln_two_per_kept_pair(loss):
    zeros = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    log_weight = torch.tensor([0.0, -0.05, -0.5])
    got = loss(*zeros, log_weight, log_weight.clone(), beta=5000, clip_range=0.1)
    # C&M multiplies ln 2 by its weight; SIPO's weight sits inside, on a logit of zero.
    expected = [math.log(2), math.log(2) * (math.exp(-0.05) if loss is dpo_cm_loss else 1.0), 0.0]
    torch.testing.assert_close(got, torch.tensor(expected))
    assert torch.equal(diffusion_dpo_loss(*zeros, beta=5000), torch.full((3,), math.log(2)))


@pytest.mark.parametrize("huge", [1e30, math.inf])
@weighted
@every_dtype
def test_a_masked_pair_has_exactly_zero_loss_and_gradient(loss, dtype, huge):
    """Pair 0 has an enormous error on one side, pair 1 is ordinary and must not notice."""
    for side in range(2):
        errors = torch.tensor([[0.01, 0.011], [0.012, 0.01]], dtype=dtype)
        errors[side, 0] = huge
        errors.requires_grad_()
        got = _loss_of_errors(loss, errors)
        alone = errors.detach()[:, 1:].clone().requires_grad_()
        expected = _loss_of_errors(loss, alone)
        got.sum().backward()
        expected.sum().backward()
        assert got[0].item() == 0.0 and got[1].item() == expected.item() > 0
        assert errors.grad[:, 0].tolist() == [0.0, 0.0]
        assert torch.equal(errors.grad[:, 1], alone.grad[:, 0]) and alone.grad.abs().min() > 0


def _loss_of_errors(loss, errors):
    """Errors `(2, batch)` of chosen and rejected through log-ratios and log weights to the loss."""
    chosen, rejected = errors
    rho2 = torch.full_like(chosen, 2.0)
    return loss(
        (0.0105 - chosen) / 2,
        (0.0105 - rejected) / 2,
        log_importance_weight(chosen, rho2),
        log_importance_weight(rejected, rho2),
        beta=2000,
        clip_range=0.1,
        alpha=1.0,
        label_smoothing=0.1,
    )


@weighted
def test_a_fully_masked_batch_is_zero_and_still_differentiable(loss):
    ratios = _logratios()
    log_weights = [torch.full_like(ratios[0], -1.0).detach().requires_grad_() for _ in range(2)]
    got = loss(*ratios, *log_weights, beta=5000, clip_range=0.1)
    got.mean().backward()
    assert got.abs().max().item() == 0.0
    assert all(values.grad.abs().max().item() == 0.0 for values in ratios)


@weighted
def test_extreme_unmasked_pairs_stay_finite(loss):
    """With the mask off, the capped log weight and a huge logit must still not make a NaN."""
    ratios = [torch.tensor([1e6, -1e6, 0.0], requires_grad=True), torch.zeros(3, requires_grad=True)]
    log_weights = [torch.tensor([-5e5, -5e35, -5e35], requires_grad=True) for _ in range(2)]
    got = loss(*ratios, *log_weights, beta=5000, clip_range=0.1, mask_threshold=0.0)
    assert got.isfinite().all()
    for gradient in _gradients(got, [*ratios, *log_weights]):
        assert gradient is None or gradient.isfinite().all()


def test_dpo_cm_weight_carries_no_gradient():
    ratios, log_weights = _logratios(), _log_weights(scale=0.09)
    gradients = _gradients(dpo_cm_loss(*ratios, *log_weights, beta=5000, clip_range=0.1), [*ratios, *log_weights])
    assert gradients[0].abs().min() > 0 and gradients[2] is None and gradients[3] is None


def test_dpo_cm_piece_detaches_a_weight_that_wants_gradient():
    logit = torch.tensor([0.3], requires_grad=True)
    weight = torch.tensor([0.95], requires_grad=True)
    loss = masked_weighted_nll(logit, torch.tensor([True]), weight)
    assert _gradients(loss, [weight]) == (None,)
    assert loss.item() == pytest.approx(0.95 * preference_losses.preference_nll(0.3), rel=1e-6)


def test_sipo_weight_gradient_in_closed_form():
    """L = -log s(u z), u = 1 / w of the smaller weight: dL / dlog w = (1 - s(u z)) u z there, 0 on the other side."""
    ratios, log_weights = _logratios(), _log_weights(scale=0.09)
    loss = sipo_loss(*ratios, *log_weights, beta=2000, clip_range=0.1)
    got_chosen, got_rejected = _gradients(loss, log_weights)
    for i in range(len(loss)):
        z = 2000 * (ratios[0][i] - ratios[1][i]).item()
        w = [values[i].item() for values in log_weights]
        scaled = math.exp(-min(w)) * z
        expected = preference_losses.sigmoid(-scaled) * scaled
        smaller, larger = (got_chosen, got_rejected) if w[0] < w[1] else (got_rejected, got_chosen)
        assert smaller[i].item() == pytest.approx(expected, rel=1e-9) and larger[i].item() == 0.0


def test_sipo_weight_has_no_gradient_where_it_is_clipped():
    ratios = _logratios()
    log_weights = [torch.full_like(ratios[0], -0.2).detach().requires_grad_() for _ in range(2)]
    loss = sipo_loss(*ratios, *log_weights, beta=2000, clip_range=0.1, mask_threshold=0.0)
    assert all(gradient.abs().max().item() == 0.0 for gradient in _gradients(loss, log_weights))


def test_sipo_weight_grad_off_changes_the_gradient_only():
    ratios, log_weights = _logratios(), _log_weights(scale=0.09)
    on = sipo_loss(*ratios, *log_weights, beta=2000, clip_range=0.1)
    off = sipo_loss(*ratios, *log_weights, beta=2000, clip_range=0.1, weight_grad=False)
    assert torch.equal(on, off)
    with_weight = _gradients(on, [*ratios, *log_weights])
    without = _gradients(off, [*ratios, *log_weights])
    assert torch.equal(with_weight[0], without[0]) and torch.equal(with_weight[1], without[1])
    assert with_weight[2].abs().max() > 0 and without[2:] == (None, None)


@pytest.mark.parametrize("settings_", [{}, {"alpha": 2.0, "label_smoothing": 0.1}, {"mask_threshold": 0.0}], ids=str)
@weighted
def test_gradcheck(loss, settings_):
    """Numerical against autograd gradients, away from the kinks of min, clamp and mask."""
    ratios = _logratios(size=4)
    # inside the clip range (either side smaller), clipped, and masked (or clipped, with the mask off)
    values = torch.tensor([[-0.02, -0.06, 0.3, -0.4], [-0.05, -0.01, 0.5, -0.3]], dtype=torch.float64)
    log_weights = [row.clone().requires_grad_() for row in values]
    bound = partial(loss, beta=500.0, clip_range=0.1, **settings_)
    if loss is sipo_loss:
        assert torch.autograd.gradcheck(bound, (*ratios, *log_weights))
    else:  # the weight is a constant to autograd, so it must be one to the finite differences
        constants = [values.detach() for values in log_weights]
        assert torch.autograd.gradcheck(lambda c, r: bound(c, r, *constants), tuple(ratios))


@pytest.mark.parametrize("loss", [partial(diffusion_dpo_loss), partial(poly_dpo_loss, alpha=4.0)], ids=["dpo", "poly"])
def test_gradcheck_unweighted(loss):
    assert torch.autograd.gradcheck(partial(loss, beta=500.0, label_smoothing=0.1), tuple(_logratios(size=4)))


def test_bfloat16_inputs_are_widened_before_any_arithmetic():
    ratios = [values.detach().bfloat16() for values in _logratios()]
    log_weights = [values.detach().bfloat16() for values in _log_weights()]
    wide = [values.float() for values in (*ratios, *log_weights)]
    calls = {
        "dpo": lambda c, r, wc, wr: diffusion_dpo_loss(c, r, beta=5000),
        "poly": lambda c, r, wc, wr: poly_dpo_loss(c, r, beta=5000, alpha=1.0),
        "dpo_cm": lambda c, r, wc, wr: dpo_cm_loss(c, r, wc, wr, beta=5000, clip_range=0.1),
        "sipo": lambda c, r, wc, wr: sipo_loss(c, r, wc, wr, beta=5000, clip_range=0.1),
    }
    for call in calls.values():
        got = call(*ratios, *log_weights)
        assert got.dtype == torch.float32 and torch.equal(got, call(*wide))
        assert call(*(values.double() for values in wide)).dtype == torch.float64


@weighted
def test_swapping_the_arms_mirrors_the_logit_and_keeps_the_weight(loss):
    ratios, log_weights = _logratios(), _log_weights(scale=0.09)
    bound = partial(loss, beta=2000, clip_range=0.1)
    mirrored = bound(ratios[1], ratios[0], log_weights[1], log_weights[0])
    assert torch.equal(mirrored, bound(*(-values for values in ratios), *log_weights))


def test_pieces_compose_to_the_losses():
    """The trainers' hooks call the pieces with the logit, the mask and the weight made apart."""
    ratios, log_weights = _logratios(), _log_weights()
    logit = 2000 * (ratios[0] - ratios[1])
    log_weight = torch.minimum(*log_weights)
    keep = log_weight >= math.log(0.9)
    assert 5 < keep.sum() < 60
    bounds = (math.log(0.9), math.log(1.1))
    torch.testing.assert_close(
        masked_weighted_nll(logit, keep, log_weight.clamp(*bounds).exp(), alpha=1.0, label_smoothing=0.1),
        dpo_cm_loss(*ratios, *log_weights, beta=2000, clip_range=0.1, alpha=1.0, label_smoothing=0.1),
    )
    torch.testing.assert_close(
        masked_scaled_nll(logit, keep, (-log_weight).clamp(*bounds).exp(), alpha=1.0, label_smoothing=0.1),
        sipo_loss(*ratios, *log_weights, beta=2000, clip_range=0.1, alpha=1.0, label_smoothing=0.1),
    )


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_a_pair_dropped_by_a_custom_mask_may_have_any_logit_and_weight(broken):
    """A hook may drop a pair whose logit or weight is infinite or not a number: it still leaves no trace."""
    logit = torch.tensor([broken, 0.3], requires_grad=True)
    weight = torch.tensor([math.nan, 1.05], requires_grad=True)
    keep = torch.tensor([False, True])
    for piece in (masked_scaled_nll, masked_weighted_nll):
        loss = piece(logit, keep, weight)
        gradient, weight_gradient = _gradients(loss, [logit, weight])
        assert loss[0].item() == 0.0 and gradient[0].item() == 0.0 and gradient[1].item() < 0
        assert weight_gradient is None or weight_gradient[0].item() == 0.0


_ZERO = torch.zeros(1)
_CALLS = {
    "dpo": lambda **kw: diffusion_dpo_loss(_ZERO, _ZERO, **kw),
    "poly": lambda **kw: poly_dpo_loss(_ZERO, _ZERO, **{"alpha": 0.0, **kw}),
    "dpo_cm": lambda **kw: dpo_cm_loss(_ZERO, _ZERO, _ZERO, _ZERO, **{"clip_range": 0.1, **kw}),
    "sipo": lambda **kw: sipo_loss(_ZERO, _ZERO, _ZERO, _ZERO, **{"clip_range": 0.1, **kw}),
}


_IMPOSSIBLE = {
    "beta": (0, -1, math.inf, math.nan),
    "label_smoothing": (-0.1, 0.5, 1, math.nan),
    "alpha": (-1.01, math.inf, math.nan),
    "clip_range": (0, 1, -0.1, math.nan),
    "mask_threshold": (-0.1, 1.0, math.nan),
}
_SETTINGS = {"dpo": 2, "poly": 3, "dpo_cm": 5, "sipo": 5}  # how many of the above each loss has, in that order


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        (name, setting, value)
        for name, count in _SETTINGS.items()
        for setting in list(_IMPOSSIBLE)[:count]
        for value in _IMPOSSIBLE[setting]
    ],
)
def test_settings_out_of_range_name_themselves(name, setting, value):
    with pytest.raises(ConfigurationError, match=f"{setting}={value}"):
        _CALLS[name](**{"beta": 1.0, setting: value})


@pytest.mark.parametrize("name", _CALLS)
def test_settings_at_the_edge_of_their_range_are_accepted(name):
    settings_ = {"beta": 1e-9, "label_smoothing": 0.0}
    if name != "dpo":
        settings_["alpha"] = -1.0
    assert _CALLS[name](**settings_).isfinite().all()


@pytest.mark.parametrize("name", _CALLS)
def test_tensors_that_would_broadcast_are_refused(name):
    column = torch.zeros(3, 1)
    rest = [] if name in ("dpo", "poly") else [torch.zeros(3), torch.zeros(3)]
    loss = {"dpo": diffusion_dpo_loss, "poly": poly_dpo_loss, "dpo_cm": dpo_cm_loss, "sipo": sipo_loss}[name]
    extra = {"poly": {"alpha": 0.0}, "dpo_cm": {"clip_range": 0.1}, "sipo": {"clip_range": 0.1}}.get(name, {})
    with pytest.raises(AssertionError):
        loss(torch.zeros(3), column, *rest, beta=1.0, **extra)
