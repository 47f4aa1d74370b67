"""AdamW with weight decay on matrices only, and one step of it; schedules as pure functions of the
step or of what was measured so far, so that resuming needs no state of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from torch import Tensor
from torch.optim import AdamW, Optimizer

from minigrpo.distributed import cut_like, gradient_norm, reduce_gradients, scale_gradient, whole
from minigrpo.transformer import Transformer


def adamw(
    model: Transformer,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    final_norm_rate: float = 1.0,
) -> AdamW:
    """Matrices decay, vectors (norms, biases) don't; a tied parameter is in one group, once.

    The gains of the final norm have a rate of their own, `final_norm_rate` times the others':
    together they scale all logits, and so say how sure the policy is. Every token's gradient adds
    up in that one direction, which a step made for single weights crosses too slowly.

    The fused kernel runs where all trained parameters are on CUDA. On a CPU it gains 3 ms a step
    and costs an implementation nobody else uses.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    vectors, gains = [p for p in trained if p.ndim < 2], model.norm.weight
    groups: list[dict[str, object]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in vectors if p is not gains]},
        {"params": [p for p in vectors if p is gains], "rate": final_norm_rate},
    ]
    fused = all(parameter.is_cuda for parameter in trained)
    return AdamW(groups, lr=learning_rate, betas=betas, weight_decay=0.0, fused=fused)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the rate of each group: this one, times the group's `rate` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate", 1.0)


def apply_gradient(
    model: Transformer, optimizer: Optimizer, max_grad_norm: float, kernel: Tensor | None
) -> float:
    """One optimizer step along this rank's gradient; returned is the norm of the gradient.

    It is summed over ranks, scaled down to max_grad_norm where it is longer, and then smoothed by
    the kernel, if there is one. Where its norm is not finite nothing is changed; the norm is that
    of all ranks, so all skip together.
    """
    reduce_gradients(model)
    norm = gradient_norm(model)
    if math.isfinite(norm):
        scale_gradient(model, min(1.0, max_grad_norm / (norm + 1e-6)))
        smooth_gradients(model, kernel)
        optimizer.step()
    return norm


def smooth_gradients(model: Transformer, kernel: Tensor | None) -> None:
    """G -> S G for the gradients [V, E] of embedding and head, S = `tokenizer.gradient_kernel`.

    What is learned of 0.50 is learned of 0.49 and 0.51 too, where rows that are free each need
    examples of their own. With plain gradient descent it is descent in M of W = S^1/2 M: rows
    change as smooth functions of their number and nothing else about the model changes. The
    kernel None leaves gradients as they are, and so do frozen tables. Every rank calls it.
    """
    head = [] if model.head is None else [model.head.weight]
    for table in [model.embed.weight, *head]:
        if kernel is not None and table.grad is not None:
            full = whole(table.grad)
            table.grad = cut_like(kernel.to(full) @ full, table)


def cosine_learning_rate(
    step: int, num_steps: int, peak: float, warmup_steps: int, decay_steps: int = 0
) -> float:
    """Rate of the update after `step` completed ones: linear warm-up, then half a cosine.

    peak (step + 1) / warmup_steps while step < warmup_steps; then peak, until the last decay_steps
    begin (0: at once); from there to 0 at step = num_steps, where it stays. So no update runs at
    rate 0, and resuming needs nothing but the step.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    begin = max(warmup_steps, num_steps - decay_steps) if decay_steps else warmup_steps
    progress = min(1.0, max(0, step - begin) / max(1, num_steps - begin))
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(step: int, num_steps: int, start: float, end: float) -> float:
    """start + (end - start) step / num_steps, and end from num_steps on."""
    return start + (end - start) * (min(1.0, step / num_steps) if num_steps else 1.0)


def plateau_factor(rewards: Sequence[float], patience: int) -> float:
    """What a learning rate that follows progress is multiplied by: 2^-(number of plateaus).

    The rewards of the steps so far are cut into windows of `patience`; each window whose mean is
    not above that of the window before is a plateau. Patience 0 never slows down.
    """
    if patience == 0:
        return 1.0
    ends = range(patience, len(rewards) + 1, patience)
    means = [fmean(rewards[end - patience : end]) for end in ends]
    return 0.5 ** sum(later <= earlier for earlier, later in pairwise(means))


def has_converged(scores: Sequence[float], patience: int) -> bool:
    """Is the best of the evaluations so far followed by `patience` others? Never for patience 0."""
    if patience == 0 or not scores:
        return False
    return len(scores) - 1 - scores.index(max(scores)) >= patience
