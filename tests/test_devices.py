"""The code's branches for CUDA on a stand-in for a GPU, with the CPU as the oracle.

Every tensor is where it belongs, a recorded graph waits for nobody, and all comes out as on a CPU.
"""

import itertools
from copy import deepcopy

import pytest
import torch
from stand_in import DEVICE, Graph, OnDevice, a_gpu, placed  # noqa: F401  a fixture, gpu
from tiny import untrained_checkpoint
from torch import Tensor
from torch.nn import functional as F

import train_grpo
from minigrpo import evaluation, sampling, scoring, transformer
from minigrpo.checkpoint import load_task
from minigrpo.config import GRPOConfig
from minigrpo.counterfactual import ChoiceSimulator
from minigrpo.data import split_starts
from minigrpo.double_integrator import DoubleIntegrator
from minigrpo.evaluation import receding_horizon, validation_metrics
from minigrpo.lqr import QuadraticCost
from minigrpo.policy import ActingPolicy
from minigrpo.prompts import Codec, ParsedControls
from minigrpo.reward import RewardWeights, tally_rewards
from minigrpo.rollout import act, make_rollout, prompts_of_step, rollout_metrics
from minigrpo.sampling import StopRule, _Batch, _Decoder, sample_completions
from minigrpo.tokenizer import number_tokenizer, token_values
from minigrpo.transformer import Transformer, TransformerConfig, initialise
from minigrpo.update import update_policy

LENGTH = 12


@pytest.mark.parametrize(
    ("top_p", "is_greedy", "is_padded", "vocab"),
    [(1.0, False, True, 61), (0.8, False, False, 61), (1.0, True, False, 61),
     (1.0, False, False, 4200), (0.8, False, True, 4200)],
)  # fmt: skip
def test_recorded_decoding_waits_for_nobody_and_draws_what_the_cpu_draws(
    gpu, monkeypatch, top_p, is_greedy, is_padded, vocab
):
    monkeypatch.setattr(_Decoder, "TOKENS_PER_GRAPH", 4)
    model = Transformer(TransformerConfig("qwen3", vocab, 16, 24, 1, 4, 2, 4))
    generator = torch.Generator().manual_seed(3)
    initialise(model, generator)
    with torch.no_grad():
        model.norm.weight *= 30  # neither uniform nor sure
    prompts = torch.randint(2, vocab, (3, 5), generator=generator)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, :2] = not is_padded
    uniforms = torch.rand(6, LENGTH, generator=generator, dtype=torch.float64)
    stop, num_graphs = StopRule((1,), 0, LENGTH), []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: num_graphs.append(1) or Graph())

    def assert_equal_draws(uniforms: Tensor, times: int, temperature: float = 1.2) -> None:
        acting = ActingPolicy(temperature, top_p, 9)
        drawn = None if is_greedy else uniforms
        expected = sample_completions(model, prompts, mask, 2, acting, stop, drawn)
        arguments = [OnDevice(tensor) for tensor in (prompts, mask, uniforms)]
        for _ in range(times):
            gpu.looks.clear()
            with gpu:
                drawn = None if is_greedy else arguments[2]
                found = sample_completions(theirs, *arguments[:2], 2, acting, stop, drawn)
            for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert one.device == DEVICE
                    torch.testing.assert_close(one.held, other, rtol=1e-4, atol=1e-4)

    theirs = placed(deepcopy(model))
    assert_equal_draws(uniforms, times=3)  # as it comes, recorded, replayed over what was there
    with torch.no_grad():
        for parameter in (*model.parameters(), *theirs.parameters()):
            parameter.mul_(0.7)
    assert_equal_draws(uniforms.flip(0), times=1)
    recorded = len(num_graphs)
    assert_equal_draws(uniforms, times=1, temperature=0.6)  # as with --final-temperature
    assert len(num_graphs) == recorded > 0
    # Is there padding, is any row alive before each graph, is all finite, how long and wide is it?
    assert len(gpu.looks) <= 1 + 3 + 3


