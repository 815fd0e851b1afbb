import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import random_ids, tiny_model, tiny_tokenizer
from papertrial import cli
from papertrial.errors import PapertrialError, UsageError
from papertrial.lab import applying
from papertrial.lab.apply_options import applicable, given_options, method_of, options_of
from papertrial.lab.applying import apply_to_checkpoint
from papertrial.lab.claim import find_card
from papertrial.lm.models import load
from papertrial.lm.scoring import perplexity

METHOD = '''
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from papertrial.lm.changing import Changed
from papertrial.lm.pruning import keep_layers

if TYPE_CHECKING:
    from papertrial.lm.models import Checkpoint


@dataclass(frozen=True)
class Options:
    layers: Annotated[int, "how many stay"] = 1
    first: Annotated[bool, "the first ones"] = True
    note: str = ""
    mode: Literal["fast", "slow"] = "fast"
    weight: float = 0.5


def apply(checkpoint: "Checkpoint", texts, options: Options, *, generator, on_progress=None):
    """Keep some layers."""
    count = checkpoint.model.config.num_hidden_layers
    if options.layers > count:
        raise ValueError(f"layers is {options.layers} and the model has {count}")
    kept = range(options.layers) if options.first else range(count - options.layers, count)
    facts = {"texts seen": len(texts), "note": options.note, "drawn": float(generator.initial_seed())}
    return Changed(keep_layers(checkpoint.model, list(kept)), f"Kept layers {list(kept)}.", facts)
'''


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint on disk: a tiny Llama in bfloat16 with a tokenizer."""
    path = tmp_path / "tiny"
    tiny_model("llama", num_key_value_heads=4).bfloat16().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture
def texts(tmp_path) -> dict[str, Path]:
    calibration, evaluation = tmp_path / "calibration.jsonl", tmp_path / "evaluation.txt"
    lines = ["the cat sat on the mat, then the dog came back.", "a quick brown fox jumps over the lazy dog!"] * 20
    calibration.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    evaluation.write_text("the lazy dog sat on the mat. then a quick fox came back over the cat! " * 4)
    return {"calibration": str(calibration), "evaluation": str(evaluation)}


@pytest.fixture
def toy_method(toy):
    (toy.folder / "method.py").write_text(METHOD)
    return toy


def amp(folder, out, texts, *arguments, **settings):
    small = ("--prompts", "20", "--prompt-tokens", "24")
    return apply_to_checkpoint(
        find_card("amp_pruning"), str(folder), out, (*small, *arguments), evaluation_tokens=200, **texts, **settings
    )


# -- what is written ---------------------------------------------------------------------------------------------


def test_an_applied_method_is_an_ordinary_folder_with_its_tokenizer_and_true_figures(folder, texts, tmp_path):
    applied = amp(folder, tmp_path / "out", texts, "--ratio", "0.3")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16  # as it was given, though it was computed in float32
    assert sum(p.numel() for p in model.parameters()) == applied.after.parameters < 0.75 * applied.before.parameters
    files = {name: (path / "model.safetensors").stat().st_size for name, path in
             (("before", folder), ("after", tmp_path / "out"))}  # fmt: skip
    assert (files["before"], files["after"]) == (applied.before.bytes, applied.after.bytes)
    text = Path(texts["evaluation"]).read_text()
    for cost, of in ((applied.before, folder), (applied.after, tmp_path / "out")):
        checkpoint = load(str(of))
        ids = checkpoint.tokenizer(text)["input_ids"][:200]
        expected = perplexity(checkpoint.model, [ids], window=64, stride=32)
        assert cost.perplexity == pytest.approx(expected, rel=1e-6)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_the_card_says_what_was_done_and_what_it_cost(folder, texts, tmp_path):
    applied = amp(folder, tmp_path / "out", texts, "--ratio", "0.3", "--mlp-criterion=projected", seed=7)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        applied.summary,
        f"| parameters | {applied.before.parameters:,} | {applied.after.parameters:,} |",
        f"| perplexity, lower is better | {applied.before.perplexity:,.4g} | {applied.after.perplexity:,.4g} |",
        "arxiv.org/abs/2504.21174",
        "| `--mlp-criterion` | projected |",
        "| `--seed` | 7 |",
        "evaluation.txt",
    ):
        assert part in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert str(tmp_path) not in card  # where the user's folders lie is not told
    record = json.loads((tmp_path / "out" / "papertrial.json").read_text())
    assert record == json.loads(json.dumps(applied.record))
    assert record["options"]["ratio"] == 0.3


def test_a_checkpoint_of_the_hub_is_named_as_base_model_and_a_folder_is_not(folder, texts, tmp_path):
    record = amp(folder, tmp_path / "out", texts).record
    card = find_card("amp_pruning")
    assert "base_model" not in applying.model_card(card, record)
    record = {**record, "base": {**record["base"], "model": "org/name@main"}}
    assert 'base_model: "org/name"' in applying.model_card(card, record)


def test_the_same_seed_writes_the_same_weights(folder, texts, tmp_path):
    for name in ("one", "two"):
        amp(folder, tmp_path / name, texts, "--tune-steps", "2", "--tune-batch", "2", seed=3)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


def test_the_given_folder_is_untouched(folder, texts, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    amp(folder, tmp_path / "out", texts)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_default_texts_are_the_house_corpus_apart_from_what_the_model_saw(monkeypatch, tmp_path):
    applied = apply_to_checkpoint(
        find_card("amp_pruning"), "house:prose", tmp_path / "out", ["--prompts", "8"], evaluation_tokens=2000
    )
    assert "training part" in applied.record["calibration"]["source"]
    assert "held-out part" in applied.record["evaluation"]["source"]
    assert applied.before.perplexity < 60  # it is its own kind of text
    assert applied.after.perplexity > applied.before.perplexity
    ids = random_ids(1, 8)
    again = load(str(tmp_path / "out")).model
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)(ids).logits,
                       again(ids).logits)  # fmt: skip


# -- nothing half done -------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(folder, texts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match="exists; nothing is overwritten"):
        amp(folder, out, texts)
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists; nothing is overwritten"):
        amp(folder, out, texts)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="a file is in the way"):
        amp(folder, file / "out", texts)


def test_a_folder_that_appears_meanwhile_is_kept_as_it_is(folder, texts, tmp_path, monkeypatch):
    out, write = tmp_path / "out", applying._write_model

    def meanwhile(*arguments):
        write(*arguments)
        out.mkdir()

    monkeypatch.setattr(applying, "_write_model", meanwhile)
    with pytest.raises(UsageError, match="come into being meanwhile"):
        amp(folder, out, texts)
    assert not list(out.iterdir())
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("x")])
def test_a_failure_while_writing_leaves_nothing(folder, texts, tmp_path, monkeypatch, error):
    def fail(model, checkpoint, staging):
        (staging / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(applying, "_write_model", fail)
    with pytest.raises(type(error)):
        amp(folder, tmp_path / "out", texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.jsonl", "evaluation.txt", "tiny"]


HELD = """
import sys, time
from pathlib import Path
from papertrial.lab import applying
from papertrial.lab.claim import find_card

