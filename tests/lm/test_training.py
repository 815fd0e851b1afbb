"""The training loop: closed forms of schedules, weighted accumulation, resuming, precision, errors, many processes."""

import math
import os
import subprocess
import sys
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from papertrial.lm.training import (
    IGNORED,
    Loss,
    NonFiniteLossError,
    adamw,
    causal_loss,
    constant,
    linear,
    masked_loss,
    parameter_groups,
    train,
    warmup_cosine,
)

VOCABULARY = 61


def small_model(**changes):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(sizes | tokens | changes)))


def endless(seed=1, rows=4, length=12):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(VOCABULARY, (rows, length), generator=generator)


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def sgd(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


# -- schedules -------------------------------------------------------------------------------------------------------


def test_warmup_cosine_rises_linearly_then_follows_half_a_cosine_to_its_floor():
    factor = warmup_cosine(21, warmup=4, floor=0.2)
    assert [factor(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1.0
    assert factor(12) == pytest.approx(0.2 + 0.8 * 0.5, abs=1e-12)  # half way: cos(pi / 2) = 0
    assert factor(8) == pytest.approx(0.2 + 0.4 * (1 + math.sqrt(0.5)), abs=1e-12)
    assert factor(20) == pytest.approx(0.2, abs=1e-12)
    assert factor(1000) == pytest.approx(0.2, abs=1e-12)


def test_linear_and_constant_schedules_have_their_closed_forms():
    factor = linear(11, warmup=0, floor=0.0)
    assert [round(factor(s), 12) for s in range(11)] == [round(1 - s / 10, 12) for s in range(11)]
    assert [constant()(s) for s in (0, 5, 10**6)] == [1.0, 1.0, 1.0]
    assert [constant(2)(s) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("arguments", [(0, 0, 0.1), (10, 10, 0.1), (10, -1, 0.1), (10, 2, 1.5), (10, 2, -0.1)])
def test_schedules_refuse_what_makes_no_schedule(arguments):
    with pytest.raises(ValueError, match=r"steps|warmup|floor"):
        warmup_cosine(*arguments)
    with pytest.raises(ValueError, match=r"steps|warmup|floor"):
        linear(*arguments)


def test_the_schedule_scales_every_group_from_its_own_rate():
    model = small_model()
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.01}], lr=1.0)
    seen = []
    train(
        model, endless(), steps=3, optimizer=optimizer, schedule=linear(3),
        before_update=lambda step: seen.append([g["lr"] for g in optimizer.param_groups]),
    )  # fmt: skip
    assert seen == [pytest.approx([0.1, 0.01]), pytest.approx([0.05, 0.005]), pytest.approx([0.0, 0.0])]


# -- the step --------------------------------------------------------------------------------------------------------


def test_one_step_is_the_step_written_by_hand():
    batch = next(endless())
    ours, hand = small_model(), small_model()
    report = train(ours, [batch], steps=1, optimizer=sgd(0.5), clip_norm=0.05)
    loss = hand(batch, labels=batch).loss  # transformers' own loss
    loss.backward()
    norm = nn.utils.clip_grad_norm_(hand.parameters(), 0.05)
    with torch.no_grad():
        for p in hand.parameters():
            p -= 0.5 * p.grad
    assert report.losses == pytest.approx([loss.item()], rel=1e-6)
    assert report.grad_norms == pytest.approx([float(norm)], rel=1e-5)
    assert report.grad_norms[0] > 0.05, "the bound must have been at work"
    torch.testing.assert_close(weights(ours), weights(hand), rtol=0, atol=1e-7)


def unequal_batches():
    """Two micro-batches with 33 and 3 targets: averaging their means would be far from the mean of all."""
    ids = next(endless(rows=6))
    labels = ids.clone()
    labels[3:, 2:] = IGNORED
    first, second = ({"input_ids": ids[part], "labels": labels[part]} for part in (slice(0, 3), slice(3, 6)))
    return first, second, {"input_ids": ids, "labels": labels}


def test_accumulation_weights_micro_batches_by_their_targets():
    first, second, whole = unequal_batches()
    split, joined = small_model(), small_model()
    one = train(split, [first, second], steps=1, accumulate=2, optimizer=sgd(1.0), clip_norm=None)
    two = train(joined, [whole], steps=1, optimizer=sgd(1.0), clip_norm=None)
    assert one.targets == two.targets == 36
    assert one.losses == pytest.approx(two.losses, rel=1e-6)
    torch.testing.assert_close(weights(split), weights(joined), rtol=0, atol=1e-6)  # float32 sums in another order
    naive = small_model()
    loss = (causal_loss(naive, first).total / 33 + causal_loss(naive, second).total / 3) / 2
    assert abs(loss.item() - two.losses[0]) > 1e-3, "the data must tell right from wrong weighting"


def test_padding_carries_no_loss_and_masked_labels_are_not_shifted():
    model = small_model().eval()
    ids = next(endless())
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    padded = causal_loss(model, {"input_ids": ids, "attention_mask": mask})
    short = causal_loss(model, ids[:, :8])
    assert int(padded.weight) == int(short.weight) == 4 * 7
    torch.testing.assert_close(padded.total, short.total)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 5] = ids[:, 5]
    aligned = masked_loss(model, {"input_ids": ids, "labels": labels})
    expected = -model(ids).logits[:, 5].log_softmax(-1).gather(1, ids[:, 5:6]).sum()
    torch.testing.assert_close(aligned.total, expected)