def test_completions_on_a_gpu_have_few_lengths(gpu, monkeypatch):
    """So that attention is planned for few; the columns beyond the longest are masked."""
    monkeypatch.setattr(sampling, "LENGTHS_ON_CUDA", 5)
    model = Transformer(TransformerConfig("qwen2", 61, 16, 24, 1, 4, 2, 4))
    initialise(model, torch.Generator().manual_seed(3))
    prompts, lengths = torch.full((2, 5), 3), set()
    for seed in range(9):
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(4, LENGTH, generator=generator, dtype=torch.float64)
        rest = 2, ActingPolicy(1.0, 1.0), StopRule(tuple(range(20)), 0, LENGTH)
        here = sample_completions(model, prompts, None, *rest, uniforms)
        with gpu:
            theirs = placed(deepcopy(model))
            there = sample_completions(theirs, OnDevice(prompts), None, *rest, OnDevice(uniforms))
        longest = here.tokens.shape[1]
        lengths.add((longest, there.tokens.shape[1]))
        assert torch.equal(there.tokens.held[:, :longest], here.tokens)
        assert torch.equal(there.mask.held[:, :longest], here.mask)
        assert not there.mask.held[:, longest:].any()
    assert len({longest for longest, _ in lengths}) > 3
    assert all(width == min(-(-longest // 5) * 5, LENGTH) for longest, width in lengths)


def test_receding_horizon_plans_as_many_rows_at_each_step_on_a_gpu(gpu, monkeypatch, tmp_path):
    task = load_task(untrained_checkpoint(tmp_path / "init"))[1]
    seen: list[int] = []

    def plan(model, starts, *_):
        seen.append(len(starts))
        controls = starts.sum(dim=1, keepdim=True).expand(-1, task.plant.horizon) * -0.5
        return ParsedControls(controls, torch.ones(len(starts), dtype=torch.bool))

    monkeypatch.setattr(evaluation, "_plan", plan)
    model = Transformer(TransformerConfig("qwen2", 61, 16, 24, 1, 4, 2, 4))
    starts = torch.tensor([[0.5, 0.1], [0.5, 0.1], [-0.3, 0.2]], dtype=torch.float64)
    here = receding_horizon(model, starts, task)
    assert seen == [2] * task.plant.horizon
    with gpu:
        there = receding_horizon(placed(deepcopy(model)), starts, task)
    assert seen[task.plant.horizon :] == [3] * task.plant.horizon
    assert torch.equal(there.states, here.states)


def test_no_length_of_the_cache_is_recorded_that_did_not_run_before(gpu, monkeypatch):
    """Libraries that plan each length anew may not do so in a capture: rows that end early, in a
    batch before, must not leave some for it."""
    monkeypatch.setattr(_Decoder, "TOKENS_PER_GRAPH", 4)
    model = placed(Transformer(TransformerConfig("qwen2", 61, 16, 24, 1, 4, 2, 4)))
    ran, recorded, attention = [], [], transformer.attend

    def watched(q, k, *rest):
        (ran if gpu.graph is None else recorded).append(k.shape[2])
        assert gpu.graph is None or k.shape[2] in ran
        return attention(q, k, *rest)

    monkeypatch.setattr(transformer, "attend", watched)
    batch = _Batch(
        3, 5, 2, ActingPolicy(1.0, 1.0), False, StopRule((), 0, LENGTH), False, False, False,
        torch.float32, DEVICE,
    )  # fmt: skip
    prompts, uniforms = torch.randint(2, 61, (3, 5)), torch.rand(6, LENGTH, dtype=torch.float64)
    with gpu, torch.no_grad():
        mask = OnDevice(torch.ones(3, 5, dtype=torch.bool))
        decoder = _Decoder(model, batch, is_recorded=True)
        decoder.decode(model, OnDevice(prompts), mask, OnDevice(uniforms), 1.0)
    assert recorded == list(range(6, 5 + LENGTH))


def test_graphs_share_a_stream_within_a_decoder_and_with_no_other(gpu, monkeypatch):
    monkeypatch.setattr(_Decoder, "TOKENS_PER_GRAPH", 4)
    model = placed(Transformer(TransformerConfig("qwen2", 61, 16, 24, 1, 4, 2, 4)))
    prompts, uniforms = torch.randint(2, 61, (3, 5)), torch.rand(6, LENGTH, dtype=torch.float64)
    decoders = []
    with gpu, torch.no_grad():
        for top_p in (1.0, 0.5):
            batch = _Batch(
                3, 5, 2, ActingPolicy(1.0, top_p), False, StopRule((), 0, LENGTH), False, False,
                False, torch.float32, DEVICE,
            )  # fmt: skip
            decoders.append(_Decoder(model, batch, is_recorded=True))
            mask = OnDevice(torch.ones(3, 5, dtype=torch.bool))
            decoders[-1].decode(model, OnDevice(prompts), mask, OnDevice(uniforms), 1.0)
    first, second = (
        {stream for graph, stream in gpu.streams if graph in decoder.graphs.values()}
        for decoder in decoders
    )
    assert len(gpu.streams) == 6 and len(first) == len(second) == 1 and first != second
    assert None not in first | second


def test_no_two_decoders_ever_record_on_one_stream(gpu, monkeypatch):
    """torch hands out 32 streams in turn: a 33rd would be the first decoder's."""
    turn = itertools.count()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: next(turn) % 32)
    model = placed(Transformer(TransformerConfig("qwen2", 61, 16, 24, 1, 4, 2, 4)))
    prompts, uniforms = torch.randint(2, 61, (1, 5)), torch.rand(1, 2, dtype=torch.float64)

    def decoder_of(top_p):
        batch = _Batch(
            1, 5, 1, ActingPolicy(1.0, top_p), False, StopRule((), 0, 2), False, False, False,
            torch.float32, DEVICE,
        )  # fmt: skip
        for _ in range(2):  # the first of its kind is not recorded
            found = sampling._decoder(model, batch)
            found.decode(model, OnDevice(prompts), None, OnDevice(uniforms), 1.0)
        return found

    with gpu, torch.no_grad():
        for i in range(40):
            kept = [decoder_of(1.0), decoder_of(0.5 + i / 100)]
            alive = sampling._KEPT[model].decoders.values()
            assert kept[0] in alive and kept[1] in alive
            assert len({decoder.stream for decoder in alive}) == len(alive) <= 4
    assert next(turn) == sampling.MAX_DECODERS


@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, 6), (torch.bfloat16, 2)])
def test_keys_of_grouped_heads_are_repeated_where_no_kernel_reads_them_grouped(
    gpu, monkeypatch, dtype, heads
):
    seen, library = [], F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return library(q, k, v, **options)

    draw = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, n, 7, 4, generator=draw).to(dtype) for n in (6, 2, 2))
    causal = torch.full((7, 7), -torch.inf, dtype=dtype).triu(1)
    expected = transformer.attend(q, k, v, causal[None, None])
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with gpu:
        got = transformer.attend(*(OnDevice(x) for x in (q, k, v)), None, is_causal=True)
    assert seen == [(heads, heads, heads == 2)]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert torch.allclose(got.held, expected, atol=tolerance)