write = applying._write_model
def held(model, checkpoint, staging):
    write(model, checkpoint, staging)
    Path(sys.argv[5]).touch()
    time.sleep(60)
applying._write_model = held
applying.apply_to_checkpoint(
    find_card("amp_pruning"), sys.argv[1], Path(sys.argv[2]), ["--prompts", "20", "--prompt-tokens", "24"],
    calibration=sys.argv[3], evaluation=sys.argv[4],
)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_leaves_no_folder_under_the_name_and_the_next_run_clears_up(folder, texts, tmp_path, how):
    out, marker = tmp_path / "out", tmp_path / "written"
    arguments = [str(path) for path in (folder, out, *texts.values(), marker)]
    process = subprocess.Popen([sys.executable, "-c", HELD, *arguments])
    try:
        deadline = time.monotonic() + 120
        while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert marker.exists()
        assert not out.exists()
        os.kill(process.pid, how)
        process.wait(30)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert not out.exists()
    left = list(tmp_path.glob(".out.*.partial"))
    assert len(left) == (how == signal.SIGKILL)  # SIGTERM can clear up, SIGKILL cannot
    amp(folder, out, texts)
    assert load(str(out)).model is not None
    assert not list(tmp_path.glob(".out.*.partial"))


# -- the contract ------------------------------------------------------------------------------------------------


