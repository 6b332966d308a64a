"""optim: the optimizer, its update, the learning rate of each step, and clipping.

Source: AdamW, Loshchilov & Hutter 2019 (arXiv 1711.05101); cosine decay, SGDR (arXiv 1608.03983).
"""
import math

import torch

from lib.run.errors import StageError
from lib.run.ledger import HOOK
from lib.training import hooks


def make_optimizer(parameters: dict[str, torch.nn.Parameter], roles: dict[str, str],
                   knobs) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; weight decay on matrices only, not on norms and biases.

    roles: {parameter name: role}. Each group's "share" is its learning rate over the run's.
    """
    groups: dict[tuple[float, float], list] = {}
    for name, p in parameters.items():
        share, decay = rate_share(name, roles[name], knobs), of_role(roles[name], knobs)[1]
        groups.setdefault((share, decay if p.dim() >= 2 else 0.0), []).append(p)
    groups = [{"params": members, "share": share, "weight_decay": decay}
              for (share, decay), members in groups.items()]
    if HOOK.fullmatch(knobs.optimizer):
        return hooked_optimizer(groups, knobs)
    options = {"lr": knobs.learning_rate, "betas": (knobs.adam_beta1, knobs.adam_beta2),
               "eps": knobs.adam_epsilon}
    if knobs.optimizer.startswith("adamw_torch"):
        return torch.optim.AdamW(groups, fused=knobs.optimizer == "adamw_torch_fused", **options)
    import bitsandbytes
    cls = {"adamw_bnb_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}[knobs.optimizer]
    return getattr(bitsandbytes.optim, cls)(groups, **options)


def hooked_optimizer(groups: list[dict], knobs) -> torch.optim.Optimizer:
    """The optimizer that a user's function makes of the groups; StageError where it can't train with them."""
    trained = {p for group in groups for p in group["params"]}
    made = hooks.function("optimizer", knobs.optimizer)(groups, knobs)
    if not isinstance(made, torch.optim.Optimizer):
        raise hooks.wrong("optimizer", knobs.optimizer, made, "a torch.optim.Optimizer")
    if left := trained ^ {p for group in made.param_groups for p in group["params"]}:
        raise StageError(f"optimizer: {knobs.optimizer} has {len(left)} tensors too few or too many, of "
                         f"{len(trained)} that train", "give it all of groups, and nothing else")
    for group in made.param_groups:                                # groups of its own have rates of their own
        group.setdefault("share", group["lr"] / knobs.learning_rate)
    return made


def numbers_in_groups(optimizer, knobs) -> list[dict[str, float]]:
    """[numbers of each group that a user's optimizer may change, for a checkpoint]; [] for the kit's own."""
    groups = optimizer.param_groups if HOOK.fullmatch(knobs.optimizer) else []
    return [{key: value for key, value in group.items()
             if isinstance(value, (int, float)) and key not in ("lr", "share", "weight_decay")}
            for group in groups]


def own_of(knobs) -> dict[str, tuple[float | None, float | None]]:
    """{role: (learning rate, weight decay)} of the roles that may have their own; None: the run's."""
    return {"vision": (knobs.learning_rate_vision, knobs.weight_decay_vision),
            "audio": (knobs.learning_rate_audio, knobs.weight_decay_audio),
            "projector": (knobs.learning_rate_projector, knobs.weight_decay_projector)}


def of_role(role: str, knobs) -> tuple[float, float]:
    """(learning rate, weight decay) of a role: its own where the recipe gives one."""
    rate, decay = own_of(knobs).get(role, (None, None))
    return (knobs.learning_rate if rate is None else rate, knobs.weight_decay if decay is None else decay)


def rates(knobs, rate: float) -> dict[str, float]:
    """{figure: learning rate} of a step, of the run and of each role that has its own."""
    return {"learning_rate": rate} | {f"learning_rate_{role}": rate * its / knobs.learning_rate
                                      for role, (its, _) in own_of(knobs).items() if its is not None}


def rate_share(name: str, role: str, knobs) -> float:
    """A parameter's learning rate over the run's: by its role, and times LoRA+'s ratio for B matrices.

    Source: LoRA+ (arXiv 2402.12354).
    """
    share = of_role(role, knobs)[0] / knobs.learning_rate
    return share * (knobs.loraplus_lr_ratio if ".lora_B." in name else 1.0)


FIRST_SCALE = 2.0**16


class Scaler(torch.amp.GradScaler):
    """Loss scaling for float16, in which small gradients would underflow; for other dtypes it does nothing.

    A step whose scaled gradients overflow is skipped, and the scale halved, on every rank alike, since all
    look at the same sums. overflows: how many such steps there were.
    Source: mixed precision training (arXiv 1710.03740, section 3.2).
    """

    def __init__(self, dtype: str, device: torch.device, state: dict | None = None):
        super().__init__(device.type, FIRST_SCALE, enabled=dtype == "float16")
        self.overflows = state["overflows"] if state else 0
        if state and self.is_enabled():
            self.load_state_dict({key: value for key, value in state.items() if key != "overflows"})
        self.scale(torch.zeros((), device=device))       # a rank may have no row in its first step
        self.has_gradients = False

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale. A step may have none: one of texts, if only a tower trains."""
        self.has_gradients = any(parameter.grad is not None
                                 for group in optimizer.param_groups for parameter in group["params"])
        if self.has_gradients:
            super().unscale_(optimizer)

    def update(self) -> None:
        """Adapt the scale to the step, if it had gradients."""
        if self.has_gradients:
            super().update()

    def state_dict(self) -> dict:
        """What a checkpoint holds of the scaler, in plain numbers; {} for other dtypes than float16."""
        return super().state_dict() | {"overflows": self.overflows} if self.is_enabled() else {}

    def overflowed(self, scale: float, losses: list, norm: float) -> bool:
        """Whether only the scale made the gradient infinite: losses are finite, and the scale can shrink."""
        finite = all(math.isfinite(loss) for share in losses for loss, _ in share)
        over = self.is_enabled() and finite and not math.isfinite(norm) and scale > 1
        self.overflows += over
        return over

    def figures(self, scale: float) -> dict[str, float]:
        """A step's figures of loss scaling for metrics.jsonl; {} for other dtypes than float16."""
        return {"loss_scale": scale, "overflows": self.overflows} if self.is_enabled() else {}


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
    if HOOK.fullmatch(knobs.lr_scheduler):
        part = hooks.function("lr_scheduler", knobs.lr_scheduler)(step - warmup, total_steps - warmup)
        if not (isinstance(part, (int, float)) and 0 <= part < math.inf):
            raise hooks.wrong("lr_scheduler", knobs.lr_scheduler, part, "a number from 0")
        return knobs.learning_rate * part
    progress = (step - warmup) / max(1, total_steps - warmup)
    low = knobs.cosine_min_lr_ratio
    factor = {"constant": 1.0,
              "linear": 1.0 - progress,
              "cosine": low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))}[knobs.lr_scheduler]
    return knobs.learning_rate * factor


def clip_gradients(parameters: dict[str, torch.nn.Parameter], roles: dict[str, str],
                   max_norm: float) -> dict[str, torch.Tensor]:
    """{"grad_norm": of all gradients, and where several roles train "grad_norm_ROLE": of each role's}.

    The norms are those before clipping; the gradients are clipped in place to max_norm.
    """
    gradients: dict[str, list] = {}
    for name, p in parameters.items():
        gradients.setdefault(roles[name], []).append(p.new_zeros(()) if p.grad is None else p.grad)
    norms = {f"grad_norm_{role}": torch.nn.utils.get_total_norm(own) for role, own in gradients.items()}
    first = next(iter(norms.values())).device                      # device_map: they are on several GPUs
    total = torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in norms.values()]))
    torch.nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, total)
    return {"grad_norm": total, **(norms if len(norms) > 1 else {})}


def update(optimizer: torch.optim.Optimizer, finite: torch.Tensor) -> None:
    """Take the optimizer's step, unless its gradients aren't finite (a bool, on the device).

    torch's fused optimizers check that on the device themselves; for any other the host waits for the answer.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):    # as torch's GradScaler asks
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        del optimizer.found_inf
    elif finite:
        optimizer.step()