@pytest.mark.parametrize(
    ("changes", "shared_from", "chunk"),
    [
        ({"credit": "choice", "num_minibatches": 2, "top_p": 1.0}, 1, 2**27),
        ({"credit": "choice", "top_p": 0.8, "num_epochs": 2}, 32, 64),
        ({"credit": "completion", "top_p": 1.0, "lora_rank": 2, "kl_beta": 0.01}, 1, 64),
        ({"credit": "completion", "top_p": 0.8, "gradient_checkpointing": True}, 1, 2**27),
    ],
    ids=["choices", "choices-of-supports", "adapters", "supports"],
)
def test_rollout_update_and_validation_are_those_of_the_cpu(
    gpu, monkeypatch, tmp_path, changes, shared_from, chunk
):
    monkeypatch.setattr(scoring, "SHARED_FROM", shared_from)
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", chunk)
    folder = untrained_checkpoint(tmp_path / "init")
    _, task, _ = load_task(folder)
    settings = {
        "init": str(folder), "prompts_per_step": 3, "group_size": 4, "micro_batch_size": 4,
        "temperature": 1.2, "support_size": 5, "kl_beta": 0.0, "advantage_std": "batch",
    }  # fmt: skip
    config = GRPOConfig(**settings | changes)
    starts, reward = split_starts(task.plant), train_grpo.reward_function(config, task)
    prompts, places = prompts_of_step(starts.training, config, task, 0)

    def metrics(model: Transformer, device: torch.device) -> dict[str, float]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        reference = model if config.kl_beta else None
        rollout, experience, _ = make_rollout(
            model, reference, prompts, places, config, task, reward
        )
        host = {"rewards", "prompt_places"} | ({"advantages"} if rollout.credit is None else set())
        held = vars(rollout) | vars(experience.completions)
        if rollout.credit is not None:
            held |= vars(rollout.credit) | vars(rollout.credit.choices)
        for name, value in held.items():
            if isinstance(value, Tensor) and name not in host:
                assert value.device == device, name
        updated, _ = update_policy(model, torch.optim.SGD(trained, 0.0), rollout, config, 0, 0.1)
        found = rollout_metrics(rollout, experience) | updated
        return found | validation_metrics(model, starts.validation[:3], task, 0)

    model = train_grpo.build(config)
    expected = metrics(model, torch.device("cpu"))
    with gpu:
        found = metrics(placed(train_grpo.build(config)), DEVICE)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected["update/grad_norm"] > 0