def test_a_paper_outside_the_package_takes_part_by_its_function_alone(toy_method, folder, texts, tmp_path):
    assert {"toy", "amp_pruning"} <= set(applicable())
    applied = apply_to_checkpoint(
        toy_method, str(folder), tmp_path / "out", ["--layers=1", "--no-first", "--note", "two | words\nand more"],
        evaluation_tokens=100, seed=5, **texts,
    )  # fmt: skip
    assert applied.summary == "Kept layers [1]."
    assert applied.facts == {"texts seen": 40, "note": "two | words\nand more", "drawn": 5.0}
    assert "| note | two \\| words and more |" in (tmp_path / "out" / "README.md").read_text()
    assert load(str(tmp_path / "out")).model.config.num_hidden_layers == 1


def test_what_the_method_refuses_is_one_line_that_names_paper_and_model(toy_method, folder, texts, tmp_path):
    with pytest.raises(UsageError, match=r"toy cannot be applied to .*tiny: layers is 9 and the model has 2"):
        apply_to_checkpoint(toy_method, str(folder), tmp_path / "out", ["--layers", "9"], **texts)
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True)
class Options:
    ratio: Annotated[float, "how much"] = 0.5
    steps: int = 3
    loud: bool = False
    mode: Literal["a", "b"] = "a"


def read(*arguments):
    return given_options(find_card("amp_pruning"), Options, arguments)


def test_options_are_read_by_their_types():
    assert read() == Options()
    assert read("--ratio", "0.25", "--steps=7", "--loud", "--mode", "b") == Options(0.25, 7, True, "b")
    assert read("--no-loud").loud is False
    assert read("--ratio=-1e-3").ratio == -1e-3
    table = {option.flag: (option.values, option.default, option.help) for option in options_of(Options, "toy")}
    assert table["--ratio"] == ("float", 0.5, "how much")
    assert table["--mode"] == ("a|b", "a", "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ration", "1"], r"no option '--ration'; did you mean --ratio\? it has --ratio, --steps"),
        (["house:prose"], "no option 'house:prose'"),
        (["--ratio"], "--ratio needs a value: float"),
        (["--ratio", "much"], "--ratio is 'much'; it takes float"),
        (["--ratio", "nan"], "takes a finite number"),
        (["--steps", "1.5"], "--steps is '1.5'; it takes int"),
        (["--mode", "c"], r"--mode is 'c'; it takes a\|b"),
        (["--loud=yes"], "takes no value"),
        (["--steps", "1", "--steps", "2"], "--steps is given twice"),
    ],
)
def test_mistaken_options_are_named(arguments, says):
    with pytest.raises(UsageError, match=says):
        read(*arguments)


def test_papers_that_change_no_checkpoint_are_refused_with_those_that_do(toy):
    with pytest.raises(UsageError, match=r"contrastive_search has nothing to apply.*amp_pruning"):
        method_of(find_card("contrastive_search"))
    with pytest.raises(UsageError, match="toy has nothing to apply"):
        method_of(toy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("options: Options", "options"), "does not annotate options"),
        (("generator,", "seed,"), "no parameter generator"),
        (("layers: Annotated[int, \"how many stay\"] = 1", "layers: list = None"), "option layers must have a default"),
        (('mode: Literal["fast", "slow"]', 'mode: Literal["fast", 1]'), "option mode must"),
    ],
)  # fmt: skip
def test_a_function_that_breaks_the_contract_is_the_papers_mistake(toy, change, says):
    assert change[0] in METHOD
    (toy.folder / "method.py").write_text(METHOD.replace(*change))
    with pytest.raises(PapertrialError, match=says) as caught:
        method_of(toy)
    assert not isinstance(caught.value, UsageError)