def test_positions_that_jump_do_not_cut_attention():
    model = small_model().eval()
    ids = next(endless())
    positions = torch.arange(12).expand(4, 12)
    positions = torch.where(positions < 6, positions, positions + 9)
    loss = causal_loss(model, {"input_ids": ids, "position_ids": positions})
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % VOCABULARY
    other = causal_loss(
        model,
        {"input_ids": changed, "position_ids": positions, "labels": ids.masked_fill(torch.arange(12) < 8, IGNORED)},
    )
    same = causal_loss(
        model, {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(torch.arange(12) < 8, IGNORED)}
    )
    assert torch.isfinite(loss.total)
    assert not torch.equal(other.total, same.total), "tokens after the jump must see those before it"


def test_penalties_are_added_to_the_mean_and_reported():
    batch = next(endless())
    model, hand = small_model(), small_model()
    heard = []
    train(
        model, [batch], steps=1, optimizer=sgd(1.0), clip_norm=None, on_step=heard.append,
        penalties={"size": lambda m, b: 0.1 * weights_of(m)},
    )  # fmt: skip
    (hand(batch, labels=batch).loss + 0.1 * weights_of(hand)).backward()
    with torch.no_grad():
        for p in hand.parameters():
            p -= p.grad
    torch.testing.assert_close(weights(model), weights(hand), rtol=0, atol=1e-6)
    assert heard[0].parts == pytest.approx({"size": 0.1 * weights_of(small_model()).item()}, rel=1e-6)


def weights_of(model):
    return sum(p.square().sum() for p in model.parameters())


