"""last: the last layer's MLP, computed only where something is predicted.

Behind the last attention nothing goes from one position to another, and the loss looks at the states of
supervised positions alone. So what the MLP would make of the others changes neither loss nor gradient: they
get zeros. Its products are most of a layer's, so that this saves the more, the fewer layers a model has.

Inside lib/fast.py's `paths` only. Fork me to: do the same with another part of the layer (`parts`).
"""
import torch

from lib import adapted

FULL = 64                                 # so many positions or a multiple: memory of few sizes is used again

positions: torch.Tensor | None = None     # [N] of the [B*T] of the batch in hand; None: all are wanted


def of_batch(batch: dict) -> None:
    """Note at which positions the loss reads the states of this batch, for its forward and its backward.

    They are filled up to a multiple of FULL with the batch's last position. It predicts nothing, so repeating
    it changes nothing.
    """
    global positions
    positions = batch.get("positions")
    if positions is not None:
        more = max(FULL, len(positions) + -len(positions) % FULL) - len(positions)
        positions = torch.cat([positions, positions.new_full((more,), batch["input_ids"].numel() - 1)])


def parts(model, roles) -> list[torch.nn.Module]:
    """The MLP with a gate of the language model's last layer, if it has one: no expert sees all positions."""
    layers = [layer for role, layer in roles.layers(model) if role == "language"]
    return [part for part in layers[-1].children() if adapted.is_gated(part)] if layers else []


def forward(whole, x: torch.Tensor) -> torch.Tensor:
    """What `whole` makes of x [B, T, D] at the wanted positions, and zeros elsewhere."""
    if positions is None:
        return whole(x)
    at = positions.to(x.device)
    found = whole(x.flatten(0, 1).index_select(0, at)[None])[0]                  # [N, D]
    return found.new_zeros(x.shape).flatten(0, 1).index_copy(0, at, found).view(x.shape)