def test_every_paper_that_applies_keeps_to_the_contract():
    for slug in applicable():
        options = options_of(method_of(find_card(slug)).options, slug)
        assert options
        assert all(option.help for option in options), slug


# -- texts -------------------------------------------------------------------------------------------------------


def test_evaluation_text_must_not_be_calibration_text(folder, texts, tmp_path):
    with pytest.raises(UsageError, match="also stands in the calibration"):
        amp(folder, tmp_path / "out", {**texts, "evaluation": texts["calibration"]})


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def papertrial(monkeypatch, capsys):
    """The command line in this process: what it printed, its errors, its exit code."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["papertrial", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        return printed.out, printed.err, caught.value.code

    return run


def test_the_command_writes_the_folder_and_prints_what_it_cost(folder, texts, tmp_path):
    done = subprocess.run(
        [
            sys.executable, "-m", "papertrial", "apply", "amp_pruning", "--model", str(folder), "--out",
            str(tmp_path / "out"), "--ratio", "0.25", "--prompts", "20", "--calibration", texts["calibration"],
            "--evaluation", texts["evaluation"], "--prompt-tokens", "24", "--json",
        ],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["options"]["ratio"] == 0.25
    assert record["after"]["parameters"] < record["before"]["parameters"]
    assert load(str(tmp_path / "out")).model.config.intermediate_size < 44


def test_the_command_prints_a_table(folder, texts, tmp_path, papertrial):
    out, err, code = papertrial(
        "apply", "amp_pruning", "--model", str(folder), "--out", str(tmp_path / "out"), "--prompts=20",
        "--calibration", texts["calibration"], "--evaluation", texts["evaluation"], "--prompt-tokens=24",
    )  # fmt: skip
    assert not code, err
    for part in ("parameters", "bytes of weights", "perplexity", "neurons are left", str(tmp_path / "out")):
        assert part in out


def test_the_command_lists_the_options_of_a_method(papertrial):
    out, _, code = papertrial("apply", "amp_pruning", "--options")
    assert not code
    assert "--ratio" in out
    assert "--tune-steps" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["apply", "amp_prunning", "--options"], "did you mean amp_pruning"),
        (["apply", "amp_pruning"], "give --model and --out"),
        (["apply", "contrastive_search", "--model", "house:prose", "--out", "{out}"], "has nothing to apply"),
        (["apply", "amp_pruning", "--model", "/nowhere", "--out", "{out}"], "no such model folder"),
        (["apply", "amp_pruning", "--model", "house:prose", "--out", "{out}", "--ratio", "x"], "--ratio is 'x'"),
        (["apply", "amp_pruning", "--model", "house:prose", "--out", "{out}", "--size", "1"], "no option '--size'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, papertrial, arguments, says):
    _, err, code = papertrial(*(argument.format(out=tmp_path / "out") for argument in arguments))
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_family_is_one_line(texts, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=67, hidden_size=8, num_hidden_layers=1, state_size=2)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tiny_tokenizer().save_pretrained(tmp_path / "mamba")
    with pytest.raises(UsageError, match=r"amp_pruning cannot be applied to .*mamba: no anatomy for Mamba.*gpt2"):
        amp(tmp_path / "mamba", tmp_path / "out", texts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_families_that_cannot_be_treated_are_one_line(family, texts, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / family)
    tiny_tokenizer().save_pretrained(tmp_path / family)
    says = {"gpt2": "gpt2 has no head size of its own.*prune neurons only", "bert": "causal language model is needed"}
    with pytest.raises(UsageError, match=says[family]):
        amp(tmp_path / family, tmp_path / "out", texts, "--ratio", "0.3")
    if family == "gpt2":
        amp(tmp_path / family, tmp_path / "out", texts, "--ratio", "0.1", "--parts", "mlp")
        assert load(str(tmp_path / "out")).model.config.n_inner < 44
