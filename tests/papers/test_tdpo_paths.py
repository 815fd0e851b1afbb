"""TDPO's trial reads runs where they reach a reward: what a path of checkpoints shows, and what it cannot show."""

import math
from dataclasses import replace

import pytest

from papertrial.lab.trial import PreconditionFailed, Trial, trial_parameters
from papertrial.papers.finetuning.tdpo import experiment
from papertrial.papers.finetuning.tdpo.paths import Path, Setting

LEVELS = [1.5, 2.1, 2.7]

# a run that reaches 2.75, falls apart within a few steps, and comes back at another price
REWARDS = [0.0, 0.5, 1.2, 1.6, 2.0, 2.2, 2.4, 2.6, 2.75, 2.3, 2.4, 2.5, 2.8]
COSTS = [0.0, 0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 1.0, 1.3, 3.9, 3.5, 3.1, 2.5]


def path(rewards, costs, prompts=("valid", "test")):
    made = Path(Setting("dpo", 0.1, 1e-3, 1, 1, 1))
    for step, (reward, cost) in enumerate(zip(rewards, costs, strict=True)):
        found = {"reward": reward, "reverse_kl": cost, "forward_kl": cost, "kl_gap": cost, "chosen_kl": cost}
        found |= {"rejected_kl": cost, "step": 5.0 * step, "accuracy": 1.0, "valid": 1.0, "entropy": 1.0}
        for name in prompts:
            made.records[name].append(found)
    return made


def trial(scale="small", **changes):
    return Trial("tdpo", scale, 0, trial_parameters("tdpo", experiment.SCALES, scale)[1] | changes)


def metrics(run):
    return experiment._metrics(trial(), "dpo", run, run.records["test"][0])


def test_a_path_is_read_by_straight_lines_where_it_first_reaches_a_reward():
    found = metrics(path(REWARDS, COSTS))
    # 3/4 of the way from 0.2 to 0.4, half from 0.6 to 0.7, two thirds from 1.0 to 1.3
    assert found["kl_at_matched_reward"] == pytest.approx((0.35 + 0.65 + 1.2) / 3)
    assert found["reward"] == pytest.approx(sum(LEVELS) / 3)
    assert found["largest_jump"] == pytest.approx(0.3)


@pytest.mark.parametrize("arm", ["dpo", "tdpo2", "dpo_tuned", "tdpo2_tuned"])
def test_a_level_that_was_passed_between_two_sparse_checkpoints_is_not_read_after_the_fall(arm):
    sparse = path(REWARDS[::3], COSTS[::3])
    # left alone, the last level would be read at 2.8 nats, where it was passed at 1.2
    assert sparse.matched([2.7], "test")["reverse_kl"] == pytest.approx(2.78)
    with pytest.raises(PreconditionFailed, match=f"divergence of {arm} jumps by 3.1 nats"):
        experiment._metrics(trial(), arm, sparse, sparse.records["test"][0])
    # TDPO1 is not on trial, so that it is left out of the comparison and the rest goes on
    sparse.setting = replace(sparse.setting, objective="tdpo1")
    found = experiment._metrics(trial(), "tdpo1", sparse, sparse.records["test"][0])
    assert found == {"highest_reward": 2.8, "largest_jump": pytest.approx(3.1)}


def test_what_a_run_does_after_it_was_read_does_not_count():
    run = path(REWARDS, COSTS)
    assert run.largest_jump(LEVELS, "test") == pytest.approx(0.3)
    assert run.largest_jump([2.8], "test") == pytest.approx(2.6)
    assert run.largest_jump([9.0], "test") == pytest.approx(2.6)


def test_between_successive_steps_nothing_can_be_missed():
    run = path(REWARDS, COSTS)
    for records in run.records.values():
        for number, record in enumerate(records):
            record["step"] = float(number)
    assert run.largest_jump([9.0], "test") == 0
    assert metrics(run)["kl_at_matched_reward"] == pytest.approx((0.35 + 0.65 + 1.2) / 3)


