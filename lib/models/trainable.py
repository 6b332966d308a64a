"""trainable: refuses model types that can't be trained here, before anything is loaded.

The kit trains decoders that continue a text: they predict token t+1 from all up to t, by the logits of the
output head. Transformers' tables hold others, too (encoder-decoders, denoisers, robots' policies, models that
change their logits afterwards), which would silently train on something else than their rows say.
"""
import inspect

from lib.run.errors import StageError
from lib.training import logits

OTHER = "choose another base_model: this kit trains models that continue a text"


def refuse_other_objectives(config) -> None:
    """Raise StageError for an encoder-decoder, whose replies aren't the end of its input."""
    if getattr(config, "is_encoder_decoder", False):
        raise StageError(f"base_model: {config.model_type} is an encoder-decoder", OTHER)


def refuse_other_losses(model) -> None:
    """Raise StageError for a class without a next-token loss, or whose logits `loss` would get wrong."""
    name, forward = type(model).__name__, type(model).forward
    if "labels" not in inspect.signature(forward).parameters or model.get_output_embeddings() is None:
        raise StageError(f"base_model: {name} predicts no next token", OTHER)
    for change in logits.changes(type(model)):
        if logits.factor_of(model, change) is None:
            raise StageError(f"base_model: {name} changes its logits after the output head ({change})",
                             "teach lib/training/logits.py the same, or choose another base_model")