def test_hooks_run_in_order_and_reports_add_up():
    calls, progress, reports = [], [], []
    report = train(
        small_model(), endless(), steps=3, optimizer=adamw(1e-3), schedule=linear(3, floor=0.5),
        before_step=lambda s: calls.append(("before", s)), before_update=lambda s: calls.append(("update", s)),
        after_step=lambda s: calls.append(("after", s)), on_step=reports.append,
        on_progress=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    assert calls == [(what, s) for s in range(3) for what in ("before", "update", "after")]
    assert progress == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [r.lr for r in reports] == pytest.approx([1e-3, 0.75e-3, 0.5e-3])
    assert [r.loss for r in reports] == report.losses
    assert report.targets == sum(r.targets for r in reports) == 3 * 4 * 11
    assert reports[-1].seconds_left == 0
    assert reports[0].seconds_left > 0
    assert reports[0].targets_per_second > 0


def test_training_learns_a_repeated_batch():
    batch = next(endless())
    report = train(small_model(), [batch], steps=60, optimizer=adamw(1e-2), schedule=warmup_cosine(60, 5))
    assert report.losses[0] > math.log(VOCABULARY) - 0.3
    assert report.losses[-1] < 1.5


def test_decay_groups_hold_each_tied_parameter_once():
    model = small_model()
    groups = parameter_groups(model, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    grouped = [p for g in groups for p in g["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert all(p.ndim == 1 for p in groups[1]["params"])


def test_the_model_is_left_in_evaluation_mode_and_dropout_can_be_switched_off():
    modes = []
    model = small_model()
    look = lambda step: modes.append(model.training)  # noqa: E731
    train(model, endless(), steps=1, optimizer=sgd(0.1), before_update=look)
    assert not model.training
    train(model, endless(), steps=1, optimizer=sgd(0.1), before_update=look, dropout=False)
    assert modes == [True, False]


def test_a_seed_fixes_dropout_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    ends = []
    for seed in (5, 5, 6):
        model = small_model(attention_dropout=0.3)
        train(model, endless(), steps=2, optimizer=sgd(0.5), seed=seed)
        ends.append(weights(model))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert torch.equal(before, torch.get_rng_state())


# -- precision -------------------------------------------------------------------------------------------------------


def test_bf16_runs_the_forward_pass_in_bf16_and_keeps_float32_weights():
    model = small_model()
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    batches = [next(endless())]
    bf16 = train(model, batches, steps=20, optimizer=adamw(1e-2), precision="bf16")
    fp32 = train(small_model(), batches, steps=20, optimizer=adamw(1e-2))
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # bfloat16 keeps 8 bits: the losses agree to about 1 %, and are not the same numbers
    assert bf16.losses == pytest.approx(fp32.losses, rel=2e-2)
    assert bf16.losses != fp32.losses


def test_another_precision_set_in_this_process_does_not_leak_in():
    """Accelerate keeps one precision per process; whoever set it first must not decide for this loop."""
    expected = train(small_model(), endless(), steps=2, optimizer=adamw(1e-2)).losses
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(mixed_precision="bf16")
        model = small_model()
        forward = model.forward
        assert train(model, endless(), steps=2, optimizer=adamw(1e-2)).losses == expected
        assert model.forward == forward, "the model must not be left wrapped"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


# -- resuming --------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def run_with_noise(checkpoint=None, kill_at=None):
    """Dropout, accumulation, a schedule and a generator used inside the loss: all that a resume can get wrong."""
    model = small_model(attention_dropout=0.2)
    noise = torch.Generator().manual_seed(9)

    def loss(model, batch):
        drop = torch.rand(batch.shape, generator=noise) < 0.3
        return causal_loss(model, {"input_ids": batch, "labels": batch.masked_fill(drop, IGNORED)})

    def kill(step):
        if step == kill_at:
            raise KilledError

    report = train(
        model, endless(), steps=11, optimizer=adamw(3e-3), schedule=warmup_cosine(11, 2), loss=loss, accumulate=2,
        seed=4, after_step=kill, checkpoint=checkpoint, checkpoint_every=3, keep={"noise": noise},
    )  # fmt: skip
    return model, report


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    straight, expected = run_with_noise()
    for kill_at in (4, 7):  # after step 3 was saved, and after 6 was
        with pytest.raises(KilledError):
            run_with_noise(tmp_path, kill_at)
    model, report = run_with_noise(tmp_path)
    assert report.resumed_at == 6
    assert report.losses == expected.losses
    assert report.grad_norms == expected.grad_norms
    assert torch.equal(weights(model), weights(straight))


def test_a_finished_run_is_not_run_again(tmp_path):
    model, report = run_with_noise(tmp_path)
    again, second = run_with_noise(tmp_path, kill_at=10)  # the hook would raise if a step were made
    assert second.losses == report.losses
    assert torch.equal(weights(again), weights(model))


def test_a_kill_in_the_middle_of_a_save_leaves_the_last_place(tmp_path, monkeypatch):
    with pytest.raises(KilledError):
        run_with_noise(tmp_path, kill_at=4)
    saved = (tmp_path / "training.pt").read_bytes()

    def half(state, file):
        file.write(b"half a file")
        raise KilledError

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KilledError):
        run_with_noise(tmp_path)
    assert (tmp_path / "training.pt").read_bytes() == saved
    assert [p.name for p in tmp_path.iterdir()] == ["training.pt"]


def test_a_checkpoint_of_another_run_or_no_checkpoint_at_all_is_refused(tmp_path):
    train(small_model(), endless(), steps=2, optimizer=sgd(0.1), checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"another run \(different steps\)"):
        train(small_model(), endless(), steps=3, optimizer=sgd(0.1), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="different parameters, optimizer"):
        train(small_model(hidden_size=32), endless(), steps=2, optimizer=adamw(0.1), checkpoint=tmp_path)
    (tmp_path / "training.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a training checkpoint"):
        train(small_model(), endless(), steps=2, optimizer=sgd(0.1), checkpoint=tmp_path)


def test_checkpoints_never_run_code(tmp_path):
    class Mine:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"step": 1, "run": Mine()}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        train(small_model(), endless(), steps=2, optimizer=sgd(0.1), checkpoint=tmp_path)
    assert not (tmp_path / "owned").exists()


# -- errors ----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_at_its_step_before_the_update():
    model = small_model()
    states = []

    def loss(model, batch):
        states.append(weights(model))
        value = causal_loss(model, batch)
        return value if len(states) < 3 else Loss(value.total * math.nan, value.weight)

    with pytest.raises(NonFiniteLossError, match="step 3") as caught:
        train(model, endless(), steps=5, optimizer=sgd(0.1), loss=loss)
    assert caught.value.step == 3
    assert torch.equal(weights(model), states[-1])


def test_a_gradient_that_is_not_finite_is_an_error_too():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, batch):
            return self.w.sum().sqrt()  # 0 with an infinite slope

    with pytest.raises(NonFiniteLossError, match="gradient of step 1"):
        train(Root(), [torch.zeros(1)], steps=1, optimizer=sgd(0.1), loss=lambda m, b: m(b))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"accumulate": 0}, "accumulate"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"precision": "fp16"}, "precision"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"loss": lambda m, b: m(b).logits.sum(-1)}, "scalar"),
    ],
)
def test_unusable_arguments_are_named(changes, message):
    arguments = {"steps": 1, "optimizer": sgd(0.1)} | changes
    with pytest.raises(ValueError, match=message):
        train(small_model(), endless(), **arguments)


