"""Supervised fine-tuning: masked next-token cross-entropy, divided by a global count.

    loss = - sum_it m_it log softmax(z_it)[target_it] / N    N = labelled tokens of a whole step

With ordinal smoothing a number's target is a Gaussian over the neighbouring numbers instead of one
token: 1.20 for 1.21 is a small mistake, "stop" for 1.21 a large one, and plain cross-entropy cannot
tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from minigrpo.config import SFTConfig
from minigrpo.data import SFTBatch, keyed_generator
from minigrpo.distributed import backward, cut_like, max_over_ranks, sum_over_ranks, whole
from minigrpo.optim import apply_gradient, set_learning_rate
from minigrpo.policy import tempered
from minigrpo.scoring import in_chunks
from minigrpo.tokenizer import number_kernel
from minigrpo.transformer import Transformer


def smoothing_matrix(values: Tensor, width: float) -> Tensor:
    """Target distribution of each token, [V, V], each row sums to 1.

    S_ij = K_ij / sum_j K_ij, K = `tokenizer.number_kernel`: words keep all mass on themselves.
    """
    kernel = number_kernel(values, width)
    return kernel / kernel.sum(dim=1, keepdim=True)


def sft_loss(model: Transformer, batch: SFTBatch, smoothing: Tensor | None) -> Tensor:
    """Sum over the labelled tokens of - target . log softmax(z), in nats; the caller divides it.

    Labels are positions, not token values: everything after the prompt up to and including EOS.
    """
    predicts = batch.completion_mask[:, 1:]  # [B, K - 1], position k predicts token k + 1

    def output(hidden: Tensor, head_weight: Tensor) -> Tensor:
        labelled = rearrange(hidden[predicts], "n e -> 1 n e")
        targets = rearrange(batch.labels[:, 1:][predicts], "n -> 1 n")
        norm, chosen = in_chunks(_norm_and_logit, labelled, head_weight, targets)
        if smoothing is not None:
            # sum_j S_tj z_j = h . (S W)_t: the smoothed targets never become a [labelled, V] table.
            chosen = (labelled * (smoothing @ head_weight)[targets]).sum(dim=-1)
        return (norm - chosen).sum()

    # Right padding needs no mask: no real token comes after it.
    total: Tensor = model(batch.tokens[:, :-1], None, None, output)
    return total


def _norm_and_logit(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_j exp z_j and z_target, both [1, n], of logits [1, n, V]."""
    z, places = tempered(logits, 1.0), rearrange(targets, "o n -> o n 1")
    chosen = z.gather(-1, places)
    # As in `policy.score_logits`: log_softmax is faster than logsumexp.
    norm = chosen - F.log_softmax(z, dim=-1).gather(-1, places)
    return rearrange(norm, "o n 1 -> o n"), rearrange(chosen, "o n 1 -> o n")


@contextmanager
def perturbed(model: Transformer, scale: float, generator: torch.Generator) -> Iterator[None]:
    """Inside, each trained matrix is W + scale rms(W) E, E standard normal; after it W again.

    In expectation over E, with rms(W) held fixed, the gradient is that of the loss averaged over
    neighbouring weights (An 1996, adding noise during backpropagation), which favours flat places.
    Drawn whole, on the CPU: every device and any number of ranks has the same noise.
    """
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2 and scale > 0]
    held = [parameter.detach().clone() for parameter in matrices]
    with torch.no_grad():
        for parameter in matrices:
            size = scale * whole(parameter).square().mean().sqrt()
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(cut_like(size * noise.to(size), parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(matrices, held, strict=True):
                parameter.copy_(value)


def supervised_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: SFTBatch,
    smoothing: Tensor | None,
    config: SFTConfig,
    step: int,
    learning_rate: float,
    kernel: Tensor | None = None,
) -> dict[str, float]:
    """One optimizer step on this rank's rows; the denominator counts all rows and ranks first.

    With `optim.smooth_gradients` by the kernel.
    A gradient that is not finite is not applied; update/grad_norm then says so.
    """
    set_learning_rate(optimizer, learning_rate)
    optimizer.zero_grad(set_to_none=True)
    device, is_mixed = batch.tokens.device, config.precision == "bfloat16"
    num_labelled = sum_over_ranks(batch.completion_mask.sum().double())
    total = torch.zeros((), dtype=torch.float64, device=device)
    size = config.micro_batch_size
    num_micro = max_over_ranks(math.ceil(len(batch.tokens) / size))  # shards are gathered in each
    key = int(keyed_generator(config.seed, "weight_noise", step).integers(2**63))
    with perturbed(model, config.weight_noise, torch.Generator().manual_seed(key)):
        for i in range(num_micro):
            part = batch.rows(slice(i * size, (i + 1) * size))
            with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
                loss = sft_loss(model, part, smoothing)
            backward(model, loss / num_labelled)
            total += loss.detach()
    norm = apply_gradient(model, optimizer, config.max_grad_norm, kernel)
    mean = float(sum_over_ranks(total) / num_labelled)
    return {"loss/total": mean, "update/grad_norm": norm, "update/learning_rate": learning_rate}
