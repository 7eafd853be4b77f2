"""Rectified-flow algebra (Liu et al., 2022, arXiv:2209.03003). t=0 is pure noise, t=1 is data.

x_t = (1 - t) * noise + t * data,   v = data - noise.  Every tensor is [B, ...], t is [B].

A network may predict one of three forms: `flow`, the v above; `epsilon`, the noise; and `v`, that of Salimans & Ho
(2022, arXiv:2202.00512, appendix D), alpha * noise - sigma * data with alpha^2 + sigma^2 = 1. On this path
alpha, sigma = (t, 1 - t) / norm with norm^2 = t^2 + (1 - t)^2.
"""

from torch import Tensor

FORMS = ("flow", "v", "epsilon")


def expand(t: Tensor, like: Tensor) -> Tensor:
    """t [B] with as many trailing dimensions as `like`, in its dtype."""
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def flow_x_t(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point between noise and data at t."""
    t = expand(t, data)
    return (1 - t) * noise + t * data


def flow_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """The velocity dx/dt, which the network predicts."""
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


def split(prediction: Tensor, form: str, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(data, noise) at x_t from a prediction of that form.

    With `epsilon`, the data is not finite at t = 0, because x_t is pure noise there.
    """
    if form == "flow":
        return flow_data(x_t, prediction, t), flow_noise(x_t, prediction, t)
    s = expand(t, x_t)
    if form == "epsilon":
        return (x_t - (1 - s) * prediction) / s, prediction
    if form == "v":
        squared = s**2 + (1 - s) ** 2
        v = squared.sqrt() * prediction
        return (s * x_t - (1 - s) * v) / squared, ((1 - s) * x_t + s * v) / squared
    raise ValueError(f"no such form: {form!r}; known: {', '.join(FORMS)}")


def join(data: Tensor, noise: Tensor, form: str, t: Tensor) -> Tensor:
    """The prediction of a perfect network of that form."""
    if form == "flow":
        return flow_velocity(data, noise)
    if form == "epsilon":
        return noise
    if form == "v":
        s = expand(t, data)
        return (s * noise - (1 - s) * data) / (s**2 + (1 - s) ** 2).sqrt()
    raise ValueError(f"no such form: {form!r}; known: {', '.join(FORMS)}")


def convert(prediction: Tensor, source: str, target: str, x_t: Tensor, t: Tensor) -> Tensor:
    """A prediction at x_t in another form."""
    return join(*split(prediction, source, x_t, t), target, t)
