import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from families import tiny_model
from papertrial import cli
from papertrial.errors import PapertrialError, UsageError
from papertrial.lab import runner
from papertrial.lab.evidence import own_path, read_evidence, write_atomically, write_evidence
from papertrial.lab.report import drawings, render
from papertrial.lab.runner import TrialFailed
from papertrial.lab.trial import Trial
from papertrial.lab.verdict import judge
from papertrial.lab.workers import WorkerLostError
from papertrial.lm.models import quiet_transformers
from papertrial.lm.tokenizers import byte_tokenizer
from papertrial.terminal import folded


def plan_run(*arguments, workers=1, **settings):
    """In this process, unless a test says otherwise."""
    return runner.plan_run(*arguments, workers=workers, **settings)


def papertrial(*arguments, papers, home, **environment):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "papertrial", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PAPERTRIAL_PAPERS": str(papers), "PAPERTRIAL_HOME": str(home), **environment},
    )


def test_a_run_gives_every_seed_every_arm_and_a_verdict(toy):
    evidence = runner.run(plan_run(toy, "small"))
    assert [t.seed for t in evidence.trials] == [0, 1, 2, 3]
    assert evidence.arms == ["plain", "added", "control"]
    assert judge(toy.headline, evidence).word == "upheld"
    assert evidence.trials[0].curves["loss"]["plain"] == [(float(i), 5.0 - i) for i in range(5)]
    assert "lab/trial.py" in evidence.trials[0].substrate


def test_the_same_seed_gives_the_same_numbers(toy):
    first, second = (runner.run(plan_run(toy, "small", seeds=2), fresh=True) for _ in range(2))
    assert [t.metrics for t in first.trials] == [t.metrics for t in second.trials]
    assert first.trials[0].metrics != first.trials[1].metrics


def test_seeds_side_by_side_give_the_same_numbers_in_the_order_of_the_seeds(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    heard = []
    progress = type("Progress", (runner.ProgressListener,), {"update": lambda self, *event: heard.append(event)})()
    together = runner.run(plan_run(toy, "small", workers=2), progress=progress, fresh=True)
    alone = runner.run(plan_run(toy, "small"), fresh=True)
    assert [t.metrics for t in together.trials] == [t.metrics for t in alone.trials]
    assert together.environment.workers == 2
    assert ("seed 3: adding", 5, 5) in heard


@pytest.mark.parametrize("mode", ["nan", "arm"])
def test_a_failure_in_a_worker_is_the_same_error(toy, monkeypatch, mode):
    monkeypatch.setenv("TOY_MODE", mode)
    with pytest.raises(runner.TrialFailed, match="toy, seed"):
        runner.run(plan_run(toy, "small", workers=2))


def test_a_worker_that_is_killed_is_an_error_and_finished_seeds_are_kept(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("TOY_MODE", "die")
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    plan = plan_run(toy, "small", workers=2)
    with pytest.raises(WorkerLostError, match="ended with code"):
        runner.run(plan)
    monkeypatch.setenv("TOY_MODE", "")
    assert len(runner.run(plan).trials) == 4


def test_more_seeds_than_the_scale_has_go_on_counting(toy):
    assert plan_run(toy, "small", seeds=6).seeds == (0, 1, 2, 3, 4, 5)
    assert plan_run(toy, "small", seeds=2).seeds == (0, 1)


@pytest.mark.parametrize(
    ("mode", "says"), [("nan", "diverged"), ("arm", "needs score of arm added"), ("metric", "it has other")]
)
def test_what_is_not_evidence_is_a_failed_trial(toy, monkeypatch, mode, says):
    monkeypatch.setenv("TOY_MODE", mode)
    with pytest.raises(runner.TrialFailed, match=says):
        runner.run(plan_run(toy, "smoke"))


def test_a_failed_precondition_is_recorded_with_its_reason(toy, monkeypatch):
    monkeypatch.setenv("TOY_MODE", "weak")
    evidence = runner.run(plan_run(toy, "small"))
    judged = judge(toy.headline, evidence)
    assert judged.word == "undecided"
    assert "10 % where 90 %" in judged.reason


def test_a_second_run_resumes_finished_seeds_and_fresh_does_not(toy, monkeypatch, tmp_path):
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))
    plan = plan_run(toy, "small")
    runner.run(plan_run(toy, "small", seeds=2))
    runner.run(plan)
    assert log.read_text().split() == ["0", "1", "2", "3"]
    runner.run(plan, fresh=True)
    assert log.read_text().split() == ["0", "1", "2", "3"] * 2


