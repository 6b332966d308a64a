"""optim: the optimizer and the learning rate of each step.

Source: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101); cosine decay, SGDR (arXiv 1608.03983).
"""
import math

import torch


def make_optimizer(parameters: list[torch.nn.Parameter], knobs) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; weight decay on matrices only, not on norms and biases."""
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": knobs.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=knobs.learning_rate,
                             betas=(knobs.adam_beta1, knobs.adam_beta2), eps=knobs.adam_epsilon,
                             fused=knobs.optimizer == "adamw_torch_fused")


def warmup_steps(knobs, total_steps: int) -> int:
    """Steps of linear warm-up, from `warmup_steps` or `warmup_ratio` of the run."""
    if knobs.warmup_steps is not None:
        return knobs.warmup_steps
    return math.ceil(knobs.warmup_ratio * total_steps)


def learning_rate(knobs, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0). Warm-up starts above zero: at zero, a step is wasted."""
    warmup = warmup_steps(knobs, total_steps)
    if step < warmup:
        return knobs.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {"constant": 1.0,
              "linear": 1.0 - progress,
              "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[knobs.lr_scheduler]
    return knobs.learning_rate * factor
