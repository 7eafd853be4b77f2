"""Rectified-flow algebra and bucket interpolation."""

import pytest
import torch

from tinyflux.util import predictions as flow
from tinyflux.util.buckets import BUCKETS, interpolate


def test_a_point_and_its_velocity_give_back_data_and_noise():
    data, noise, t = torch.randn(4, 6, 3), torch.randn(4, 6, 3), torch.tensor([0.0, 0.3, 0.9, 1.0])
    x_t, v = flow.flow_x_t(data, noise, t), flow.flow_velocity(data, noise)
    assert torch.equal(x_t[0], noise[0]) and torch.equal(x_t[3], data[3])
    torch.testing.assert_close(flow.flow_data(x_t, v, t), data)
    torch.testing.assert_close(flow.flow_noise(x_t, v, t), noise)
    torch.testing.assert_close(flow.euler_step(x_t[1], v[1], 0.3, 1.0), data[1])


@pytest.mark.parametrize("target", flow.FORMS)
@pytest.mark.parametrize("source", flow.FORMS)
def test_forms_convert_into_each_other(source, target):
    data, noise = torch.randn(2, 5, 6, 3, dtype=torch.float64)
    t = torch.tensor([1e-3, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    x_t = flow.flow_x_t(data, noise, t)
    prediction = flow.join(data, noise, source, t)
    torch.testing.assert_close(flow.split(prediction, source, x_t, t), (data, noise))
    torch.testing.assert_close(flow.convert(prediction, source, target, x_t, t), flow.join(data, noise, target, t))


def test_forms_at_the_ends_of_the_path():
    data, noise = torch.randn(2, 2, 6, 3)
    t = torch.tensor([0.0, 1.0])
    v = flow.join(data, noise, "v", t)
    assert torch.equal(v[0], -data[0]) and torch.equal(v[1], noise[1])
    torch.testing.assert_close(flow.convert(v, "v", "flow", flow.flow_x_t(data, noise, t), t), data - noise)
    assert not flow.split(noise, "epsilon", noise, torch.zeros(2))[0].isfinite().any()
    with pytest.raises(ValueError, match="'x0'; known: flow, v, epsilon"):
        flow.convert(v, "x0", "flow", noise, t)


def test_interpolation_is_linear_inside_the_grid_and_clamped_outside():
    grid = torch.tensor(BUCKETS)
    features = torch.stack((grid, 2 * grid + 1), dim=1).repeat(6, 1, 1).half()  # [6, 10, 2]
    t = torch.tensor([0.0, 0.05, 0.1, 0.5, 0.95, 1.0])
    inside = t.clamp(0.05, 0.95)
    torch.testing.assert_close(interpolate(features, t), torch.stack((inside, 2 * inside + 1), 1), atol=2e-3, rtol=0)


def test_interpolation_on_an_uneven_grid():
    grid = (0.1, 0.2, 0.6)
    features = torch.tensor(grid).square().repeat(5, 1)[..., None]  # [5, 3, 1]
    found = interpolate(features, torch.tensor([0.0, 0.15, 0.2, 0.5, 1.0]), grid)[:, 0]
    torch.testing.assert_close(found, torch.tensor([0.01, 0.025, 0.04, 0.28, 0.36]))


def test_a_grid_of_another_length_is_refused():
    with pytest.raises(ValueError, match="9 timestep buckets, the grid has 10"):
        interpolate(torch.zeros(2, 9, 4), torch.zeros(2))
