"""hooks: a user's own functions, which a recipe names as path/to/file.py:function.

    optimizer: mine.py:make_optimizer    make_optimizer(groups, knobs) -> torch.optim.Optimizer
        groups: what trains, as torch's param_groups, with the "weight_decay" of each and its "share" of the
        run's learning rate: before a step, the loop sets each group's "lr" to that step's rate times "share".
    lr_scheduler: mine.py:rate           rate(step, steps) -> the part of learning_rate that a step takes
        Steps count from 0 at the end of the warm-up; there are `steps` of them.
    loss: mine.py:token_losses           token_losses(logits [N, V], targets [N]) -> losses [N]
        Of trained tokens only, a chunk of a batch at a time; the loop sums the losses and divides by the
        number of tokens.
    eval_metrics: [mine.py:score]        score(answers, references) -> a number
        Two lists of texts. The number is written down as eval_score.

A hook's file is part of the stage's source: where its code changed, the stage is out of date (run/code.py).
What that file imports from others of the user's isn't followed.
"""
import functools
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial

import torch

from lib.run.errors import StageError
from lib.run.ledger import HOOK
from lib.training import faults
from lib.training.loss import forward_loss


def refuse_missing(knobs) -> None:
    """Raise StageError, before weights are loaded, where a function that the recipe names can't be had."""
    named = {"optimizer": [knobs.optimizer], "lr_scheduler": [knobs.lr_scheduler], "loss": [knobs.loss],
             "eval_metrics": knobs.eval_metrics}
    for knob, texts in named.items():
        for text in filter(HOOK.fullmatch, texts):
            function(knob, text)


def function(knob: str, text: str) -> Callable:
    """The function that a knob's value names; what it raises becomes a StageError."""
    path, name = HOOK.fullmatch(text).groups()
    return loaded(knob, os.path.abspath(path), name)


@functools.cache
def loaded(knob: str, path: str, name: str) -> Callable:
    """The function `name` of a user's file, wrapped by `guarded`; the file is run only once."""
    spec = importlib.util.spec_from_file_location(f"hook {path}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    guarded(knob, path, spec.loader.exec_module)(module)
    if not callable(getattr(module, name, None)):
        raise StageError(f"{knob}: {os.path.relpath(path)} has no function {name}",
                         f"write `def {name}(…):` there")
    return guarded(knob, path, getattr(module, name))


def guarded(knob: str, path: str, called: Callable) -> Callable:
    """A function that calls a user's and turns what it raises into a StageError with the user's line.

    Out of memory is raised as it is, for lib/training/faults.py to explain.
    """
    def call(*given):
        try:
            return called(*given)
        except Exception as error:  # a user's function raises what it likes: one of the three boundaries
            if isinstance(error, StageError) or faults.is_no_memory(error):
                raise
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename == path]
            place, shown = f":{lines[-1]}" if lines else "", os.path.relpath(path)
            raise StageError(f"{knob}: {shown}{place}: {type(error).__name__}: {error}",
                             f"mend {shown}") from error
    return call


def wrong(knob: str, text: str, returned, wanted: str) -> StageError:
    """The error for a hook that didn't return what it has to."""
    what = f"a tensor of shape {list(returned.shape)}" if hasattr(returned, "shape") else repr(returned)
    return StageError(f"{knob}: {text} returned {what}, not {wanted}",
                      "lib/training/hooks.py says what it is given")


# ---- the loss ----

def loss_of(knobs) -> Callable:
    """The loop's loss function: `forward_loss`, or for a hook `hooked_loss` with the user's function."""
    return partial(hooked_loss, knobs.loss) if HOOK.fullmatch(knobs.loss) else forward_loss


def hooked_loss(text: str, model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the user's token losses, number of right tokens), in the place of `forward_loss`."""
    token_losses = function("loss", text)

    def of_chunk(logits, targets):
        losses = token_losses(logits, targets)
        if not isinstance(losses, torch.Tensor) or losses.shape != targets.shape:
            raise wrong("loss", text, losses, f"the losses of {len(targets)} tokens")
        return losses.sum()
    return forward_loss(model, batch, of_chunk)
