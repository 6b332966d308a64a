"""optim: the optimizer, the learning rate of each step, and a watch that what trains gets a gradient.

Source: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101); cosine decay, SGDR (arXiv 1608.03983).
"""
import math

import torch

from lib import terminal
from lib.parallel import World


def make_optimizer(parameters: list[torch.nn.Parameter], knobs) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; weight decay on matrices only, not on norms and biases."""
    matrices = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": knobs.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=knobs.learning_rate,
                             betas=(knobs.adam_beta1, knobs.adam_beta2), eps=knobs.adam_epsilon,
                             fused=knobs.optimizer == "adamw_torch_fused")


def warmup_steps(knobs, total_steps: int) -> int:
    """Steps of linear warm-up, from `warmup_steps` or `warmup_ratio` of the run."""
    if knobs.warmup_steps is not None:
        return knobs.warmup_steps
    return math.ceil(knobs.warmup_ratio * total_steps)


def learning_rate(knobs, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0). Warm-up starts above zero: no step is wasted."""
    warmup = warmup_steps(knobs, total_steps)
    if step < warmup:
        return knobs.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {"constant": 1.0,
              "linear": 1.0 - progress,
              "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[knobs.lr_scheduler]
    return knobs.learning_rate * factor


MEDIA_ROLES = ("vision", "audio", "projector", "cross_attention")  # no medium, no gradient


class GradientWatch:
    """Stops a run in which something trains that never gets a gradient: it would be saved as it was.

    A tensor has until its second step, because LoRA's A gets a gradient only once B has moved. For what lies
    on the way of a medium, only steps with media count, unless the data have none at all.
    """

    def __init__(self, roles: dict[str, str], data_have_media: bool):
        self.waiting, self.data_have_media = dict(roles), data_have_media  # {parameter name: role}
        self.steps = self.steps_with_media = 0

    def look(self, parameters: dict[str, torch.nn.Parameter], world: World, step_has_media: bool) -> None:
        """Nothing; called before a step's update, it stops all ranks and names what got no gradient."""
        self.steps += 1
        self.steps_with_media += step_has_media
        self.waiting = {name: role for name, role in self.waiting.items() if not moved(parameters[name])}
        late = [name for name, role in self.waiting.items() if self._steps_for(role) >= 2]
        if without := [name for name in late if self.waiting[name] != "experts"]:
            world.stop(f"{len(without)} of {len(parameters)} trained tensors got no gradient in two steps, "
                       f"such as {without[0]}", f"the data lack what {self.waiting[without[0]]} learns from: "
                       "leave that role out of lora_target_roles or train_roles")
        if late:
            terminal.warn(f"{len(late)} tensors of experts have had no gradient: no token was sent to them")
        for name in late:
            del self.waiting[name]

    def _steps_for(self, role: str) -> int:
        return self.steps_with_media if role in MEDIA_ROLES and self.data_have_media else self.steps


def moved(parameter: torch.nn.Parameter) -> bool:
    """Whether the parameter has a gradient other than zero."""
    return parameter.grad is not None and bool(parameter.grad.any())
