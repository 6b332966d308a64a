"""loss: cross-entropy on supervised positions only, a chunk of logits at a time, in the model's own forward.

The full logits of a batch ([B, T, V] in float32) are often larger than the model. Here the output head runs
on no position that isn't trained, and on no more than a chunk of positions at once.

Fork me to: change the objective (`trained_head_loss`, which autograd follows), as a recipe's `loss` does.
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lib import fast
from lib.run.errors import StageError
from lib.training.logits import UNCHANGED, Finish

NOT_INPUTS = ("labels", "positions", "targets", "packed_rows", "features")   # of a batch, but not the model's
CHUNK = 256                               # rows (positions) of logits in a chunk, at most
CHUNK_LOGITS = {"cpu": 2**23}             # logits in a chunk at most, by device: 16 MiB in bfloat16
ELSEWHERE = 2**25                         # on other devices, 64 MiB: a GPU reads the head for each chunk
WIDE_LOGITS = {"cpu": 2**19}              # logits of a chunk in float32 at once: 2 MiB; elsewhere, all of it


def forward_loss(model, batch: dict, of_chunk: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of token losses, number of right tokens), scalars, of one forward through the root module.

    A token is right if no other token has a larger logit. The caller divides by the number of tokens of the
    whole optimizer step. batch: the collator's tensors on the model's device, with `positions` and `targets`
    [N]. of_chunk(logits [N, V], targets [N]): the sum of token losses, in place of cross-entropy.
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
    """The last hidden states [N, D] of a batch's supervised positions, by one forward of the root module."""
    return in_place_of_logits(model, batch, lambda rows: rows)


def in_place_of_logits(model, batch: dict, compute):
    """The result of `compute` on the supervised positions' last hidden states [N, D], in one forward.

    compute takes the place of the output head in that forward; the model gets logits with an empty vocabulary
    axis. Replacing the head's call, not the model, works for every family, and hooks on the root module
    (FSDP2's, for one) run as in any forward.
    """
    inputs = {key: value for key, value in batch.items() if key not in NOT_INPUTS} | fast.of_batch(batch)
    head, result = model.get_output_embeddings(), []

    def instead(hidden):                  # [B, T, D]
        if hidden.shape[:2] != batch["input_ids"].shape:
            raise StageError(f"{type(model).__name__}: its output head sees {hidden.shape[1]} positions of "
                             f"{batch['input_ids'].shape[1]}", "choose another base_model")
        positions = batch["positions"].to(hidden.device)          # a model spread over GPUs ends on another
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)           # [N, D]
        result.append(compute(rows))
        return hidden[..., :0]

    own = vars(head).get("forward")       # set by lib/fast, where the head has LoRA
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
    """(loss sum, number of right tokens) for a head that trains, `size` rows at a time.

    Each chunk is checkpointed: the backward computes its logits again.
    """
    def chunk_loss(hidden, wanted):
        logits = finish(head(hidden).float())             # [size, V]
        of_answers = logits.detach().gather(1, wanted[:, None])
        right = (of_answers == logits.detach().amax(-1, keepdim=True)).sum()
        return of_chunk(logits, wanted), right

    total, right = 0, 0
    for hidden, wanted in zip(rows.split(size), targets.split(size)):  # no rows: one chunk all the same
        with set_checkpoint_early_stop(False):          # it stops by an exception, inside a user's function
            loss, count = checkpoint(chunk_loss, hidden, wanted, use_reentrant=False)
        total, right = total + loss, right + count
    return total, right


class FrozenHeadLoss(torch.autograd.Function):
    """(loss sum, number of right tokens) for a frozen head: each chunk's gradient is made with its logits.

    A chunk has `size` rows. Its logits, in the weights' dtype, are overwritten by their own gradient, which
    is computed in float32, `wide` rows at a time.

    Source: the idea of Cut Cross-Entropy (arXiv 2411.09009) in plain torch: d loss / d logits is softmax
    minus one-hot, so of the forward only the hidden states' gradient [N, D] has to be kept.
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
                right += (of_answers == top).sum()     # argmax would take far longer
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
