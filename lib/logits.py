"""logits: what a model makes of them between its output head and its loss, read off its class's forward.

The loss stands in the place of the head (lib/loss.py), so it has to do the same: most models do nothing,
some multiply by a number of their configuration (Granite, Cohere), Gemma's are bounded. Anything else is
refused before a model is loaded (lib/trainable.py).

Fork me to: teach the loss another change (`KNOWN`, `Finish`).
"""
import functools
import inspect
import re
from dataclasses import dataclass
from numbers import Real

import torch

CHANGE = re.compile(r"^ *logits(?:\[.*\])? = (.+?)(?: *#.*)?$", re.M)
# Nothing, float32, or the bound of a `Finish`.
KNOWN = re.compile(r"self\.\w+\((?!logits)[^*/]*\)(\.float\(\))?|outputs?(\[0\]|\.logits).*"
                   r"|logits\.(float|to)\(.*\)|logits [*/] .*final_logit_softcapping|torch\.tanh\(logits\)")
FACTOR = re.compile(r"(?:logits|self\.\w+\([^*/]*\)) ([*/]) (?:\w+\.)*(\w+)")


@dataclass(frozen=True)
class Finish:
    """What becomes of the output head's logits: times `factor`, and softcap * tanh(logits / softcap)."""
    factor: float = 1
    softcap: float | None = None

    @classmethod
    def of(cls, model) -> "Finish":
        """That of a model, with an adapter or without."""
        base, factor = base_of(model), 1
        for change in changes(type(base)):
            factor *= factor_of(base, change) or 1
        softcap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        heeds = "final_logit_softcapping" in source(type(base))       # not every class does
        return cls(factor, softcap if heeds else None)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits, of its head's."""
        logits = logits if self.factor == 1 else logits * self.factor
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative of the model's logits, which are given, by its head's."""
        return self.factor if self.softcap is None else self.factor * (1 - (logits / self.softcap) ** 2)


UNCHANGED = Finish()


@functools.cache
def source(cls: type) -> str:
    """The source of a class's forward."""
    return inspect.getsource(cls.forward)


def changes(cls: type) -> list[str]:
    """What a model's class assigns to its logits, but for what leaves them as they are or bounds them."""
    return [change for change in CHANGE.findall(source(cls)) if not KNOWN.fullmatch(change)]


def factor_of(base, change: str) -> float | None:
    """What a change multiplies logits by; None if it is another change."""
    product = FACTOR.fullmatch(change)
    value = getattr(base.config.get_text_config(), product[2], None) if product else None
    if not isinstance(value, Real) or not value:
        return None
    return value if product[1] == "*" else 1 / value


def base_of(model):
    """The model itself, under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