def test_a_damaged_record_is_run_again(toy):
    plan = plan_run(toy, "small")
    runner.run(plan)
    (plan.folder / "seed-2.json").write_text('{"seed": 2, "metr')
    assert runner.finished_seeds(plan) == [0, 1, 3]
    assert len(runner.run(plan).trials) == 4


def test_a_changed_parameter_or_method_does_not_resume(toy):
    plan = plan_run(toy, "small")
    runner.run(plan)
    (toy.folder / "method.py").write_text("ADD = 2\n")
    assert runner.finished_seeds(plan_run(toy, "small")) == []


def test_unknown_scale_and_missing_device_are_named(toy):
    with pytest.raises(UsageError, match="known: smoke, small, gpu, paper"):
        plan_run(toy, "tiny")
    with pytest.raises(UsageError, match="no scale 'paper'"):
        plan_run(toy, "paper")
    with pytest.raises(UsageError, match="cannot be used"):
        plan_run(toy, "small", device="cuda:99")


def test_experiments_read_parameters_by_name(toy):
    trial = Trial("toy", "small", 0, {"steps": 3})
    assert trial["steps"] == 3
    with pytest.raises(KeyError, match="it has \\['steps'\\]"):
        trial["stepz"]


def test_streams_differ_by_purpose_and_seed_only():
    draws = {
        (seed, purpose): Trial("toy", "small", seed, {}).generator(purpose).initial_seed()
        for seed in (0, 1)
        for purpose in ("data", "init")
    }
    assert len(set(draws.values())) == 4
    assert draws[0, "data"] == Trial("toy", "gpu", 0, {}).generator("data").initial_seed()


def test_evidence_survives_a_round_trip_and_damage_is_named(toy, tmp_path):
    evidence = runner.run(plan_run(toy, "smoke"))
    path = tmp_path / "evidence" / "smoke.json"
    write_evidence(path, evidence)
    assert read_evidence(path) == evidence
    path.write_text(path.read_text().replace('"slug"', '"slag"'))
    with pytest.raises(PapertrialError, match="is not evidence"):
        read_evidence(path)


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "file.json"
    write_atomically(target, "old")
    with pytest.raises(PapertrialError, match="cannot write /dev/full/x"):
        write_atomically(type(target)("/dev/full/x"), "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_report_is_self_contained_and_escapes_what_models_wrote(toy):
    page = render(toy, runner.run(plan_run(toy, "small")))
    assert "<script" not in page
    assert "1 &lt;b&gt;&amp;" in page
    assert "upheld" in page
    assert "<svg" in page
    assert "default-src 'none'" in page
    assert "papertrial run toy --scale small --seeds 4" in page


def test_of_claims_on_one_metric_the_first_is_drawn(toy, monkeypatch):
    evidence = runner.run(plan_run(toy, "small"))
    first = toy.claim[0]
    card = toy.model_copy(update={"claim": [first, first.model_copy(update={"baseline": "control"})]})
    drawn = []
    monkeypatch.setattr("papertrial.lab.figures.draw_arms", lambda _, claim, width: drawn.append(claim.baseline))
    drawings(card, evidence)
    assert drawn == ["plain"]


def test_the_command_ends_in_a_table_a_verdict_and_a_report(toy_papers, tmp_path):
    done = papertrial("run", "toy", papers=toy_papers, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert "upheld" in done.stdout
    assert all(word in done.stdout for word in ("metric", "baseline", "method", "effect", "margin 0.5", "at small"))
    assert (tmp_path / "home/reports/toy-small.html").is_file()
    as_json = papertrial("run", "toy", "--json", "--workers", "1", papers=toy_papers, home=tmp_path / "home")
    data = json.loads(as_json.stdout)
    assert data["claims"][0]["verdict"] == "upheld"
    assert data["arms"]["control"]["score"]["mean"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["run", "toi"], "did you mean toy", 2),
        (["run", "toy", "--scale", "huge"], "unknown scale 'huge'", 2),
        (["run", "toy", "--seeds", "0"], "--seeds must lie in 1..1000", 2),
        (["run", "toy", "--record", "--scale", "smoke"], "can be recorded", 2),
        (["run", "toy", "--record", "--seeds", "2"], "needs at least 3 seeds, got 2", 2),
        (["run", "toy", "--model", "house:prose"], "toy makes its own models; run it without --model", 2),
        (["list", "--verdict", "guilty"], "unknown verdict 'guilty'", 2),
        (["show", "2101.00001"], "no paper in scope has the arXiv id", 2),
        (["list", "--family", "cooking"], "unknown family 'cooking'", 2),
    ],
)
def test_mistakes_are_one_line_with_an_exit_code(toy_papers, tmp_path, arguments, says, code):
    done = papertrial(*arguments, papers=toy_papers, home=tmp_path / "home")
    assert done.returncode == code
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_show_list_and_check_say_what_there_is(toy_papers, tmp_path):
    home = tmp_path / "home"
    assert papertrial("run", "toy", papers=toy_papers, home=home).returncode == 0
    shown = papertrial("show", "toy", papers=toy_papers, home=home).stdout
    for part in ("A toy paper about adding one", "Your runs", "upheld", "Limits:", "papertrial run toy"):
        assert part in shown
    as_json = json.loads(papertrial("show", "toy", "--json", papers=toy_papers, home=home).stdout)
    assert as_json["state"] == "incomplete"  # a run of one's own is not reference evidence
    assert as_json["own_runs"][0]["claims"][0]["verdict"] == "upheld"
    listed = papertrial("list", "--family", "decoding", "--json", papers=toy_papers, home=home).stdout
    assert {"toy", "contrastive_search"} <= {row["slug"] for row in json.loads(listed)}
    checked = papertrial("check", "--json", papers=toy_papers, home=home)
    assert checked.returncode == 1
    assert "no evidence at small" in checked.stdout


