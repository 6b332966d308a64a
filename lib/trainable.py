"""trainable: why a model type can't be trained here, said before anything is loaded.

The kit trains decoders that continue a text: token t+1 from what stands up to t, by the logits of the output
head. What transformers' tables also hold (encoder-decoders, denoisers, robots' policies, models that change
their logits afterwards) would train on something else than its rows say, in silence.
"""
import inspect
import re

from lib.stage import StageError

OTHER = "choose another base_model: this kit trains models that continue a text"
# What may become of logits between head and loss: nothing, float32, or the bound that lib/loss.py knows.
KNOWN = re.compile(r"self\.\w+\((?!logits)[^*/]*\)(\.float\(\))?|outputs?(\[0\]|\.logits).*"
                   r"|logits\.(float|to)\(.*\)|logits [*/] .*final_logit_softcapping|torch\.tanh\(logits\)")
FACTOR = re.compile(r".* [*/] (?:\w+\.)*(\w+)")


def refuse_other_objectives(config) -> None:
    """A StageError for an encoder-decoder, whose replies aren't the end of its input."""
    if getattr(config, "is_encoder_decoder", False):
        raise StageError(f"base_model: {config.model_type} is an encoder-decoder", OTHER)


def refuse_other_losses(model) -> None:
    """A StageError for a class without a next-token loss, or whose logits lib/loss.py would get wrong."""
    name, forward = type(model).__name__, type(model).forward
    if "labels" not in inspect.signature(forward).parameters or model.get_output_embeddings() is None:
        raise StageError(f"base_model: {name} predicts no next token", OTHER)
    changes = re.findall(r"^ *logits(?:\[.*\])? = (.+?)(?: *#.*)?$", inspect.getsource(forward), re.M)
    for change in (change for change in changes if not KNOWN.fullmatch(change)):
        factor = FACTOR.fullmatch(change)
        value = getattr(model.config.get_text_config(), factor[1], None) if factor else None
        if value != 1:
            why = f"{factor[1]} = {value:g}" if value else change
            raise StageError(f"base_model: {name} changes its logits after the output head ({why})",
                             "teach lib/loss.py:capped the same, or choose another base_model")
