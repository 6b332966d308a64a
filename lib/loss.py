"""loss: cross-entropy on supervised positions only, a chunk of logits at a time, in the model's own forward.

The full logits of a batch ([B, T, V] in float32) are often larger than the model. Here the output head never
runs on a position that isn't trained, and never on more than a chunk of them at once.

Fork me to: change the objective (`trained_head_loss`, which autograd follows), as a recipe's `loss` does.
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lib import attention, features, last
from lib.collator import IGNORE_INDEX
from lib.logits import UNCHANGED, Finish
from lib.stage import StageError

NOT_INPUTS = ("labels", "positions", "targets", "packed_rows", "features")
CHUNK = 256                               # rows of logits at once; of a large vocabulary, fewer,
CHUNK_LOGITS = {"cpu": 2**23}             # so that there are no more of them: 16 MiB in bfloat16,
ELSEWHERE = 2**25                         # or 64 MiB, since a GPU has to read the head for each chunk,
WIDE_LOGITS = {"cpu": 2**19}              # and of those, so many in float32: 2 MiB, or on a GPU all of them


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions [N] in the flattened [B*T] hidden states, targets [N]): hidden state t predicts token t+1.

    Runs on the CPU in the collator: finding them on a GPU would stall it.
    """
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    return rows * labels.shape[1] + columns, labels[rows, columns + 1]


def forward_loss(model, batch: dict, of_chunk: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of token losses, number of right tokens), scalars, of one forward through the root module.

    A target is right if no other token has a larger logit.
    batch: the collator's tensors on the model's device, with `positions` and `targets` [N]. Divide by a token
    count outside: the right one is the whole optimizer step's. of_chunk(logits [N, V], targets [N]): the sum
    of their losses, in place of cross-entropy's.
    """
    head, finish = model.get_output_embeddings(), Finish.of(model)
    logits, at = head.forward, next(head.parameters()).device     # `weight` is made anew where new rows train
    vocabulary = model.config.get_text_config().vocab_size
    size, wide = (max(1, min(CHUNK, most.get(at.type, ELSEWHERE) // vocabulary))
                  for most in (CHUNK_LOGITS, WIDE_LOGITS))
    targets = batch["targets"].to(at)
    frozen = isinstance(head, torch.nn.Linear) and not any(p.requires_grad for p in head.parameters())
    if frozen and of_chunk is None:
        return in_place_of_logits(model, batch, lambda rows: FrozenHeadLoss.apply(
            rows.to(at), head.weight, head.bias, targets, finish, size, wide))
    of_chunk = of_chunk or partial(F.cross_entropy, reduction="sum")
    return in_place_of_logits(model, batch, lambda rows: trained_head_loss(
        rows.to(at), logits, targets, finish, size, of_chunk))


@torch.no_grad()
def supervised_states(model, batch: dict) -> torch.Tensor:
    """The last hidden states [N, D] of the supervised positions, of one forward through the root module."""
    return in_place_of_logits(model, batch, lambda rows: rows)


def in_place_of_logits(model, batch: dict, compute):
    """What `compute` makes of the supervised positions' last hidden states [N, D], in one forward.

    It takes the place of the output head for that forward; the model gets logits with an empty vocabulary
    axis. Replacing the call, not the model, is one way for every family, and hooks on the root (FSDP2's, for
    one) run as in any forward.
    """
    inputs = {key: value for key, value in batch.items() if key not in NOT_INPUTS} | features.of_batch(batch)
    attention.of_batch(batch), last.of_batch(batch)
    head, result = model.get_output_embeddings(), []

    def instead(hidden):                  # [B, T, D]
        if hidden.shape[:2] != batch["input_ids"].shape:
            raise StageError(f"{type(model).__name__}: its output head sees {hidden.shape[1]} positions of "
                             f"{batch['input_ids'].shape[1]}", "choose another base_model")
        positions = batch["positions"].to(hidden.device)          # a shared-out model ends on another GPU
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)           # [N, D]
        result.append(compute(rows))
        return hidden[..., :0]

    own = vars(head).get("forward")       # of lib/fast.py, where the head has LoRA
    head.forward = instead
    try:
        model(**inputs, use_cache=False)
    finally:
        del head.forward
        if own is not None:
            head.forward = own
    return result[0]


def trained_head_loss(rows, head, targets, finish: Finish, size: int,
                      of_chunk: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss sum, right count) where the head trains: the backward makes its logits again, `size` rows a time.
    """
    def chunk_loss(hidden, wanted):
        logits = finish(head(hidden).float())             # [size, V]
        of_answers = logits.detach().gather(1, wanted[:, None])
        right = (of_answers == logits.detach().amax(-1, keepdim=True)).sum()
        return of_chunk(logits, wanted), right

    total, right = 0, 0
    for hidden, wanted in zip(rows.split(size), targets.split(size)):  # no rows: one chunk all the same
        with set_checkpoint_early_stop(False):          # which is an exception, inside a user's function
            loss, count = checkpoint(chunk_loss, hidden, wanted, use_reentrant=False)
        total, right = total + loss, right + count
    return total, right


class FrozenHeadLoss(torch.autograd.Function):
    """(loss sum, right count) for a head that doesn't train: each chunk's gradient is made with its logits.

    The logits, in the weights' dtype, become their own gradient, `wide` rows at a time, in float32 meanwhile.

    Source: the idea of Cut Cross-Entropy (arXiv 2411.09009) in plain torch: d loss / d logits is softmax
    minus one-hot, so nothing but [N, D] outlives the forward.
    """

    @staticmethod
    def forward(ctx, rows, weight, bias, targets, finish, size, wide):
        learns = ctx.needs_input_grad[0]  # not in evaluation, which then costs half
        gradient = torch.empty_like(rows) if learns else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        right = targets.new_zeros(())
        for start in range(0, rows.shape[0], size):
            hidden, wanted = rows[start:start + size], targets[start:start + size, None]
            chunk = F.linear(hidden.to(weight.dtype), weight, bias)            # [size, V]
            for part, answers in zip(chunk.split(wide), wanted.split(wide)):
                logits = finish(part.float())                                  # [wide, V]
                bend = finish.slope(logits) if learns else None
                top, of_answers = logits.amax(-1, keepdim=True), logits.gather(1, answers)
                right += (of_answers == top).sum()     # the largest one's place takes far longer to find
                slope = logits.sub_(top).exp_()                    # one exp and no second [wide, V]
                sums = slope.sum(-1, keepdim=True)
                total += (sums.log() + top - of_answers).sum()
                if learns:
                    slope.div_(sums).scatter_add_(1, answers, torch.full_like(sums, -1))
                    part.copy_(slope if finish == UNCHANGED else slope.mul_(bend))
            if learns:
                gradient[start:start + size] = chunk @ weight
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx, grad_total, _):
        (gradient,) = ctx.saved_tensors
        return gradient * grad_total.to(gradient.dtype), *[None] * 6