def test_where_the_divergence_jumps_every_step_is_measured_and_training_goes_on_unchanged():
    runs = []
    for limit, every in ((1e9, 4), (0.02, 4), (1e9, 1)):
        of_seed = trial("smoke", levels=[50.0], largest_jump=limit)
        task = experiment.sentiment_task(of_seed)
        runs.append(experiment.train_arm(of_seed, task, Setting("dpo", 0.1, 5e-3, 11, 2, every), task.pairs).records)
    sparse, refined, dense = runs
    by_step = {prompts: {r["step"]: r for r in records} for prompts, records in dense.items()}
    for prompts, records in refined.items():
        assert records == [by_step[prompts][r["step"]] for r in records]  # what was measured is what a look finds
    steps = [r["step"] for r in refined["test"]]
    assert steps == sorted(set(steps))
    assert {0, 2, 6, 10, 11} == {r["step"] for r in sparse["test"]} < set(steps)
    for one, other in zip((2, 6), (6, 10), strict=True):
        jump = max(abs(r[one]["reverse_kl"] - r[other]["reverse_kl"]) for r in by_step.values())
        assert (one + 1 in steps) == (jump > 0.02), (one, jump)
    assert any(step in steps for step in (3, 7))


def test_the_error_of_the_grid_is_what_leaving_out_every_second_checkpoint_changes():
    straight = path([0, 1, 2, 3, 4], [0, 2, 4, 6, 8])
    assert straight.grid_error([1.5, 2.5], "test") == pytest.approx(0)
    square = path([0, 1, 2, 3, 4], [0, 1, 4, 9, 16])
    # at 2.5 squares by lines give 6.5 from neighbours and 7 from every second
    assert square.grid_error([2.5], "test") == pytest.approx(100 * 0.5 / 6.5)
    assert path([0, 1, 2, 3], [0, 1, 2, 3]).grid_error([2.5], "test") is None
    assert path([0, 1, 2], [0, 1, 2]).grid_error([2.5], "test") is None


def test_a_setting_is_chosen_by_its_divergence_at_the_matched_rewards_on_validation_prompts():
    cheap, dear = path([0, 1, 2], [0, 1, 2]), path([0, 2], [0, 8])
    assert cheap.cost([1.0, 2.0]) == pytest.approx(1.5)
    assert dear.cost([1.0, 2.0]) == pytest.approx(6.0)
    assert path([0, 1], [0, 0]).cost([1.0, 2.0]) == math.inf
    # a run that looks cheap on the test prompts is not chosen for that
    dear.records["test"] = path([0, 2], [0, 0]).records["test"]
    assert min([dear, cheap], key=lambda p: p.cost([1.0])) is cheap


def test_a_run_has_passed_a_level_once_it_has_on_both_sets_of_prompts():
    run = path([0, 1, 2], [0, 1, 2])
    assert run.passed(2)
    run.records["valid"].pop()
    assert not run.passed(2)
    assert run.passed(1)


def test_a_run_stops_at_the_first_checkpoint_past_the_last_level_and_is_otherwise_the_same():
    steps = {"objective": "dpo", "beta": 0.1, "lr": 5e-3, "steps": 13, "first": 4, "every": 2}
    runs = []
    for levels in ([0.1, 0.3], [50.0]):
        of_seed = trial("smoke", levels=levels)
        task = experiment.sentiment_task(of_seed)
        runs.append(experiment.train_arm(of_seed, task, Setting(**steps), task.pairs))
    stopped, whole = runs
    sets = whole.records.values()
    last = next(i for i in range(7) if all(any(r["reward"] >= 0.3 for r in records[: i + 1]) for records in sets))
    assert 0 < last < 6
    assert stopped.records == {name: records[: last + 1] for name, records in whole.records.items()}
    assert [record["step"] for record in whole.records["test"]] == [0, 4, 6, 8, 10, 12, 13]


def test_every_arm_of_a_scale_is_trained_on_the_same_grid(monkeypatch):
    heard = []
    train_arm = experiment.train_arm

    def listen(trial, task, setting, pairs, purpose=""):
        heard.append((setting, purpose))
        return train_arm(trial, task, setting, pairs, purpose)

    monkeypatch.setattr(experiment, "train_arm", listen)
    of_seed = trial("smoke")
    found = experiment.run(of_seed)
    grids = {(s.lr, s.steps, s.first, s.every) for s, purpose in heard if not purpose}
    assert grids == {tuple(rate.values()) for rate in of_seed["rates"]}
    betas = [(s.objective, s.beta) for s, purpose in heard if not purpose]
    assert betas == [("dpo", 0.1), ("tdpo1", 0.1), ("tdpo2", 0.1), ("dpo", 0.3), ("tdpo2", 0.3)]
    (placebo,) = (s for s, purpose in heard if purpose)
    assert found["tdpo2_placebo"]["steps"] == placebo.steps >= found["tdpo2"]["steps"]
    assert found["tdpo2_placebo"]["reward"] < found["tdpo2"]["reward"]
