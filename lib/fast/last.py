"""last: the last layer's MLP, computed only at positions that predict a trained token.

After the last attention no position depends on another, and the loss reads the hidden states of supervised
positions only. So the MLP's output elsewhere changes neither loss nor gradient, and is set to zero. Most of a
layer's matrix products are the MLP's: the fewer layers a model has, the larger the part that this saves.

Used inside lib/fast's `paths` only. Fork me to: do the same with another part of the layer (`parts`).
"""
import torch

from lib.fast import adapted

FULL = 64                                 # positions are padded to a multiple: few sizes reuse memory best

positions: torch.Tensor | None = None     # [N], in the current batch's [B*T]; None: all are wanted


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
    """[the gated MLP of the language model's last layer], or [] where it has none, as with experts."""
    layers = [layer for role, layer in roles.layers(model) if role == "language"]
    return [part for part in layers[-1].children() if adapted.is_gated(part)] if layers else []


def forward(whole, x: torch.Tensor) -> torch.Tensor:
    """The MLP's output [B, T, D], by its own forward `whole` at the wanted positions; zeros elsewhere."""
    if positions is None:
        return whole(x)
    at = positions.to(x.device)
    found = whole(x.flatten(0, 1).index_select(0, at)[None])[0]                  # [N, D]
    return found.new_zeros(x.shape).flatten(0, 1).index_copy(0, at, found).view(x.shape)
