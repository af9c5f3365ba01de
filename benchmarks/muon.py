"""Muon for recovery runs (`recovery.py run --muon`), matrices of one shape at a time.

Updates are orthogonalised momentum (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024),
as large as AdamW's (Liu et al., arXiv 2502.16982, equation 4). `torch.optim.Muon` does the same one matrix after
another, which for a model of 210 small ones takes as long as their gradients.
"""

import torch
from torch import nn

from mha2mla.training import RecoveryTrainer

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalise(update: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration in bfloat16 on matrices [N, A, B]: singular values of about 1."""
    x = update.bfloat16()
    if turned := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if turned else x


class MuonWithAdamW(torch.optim.AdamW):
    """Muon for the groups that have `muon=True`, AdamW for all others."""

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["muon"]:
                shapes: dict[torch.Size, list[torch.Tensor]] = {}
                for parameter in group["params"]:
                    shapes.setdefault(parameter.shape, []).append(parameter)
                for alike in shapes.values():
                    self._step_alike(alike, group["lr"])

    def _step_alike(self, parameters: list[torch.Tensor], rate: float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[p]["momentum"] for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        assert len(gradients) == len(parameters)
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = orthogonalise(torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM)))  # Nesterov's
        size = -rate * 0.2 * max(parameters[0].shape) ** 0.5
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype).unbind()), alpha=size)


def use_muon(rate: float, attention_rate: float) -> None:
    """Train matrices of layers by Muon from now on, those of attention at a rate of their own; the rest as before."""

    def create_optimizer(self: RecoveryTrainer, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            args, groups = self.args, []
            rates = {True: (rate, attention_rate), False: (args.learning_rate, args.attention_learning_rate)}
            for muon, (others, own) in rates.items():
                for attention in (False, True):
                    members = [
                        p
                        for name, p in named
                        if (p.dim() == 2 and ".layers." in name) == muon and ("self_attn" in name) == attention
                    ]
                    if members:
                        groups.append(dict(params=members, lr=own if attention and own else others, muon=muon))
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = MuonWithAdamW(groups, betas=betas, eps=args.adam_epsilon, weight_decay=0.0)
        return self.optimizer

    RecoveryTrainer.create_optimizer = create_optimizer  # type: ignore[method-assign]
