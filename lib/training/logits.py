"""logits: how a model changes its output head's logits before the loss, read off its class's forward.

loss.py computes the loss in place of the head, so it has to change logits in the same way: most models
don't, some multiply by a number of their configuration (Granite, Cohere), Gemma bounds them by a softcap.
Models that do anything else are refused before they are loaded (lib/models/trainable.py).

Fork me to: teach the loss another change (`KNOWN`, `Finish`).
"""
import functools
import inspect
import re
from dataclasses import dataclass
from numbers import Real

import torch

CHANGE = re.compile(r"^ *logits(?:\[.*\])? = (.+?)(?: *#.*)?$", re.M)
# Assignments that change nothing, cast to float32, or apply a softcap, which `Finish` does.
KNOWN = re.compile(r"self\.\w+\((?!logits)[^*/]*\)(\.float\(\))?|outputs?(\[0\]|\.logits).*"
                   r"|logits\.(float|to)\(.*\)|logits [*/] .*final_logit_softcapping|torch\.tanh\(logits\)")
FACTOR = re.compile(r"(?:logits|self\.\w+\([^*/]*\)) ([*/]) (?:\w+\.)*(\w+)")


@dataclass(frozen=True)
class Finish:
    """How the head's logits become the model's: times factor, then softcap * tanh(logits / softcap)."""
    factor: float = 1
    softcap: float | None = None

    @classmethod
    def of(cls, model) -> "Finish":
        """The Finish of a model, with an adapter or without."""
        base, factor = base_of(model), 1
        for change in changes(type(base)):
            factor *= factor_of(base, change) or 1
        softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        heeds = "final_logit_softcapping" in source(type(base))       # not every class does
        return cls(factor, softcap if heeds else None)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits, made of its output head's."""
        logits = logits if self.factor == 1 else logits * self.factor
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative of the model's logits with respect to its head's; logits: the model's."""
        return self.factor if self.softcap is None else self.factor * (1 - (logits / self.softcap) ** 2)


UNCHANGED = Finish()


@functools.cache
def source(cls: type) -> str:
    """The source code of a class's forward."""
    return inspect.getsource(cls.forward)


def changes(cls: type) -> list[str]:
    """The expressions that a model's class assigns to its logits, without those that KNOWN matches."""
    return [change for change in CHANGE.findall(source(cls)) if not KNOWN.fullmatch(change)]


def factor_of(base, change: str) -> float | None:
    """The number that an expression multiplies logits by; None if it does something else."""
    product = FACTOR.fullmatch(change)
    value = getattr(base.config.get_text_config(), product[2], None) if product else None
    if product and value is None and f"if self.{product[2]} is not None:" in source(type(base)):
        return 1
    if not isinstance(value, Real) or not value:
        return None
    return value if product[1] == "*" else 1 / value


def base_of(model):
    """The model itself, without the adapter around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