def test_batches_that_end_too_early_are_an_error_and_lists_go_round():
    with pytest.raises(ValueError, match="ended after 2 micro-batches"):
        train(small_model(), islice(endless(), 2), steps=3, optimizer=sgd(0.1))
    with pytest.raises(ValueError, match="empty"):
        train(small_model(), [], steps=1, optimizer=sgd(0.1))
    batches = list(islice(endless(), 2))
    round_, twice = small_model(), small_model()
    train(round_, batches, steps=4, optimizer=sgd(0.1))
    train(twice, batches + batches, steps=4, optimizer=sgd(0.1))
    assert torch.equal(weights(round_), weights(twice))


def test_a_step_without_targets_and_a_frozen_model_are_errors():
    ids = next(endless())
    with pytest.raises(ValueError, match="step 1 has no target"):
        train(small_model(), [{"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}], steps=1, optimizer=sgd(0.1))
    frozen = small_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        train(frozen, endless(), steps=1, optimizer=sgd(0.1))


# -- several processes -----------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time, torch
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
import test_training as t
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from papertrial.lm import training
from torch.distributed.tensor import DTensor

place, sharded, kill_at = sys.argv[1], sys.argv[2] == "fsdp2", int(sys.argv[3])
make = training._accelerator

def told_to_shard():  # of itself, accelerate shards only on accelerators
    accelerator = make()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                            transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator

def leave_together():
    # Without goodbyes, and only once both are out of the barrier: gloo aborts a process that still hears from another
    # which leaves. So they tell each other by files.
    torch.distributed.barrier()
    marks = [f"{{place}}.out.{{kill_at}}.{{rank}}" for rank in range(2)]
    open(marks[torch.distributed.get_rank()], "w").close()
    while not all(map(os.path.exists, marks)):
        time.sleep(0.01)
    sys.stdout.flush()
    os._exit(0)

if sharded:
    training._accelerator = told_to_shard
model, seen = t.small_model(tie_word_embeddings=False), []
def look(step):
    seen.append(any(isinstance(p, DTensor) for p in model.parameters()))
    if step == kill_at:
        leave_together()
report = training.train(model, list(t.unequal_batches()[:2]), steps=6, optimizer=training.adamw(1e-2),
                        checkpoint=place, checkpoint_every=2, after_step=look)
if torch.distributed.get_rank() == 0:
    print(report.resumed_at, any(seen), *report.losses)
leave_together()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_compute_what_one_does_with_accumulation_and_resume(way, tmp_path):
    """Over gloo on the CPU, replicated and sharded: the same losses to float32 rounding."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(here=os.path.dirname(__file__)))
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    for kill_at in ("3", "-1"):
        done = subprocess.run(
            [*command, str(tmp_path / "place"), way, kill_at],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    resumed, sharded, *losses = done.stdout.split()
    alone = train(
        small_model(tie_word_embeddings=False),
        list(unequal_batches()[:2]),
        steps=6,
        accumulate=2,
        optimizer=adamw(1e-2),
    )
    assert resumed == "2", "stopped in the hook of the fourth step, before its place was saved"
    assert sharded == str(way == "fsdp2")
    assert [float(loss) for loss in losses] == pytest.approx(alone.losses, rel=1e-5)
