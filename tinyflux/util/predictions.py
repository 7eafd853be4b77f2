"""Rectified-flow algebra (Liu et al., 2022, arXiv:2209.03003). t=0 is pure noise, t=1 is data.

x_t = (1 - t) * noise + t * data,   v = data - noise.  Every tensor is [B, ...], t is [B].
"""

from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """t [B] with as many trailing dimensions as `like`, in its dtype."""
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def flow_x_t(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point between noise and data at t."""
    t = expand(t, data)
    return (1 - t) * noise + t * data


def flow_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """What the network predicts: dx/dt."""
    return data - noise


def flow_data(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Data from a point and its velocity: x_t + (1 - t) v."""
    return x_t + (1 - expand(t, x_t)) * v


def flow_noise(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Noise from a point and its velocity: x_t - t v."""
    return x_t - expand(t, x_t) * v


def euler_step(x_t: Tensor, v: Tensor, t_now: float, t_next: float) -> Tensor:
    """One Euler step along the flow."""
    return x_t + v * (t_next - t_now)
