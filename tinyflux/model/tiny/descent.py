"""The optimizer for training the tiny zoo in minutes."""

import math

import torch
from torch import Tensor, nn


class Descent:
    """Muon for matrices and convolutions, AdamW for embeddings and vectors; warm-up, then cosine decay.

    Muon (Jordan, 2024, https://kellerjordan.github.io/posts/muon): the update is the momentum's nearest orthogonal
    matrix, by five Newton-Schulz steps. A convolution is treated as a matrix [out, in * kernel]. Here it needs about a
    third of AdamW's steps.
    """

    def __init__(self, model: nn.Module, steps: int, lr: float = 0.02, adam_lr: float = 2e-3, warmup: int = 50):
        """lr 0: AdamW for everything."""
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.parameters = list(model.parameters())
        self.matrices = [p for p in self.parameters if lr and p.ndim > 1 and id(p) not in embeddings]
        taken = {id(p) for p in self.matrices}
        rest = [p for p in self.parameters if id(p) not in taken]
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.momentum = [torch.zeros_like(p) for p in self.matrices]
        self.step_count, self.steps, self.warmup, self.lr, self.adam_lr = 0, steps, warmup, lr, adam_lr

    def step(self, loss: Tensor) -> None:
        """One optimizer step on `loss`."""
        for p in self.parameters:
            p.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        rate = min(1, (self.step_count + 1) / self.warmup)
        rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step_count / self.steps))
        for group in self.adam.param_groups:
            group["lr"] = rate * self.adam_lr
        self.adam.step()
        with torch.no_grad():
            for p, momentum in zip(self.matrices, self.momentum, strict=True):
                if p.grad is not None:
                    momentum.mul_(0.95).add_(p.grad)
                    update = orthogonal((p.grad + 0.95 * momentum).flatten(1))
                    p.add_(update.view_as(p), alpha=-rate * self.lr * max(1, update.shape[0] / update.shape[1]) ** 0.5)
        self.step_count += 1


def orthogonal(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Approximately the nearest matrix with all singular values 1."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
