"""optim: the optimizer, the learning rate of each step, and a watch that what trains gets a gradient.

Source: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101); cosine decay, SGDR (arXiv 1608.03983).
"""
import math

import torch

from lib import terminal
from lib.parallel import World


def make_optimizer(parameters: dict[str, torch.nn.Parameter], roles: dict[str, str],
                   knobs) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; weight decay on matrices only, not on norms and biases.

    roles: parameter name -> role. Each group's "share" is its learning rate as a part of the run's.
    """
    groups: dict[tuple[float, bool], list] = {}
    for name, p in parameters.items():
        groups.setdefault((rate_share(name, roles[name], knobs), p.dim() >= 2), []).append(p)
    groups = [{"params": found, "share": share, "weight_decay": knobs.weight_decay if matrices else 0.0}
              for (share, matrices), found in groups.items()]
    options = {"lr": knobs.learning_rate, "betas": (knobs.adam_beta1, knobs.adam_beta2),
               "eps": knobs.adam_epsilon}
    if knobs.optimizer.startswith("adamw_torch"):
        return torch.optim.AdamW(groups, fused=knobs.optimizer == "adamw_torch_fused", **options)
    import bitsandbytes
    cls = {"adamw_bnb_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}[knobs.optimizer]
    return getattr(bitsandbytes.optim, cls)(groups, **options)


def rate_share(name: str, role: str, knobs) -> float:
    """A parameter's learning rate as a part of the run's: by its role, and LoRA+'s ratio on B matrices.

    Source: LoRA+ (arXiv 2402.12354).
    """
    of_role = {"vision": knobs.learning_rate_vision, "audio": knobs.learning_rate_audio,
               "projector": knobs.learning_rate_projector}.get(role)
    share = 1.0 if of_role is None else of_role / knobs.learning_rate
    return share * (knobs.loraplus_lr_ratio if ".lora_B." in name else 1.0)


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
    low = knobs.cosine_min_lr_ratio
    factor = {"constant": 1.0,
              "linear": 1.0 - progress,
              "cosine": low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))}[knobs.lr_scheduler]
    return knobs.learning_rate * factor


LEARNS_FROM = {"vision": {"image", "video"}, "audio": {"audio"},    # without such a medium, no gradient
               "projector": {"image", "video", "audio"}, "cross_attention": {"image", "video", "audio"}}


class GradientWatch:
    """Stops a run in which something trains that never gets a gradient: it would be saved as it was.

    A tensor has until its second step, because LoRA's A gets a gradient only once B has moved. For what lies
    on the way of a medium, only steps with such media count, unless the data have none at all.
    """

    def __init__(self, roles: dict[str, str], kinds_in_data: set[str]):
        self.waiting = dict(roles)                                 # {parameter name: role}
        self.learnt: set[str] = set()                              # roles of which something has moved
        self.kinds_in_data = kinds_in_data
        self.steps, self.steps_for = 0, dict.fromkeys(LEARNS_FROM, 0)

    def look(self, parameters: dict[str, torch.nn.Parameter], world: World, kinds: set[str]) -> None:
        """Nothing; called before a step's update, it stops all ranks and names what got no gradient.

        kinds: those of the step's media. Experts may have had no token yet, and a model with a projector for
        sounds may train on pictures: of these roles, what got none is only reported.
        """
        self.steps += 1
        for role, wanted in LEARNS_FROM.items():
            self.steps_for[role] += bool(kinds & wanted) or not self.kinds_in_data & wanted
        still = {name: role for name, role in self.waiting.items() if not moved(parameters[name])}
        self.learnt |= {role for name, role in self.waiting.items() if name not in still}
        self.waiting = still
        late = [name for name, role in self.waiting.items() if self.steps_for.get(role, self.steps) >= 2]
        spared = {"experts", "embedding"} | ({"projector"} & self.learnt)
        if without := [name for name in late if self.waiting[name] not in spared]:
            world.stop(f"{len(without)} of {len(parameters)} trained tensors got no gradient in two steps, "
                       f"such as {without[0]}", f"the data lack what {self.waiting[without[0]]} learns from: "
                       "leave that role out of lora_target_roles or train_roles")
        if late:
            of = " and ".join(sorted({self.waiting[name] for name in late}))
            terminal.warn(f"{len(late)} tensors of {of} have had no gradient: no token was sent to them")
        for name in late:
            del self.waiting[name]


def moved(parameter: torch.nn.Parameter) -> bool:
    """Whether the parameter has a gradient other than zero."""
    return parameter.grad is not None and bool(parameter.grad.any())
