"""The training loop, losses, optimizers, parallelism, sampling and notebook caches."""
