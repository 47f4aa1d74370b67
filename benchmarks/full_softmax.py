"""GRPO as most implementations do it: sampled from the nucleus, scored by the whole softmax.

An arm of the study (docs/results.md, Ablations): train_grpo.py with its flags, except that current,
old and reference log-probs forget the stored support. The ratio is still 1 on the first update, and
the gradient is that of another policy than the one that acted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the trainer stands there

import minigrpo.rollout
import minigrpo.update
import train_grpo
from minigrpo.runs import run_command
from minigrpo.scoring import completion_scores


def scored_by_the_whole_softmax(  # type: ignore[no-untyped-def]
    model, prompt_tokens, prompt_mask, tokens, support, *others, **named
):
    return completion_scores(model, prompt_tokens, prompt_mask, tokens, None, *others, **named)


if __name__ == "__main__":
    minigrpo.rollout.completion_scores = scored_by_the_whole_softmax  # type: ignore[attr-defined]
    minigrpo.update.completion_scores = scored_by_the_whole_softmax  # type: ignore[attr-defined]
    run_command(train_grpo.main)