@pytest.fixture
def held_run(toy_papers, tmp_path):
    """A run in its own process that has finished seed 0 and is held in seed 1; and how to run the command again."""
    hold, home, log = tmp_path / "hold", tmp_path / "home", tmp_path / "log"
    hold.touch()
    environment = {"TOY_HOLD": str(hold), "TOY_LOG": str(log)}
    process = subprocess.Popen(
        [sys.executable, "-m", "papertrial", "run", "toy", "--workers", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PAPERTRIAL_PAPERS": str(toy_papers), "PAPERTRIAL_HOME": str(home), **environment},
        # a shell that runs the tests in the background has them, and so their children, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(home.glob("runs/toy/*/seed-0.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run did not get that far"
        time.sleep(0.02)

    def again():
        return papertrial("run", "toy", "--workers", "1", papers=toy_papers, home=home, **environment)

    yield process, again, hold, log
    process.kill()


def test_kill_9_loses_no_finished_trial(held_run):
    process, again, hold, log = held_run
    process.send_signal(signal.SIGKILL)
    process.wait()
    hold.unlink()
    done = again()
    assert done.returncode == 0, done.stderr
    assert "seed 0: kept from the interrupted run" in done.stderr
    assert log.read_text().split().count("0") == 1


def test_two_runs_at_once_are_refused_and_ctrl_c_says_how_to_resume(held_run):
    process, again, _, _ = held_run
    second = again()
    assert second.returncode == 3
    assert "another run of toy is in progress" in second.stderr
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "1 of 4 seeds are kept. Resume with: papertrial run toy --workers 1" in stderr
    assert "Traceback" not in stderr


# -- a user's own checkpoint and own papers ---------------------------------------------------------------------------

OF_A_MODEL = """
from papertrial.lab.trial import Trial

SCALES = {"smoke": {"seeds": 2}, "small": {"seeds": 4}}

def run(trial: Trial) -> dict[str, dict[str, float]]:
    model = trial.checkpoint("house:prose").model
    if trial.requested_model and model.config.vocab_size < 50:
        model.model.embed_tokens.weight[10**6]
    size = next(model.parameters()).detach().abs().sum().item()
    return {arm: {"score": size} for arm in ("plain", "added")}
"""


@pytest.fixture
def of_a_model(toy, tmp_path):
    """A toy paper whose experiment takes a model, and a function that writes one."""
    (toy.folder / "experiment.py").write_text(OF_A_MODEL)

    def write(vocabulary: int = 300, scale: float = 1.0) -> str:
        model = tiny_model("llama", vocab_size=vocabulary)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        with quiet_transformers():
            model.save_pretrained(tmp_path / "mine")
            byte_tokenizer().save_pretrained(tmp_path / "mine")
        return str(tmp_path / "mine")

    return toy, write


def test_a_model_that_was_written_anew_is_not_mixed_with_its_former_self(of_a_model):
    toy, write = of_a_model
    model = write()
    first = runner.run(plan_run(toy, "smoke", model=model))
    plan = plan_run(toy, "smoke", model=model)
    assert runner.finished_seeds(plan) == [0, 1]
    write(scale=0.5)
    assert runner.finished_seeds(plan) == []
    second = runner.run(plan)
    for before, after in zip(first.trials, second.trials, strict=True):
        assert after.metrics["plain"]["score"] == pytest.approx(before.metrics["plain"]["score"] / 2)


def test_a_model_that_changes_during_a_run_gives_no_evidence(of_a_model):
    toy, write = of_a_model
    with pytest.raises(TrialFailed, match="changed while it was on trial"):
        runner.run(plan_run(toy, "smoke", model=write()), on_trial=lambda record, _: write(scale=2.0))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_goes_wrong_with_a_users_model_is_one_line_and_the_rest_is_in_a_file(of_a_model, workers):
    toy, write = of_a_model
    model = write(vocabulary=40)
    with pytest.raises(TrialFailed, match=r"toy cannot run on .*mine: IndexError: .*out of bounds") as failed:
        runner.run(plan_run(toy, "smoke", model=model, workers=workers))
    assert "\n" not in str(failed.value)
    log = Path(str(failed.value).partition("(more in ")[2].removesuffix(")"))
    assert "Traceback" in log.read_text()


def test_a_model_nobody_finds_is_said_before_anything_begins(of_a_model, tmp_path):
    toy, _ = of_a_model
    for name, says in (("", "the name of the model is empty"), (str(tmp_path / "no"), "no such model folder")):
        with pytest.raises(UsageError, match=says):
            plan_run(toy, "smoke", model=name)


def test_own_runs_of_different_models_stand_in_different_files():
    names = ["a/b", "a-b", "a b", "/x/" + "long" * 40, "/y/" + "long" * 40]
    assert len({own_path("toy", "small", name) for name in names}) == len(names)


def test_a_full_disk_in_a_worker_is_the_same_error(toy, monkeypatch, tmp_path):
    (toy.folder / "experiment.py").write_text(
        "import errno\nSCALES = {'smoke': {'seeds': 2}, 'small': {'seeds': 4}}\n"
        "def run(trial):\n    raise OSError(errno.ENOSPC, 'No space left on device', '/full')\n"
    )
    for workers in (1, 2):
        with pytest.raises(OSError, match="No space left") as failed:
            runner.run(plan_run(toy, "smoke", workers=workers))
        assert failed.value.errno == errno.ENOSPC


def test_one_damaged_file_hides_nothing_else(toy_papers, tmp_path):
    home = tmp_path / "home"
    (home / "evidence/toy").mkdir(parents=True)
    (home / "evidence/toy/small.json").write_text("{")
    shown = papertrial("show", "toy", papers=toy_papers, home=home)
    assert shown.returncode == 0
    assert "left out:" in shown.stderr
    assert "small.json is not evidence: Invalid JSON" in shown.stderr
    assert "A toy paper about adding one" in shown.stdout
    broken = toy_papers / "decoding" / "broken"
    broken.mkdir()
    (broken / "paper.toml").write_text("title = ")
    listed = papertrial("list", papers=toy_papers, home=home)
    assert listed.returncode == 0
    assert "toy" in listed.stdout
    assert "broken/paper.toml: not valid TOML" in listed.stderr
    checked = papertrial("check", papers=toy_papers, home=home)
    assert checked.returncode == 1
    assert "incomplete broken:" in checked.stdout
    assert "incomplete toy:" in checked.stdout


def test_evidence_of_ones_own_paper_is_recorded_beside_it_and_never_in_an_installed_package(toy, monkeypatch, tmp_path):
    installed = tmp_path / "site-packages/papertrial"
    monkeypatch.setattr("papertrial.cli.__file__", str(installed / "cli.py"))
    cli._require_recordable(toy, "small", None)
    ours = toy.model_copy(update={"folder": installed / "papers/decoding/toy"})
    with pytest.raises(UsageError, match="toy is part of the installed package"):
        cli._require_recordable(ours, "small", None)


def test_a_reader_that_has_seen_enough_is_no_failure(toy_papers, tmp_path):
    environment = {**os.environ, "PAPERTRIAL_PAPERS": str(toy_papers), "PAPERTRIAL_HOME": str(tmp_path)}
    read, write = os.pipe()
    os.close(read)  # whoever read is gone
    command = [sys.executable, "-m", "papertrial", "show", "toy"]
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_names_are_folded_after_underscores():
    assert folded("gradient_evaluations_to_adamw_loss") == "gradient_\nevaluations_\nto_adamw_loss"
    assert folded("plain") == "plain"
    assert folded("averyveryverylongword") == "averyveryverylongword"
    assert folded("_lead__twice_") == "_lead__twice_"