def test_values_that_are_simulated_again_ask_nothing_of_the_host(gpu):
    """In a micro-batch it would wait there for all that the GPU has yet to do."""
    plant = DoubleIntegrator(horizon=3)
    tokenizer = number_tokenizer(plant, Codec())
    numbers, eos = token_values(tokenizer, len(tokenizer)), int(tokenizer.eos_token_id)

    def reward(tally, is_valid):
        return tally_rewards(tally, is_valid, "progress", plant.horizon, RewardWeights())

    with gpu:
        simulator = ChoiceSimulator(OnDevice(numbers), eos, plant, QuadraticCost(), reward)
        tokens = OnDevice(torch.full((4, 4), eos))
        plans = simulator.plans_of(tokens, OnDevice(torch.zeros(4, 2, dtype=torch.float64)), 2)
        once = simulator.values_of(plans, 4)
        graph = Graph()
        with gpu.capture(graph, None, None):  # where a copy from the host is an error
            again = simulator.values_of(plans, 4)
        graph.replay()
    assert bool(once.values.held.any())
    assert torch.equal(again.values.held, once.values.held)


def test_what_an_evaluation_needs_is_recorded_once(gpu, monkeypatch, tmp_path):
    """Rollout and validation come in batches whose number does not divide their rows."""
    folder, num_graphs = untrained_checkpoint(tmp_path / "init"), []
    _, task, _ = load_task(folder)
    config = GRPOConfig(
        init=str(folder), prompts_per_step=5, group_size=2, rows_per_batch=4, top_p=1.0
    )
    starts, reward = split_starts(task.plant), train_grpo.reward_function(config, task)
    prompts, _ = prompts_of_step(starts.training, config, task, 0)
    some = starts.validation[:5]
    assert len(some) == 5  # of the six that so small a plant has
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: num_graphs.append(1) or Graph())
    with gpu:
        model = placed(train_grpo.build(config))
        for step in range(4):
            act(model, prompts, config, task, reward)
            validation_metrics(model, some, task, 0, config.rows_per_batch)
            if step == 1:
                recorded = len(num_graphs)
    assert len(num_graphs) == recorded > 0


def test_a_model_that_moved_is_cast_again(gpu):
    model = Transformer(TransformerConfig("llama", 31, 16, 24, 1, 2, 2, 8))
    assert sampling._kept_copy(model, torch.bfloat16).norm.weight.device == torch.device("cpu")
    placed(model)
    assert sampling._kept_copy(model, torch.bfloat16).norm.weight.device == DEVICE
