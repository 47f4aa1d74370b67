"""Supervised fine-tuning: masked next-token cross-entropy, summed here and divided by a global count.

    loss = - sum_it m_it log softmax(z_it)[target_it] / N        N = labelled tokens of the whole optimizer step

With ordinal smoothing a number's target is a Gaussian over the neighbouring numbers instead of one token: 1.20 for 1.21 is a
small mistake, "stop" for 1.21 a large one, and plain cross-entropy cannot tell them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from minigrpo.data import SFTBatch
from minigrpo.transformer import Transformer


def smoothing_matrix(values: Tensor, width: float) -> Tensor:
    """Target distribution of each token, [V, V]: row i is proportional to exp(-(v_i - v_j)^2 / (2 width^2)) over number tokens.

    `values` [V] holds the number each token stands for, NaN for the others, which keep all mass on themselves. Width 0 is
    the identity.
    """
    identity = torch.eye(len(values), dtype=values.dtype, device=values.device)
    if width == 0:
        return identity
    distance = values.unsqueeze(1) - values.unsqueeze(0)  # [V, V], NaN where either is no number
    weights = torch.exp(-0.5 * (distance / width).square())
    is_pair = ~distance.isnan()
    weights = torch.where(is_pair, weights, identity)
    return weights / weights.sum(dim=1, keepdim=True)


def sft_loss(model: Transformer, batch: SFTBatch, smoothing: Tensor | None) -> Tensor:
    """Sum over the labelled tokens of - target . log softmax(z), a scalar in nats; the caller divides by the global count.

    Labels are positions, not token values: everything after the prompt up to and including EOS.
    """
    predicts = batch.completion_mask[:, 1:]  # [B, K - 1] position k predicts token k + 1

    def output(hidden: Tensor, head_weight: Tensor) -> Tensor:
        logits = F.linear(hidden[predicts], head_weight).float()  # [labelled, V]
        targets = batch.tokens[:, 1:][predicts]
        if smoothing is None:
            return F.cross_entropy(logits, targets, reduction="sum")
        return -(smoothing[targets] * F.log_softmax(logits, dim=-1)).sum()

    mask = batch.mask[:, :-1]
    total: Tensor = model(batch.tokens[:, :-1], None if bool(mask.all()) else mask, None, output)
    return total
