"""Evaluation on one's own data: against plain loops, and every way in which data can be wrong."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from families import CORE, tiny_model, tiny_tokenizer
from papertrial.errors import UsageError
from papertrial.lm.evaluation import (
    Question,
    Questions,
    Texts,
    evaluate,
    evaluate_questions,
    evaluate_texts,
    read_data,
    read_texts,
)
from papertrial.lm.evaluation.measures import wilson
from papertrial.lm.scoring import windows

QUESTIONS = [
    Question("the cat", (" sat on the mat", " ran", " and the dog"), 0),
    Question("a dog", (" ran", " the cat sat"), 1),
    Question("the", ("mat", "dog and a cat"), 0),
]


def checkpoint(family="llama", **sizes):
    return SimpleNamespace(
        model=tiny_model(family, **sizes), tokenizer=tiny_tokenizer(), name=f"tiny {family}", folder=None
    )


@torch.no_grad()
def nats(model, ids, scored):
    """Negative log-likelihood of the last ``scored`` tokens by one plain pass."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(logits[i - 1, ids[i]]) for i in range(len(ids) - scored, len(ids)))


# -- measures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CORE)
def test_texts_cost_what_a_plain_pass_says(family):
    one = checkpoint(family)
    texts = ["the cat sat on the mat", "a dog ran and the cat ran"]
    result = evaluate_texts(one, texts)
    ids = [[one.tokenizer.bos_token_id, *one.tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
    costs = [nats(one.model, row, len(row) - 1) for row in ids]
    tokens, sizes = sum(len(row) - 1 for row in ids), [len(text.encode()) for text in texts]
    assert result.measures["bits_per_byte"] == pytest.approx(sum(costs) / math.log(2) / sum(sizes), rel=1e-5)
    assert result.measures["token_perplexity"] == pytest.approx(math.exp(sum(costs) / tokens), rel=1e-5)
    assert result.measures["word_perplexity"] == pytest.approx(math.exp(sum(costs) / 13), rel=1e-5)
    assert result.counts == {"texts": 2, "tokens": tokens, "bytes": sum(sizes)}
    low, high = result.intervals["bits_per_byte"]
    assert low < result.measures["bits_per_byte"] < high


def test_a_text_longer_than_the_context_is_read_in_windows_and_every_token_once():
    one = checkpoint()
    text = " ".join(["the cat sat on the mat"] * 12)
    result = evaluate_texts(one, [text])
    assert result.counts["tokens"] > 64
    assert not result.intervals
    ids = [one.tokenizer.bos_token_id, *one.tokenizer(text, add_special_tokens=False).input_ids]
    total = 0.0
    for start, end, scored in windows(len(ids), 64, 32):
        total += nats(one.model, ids[start:end], end - scored)
    assert result.measures["token_perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)


@pytest.mark.parametrize("family", CORE)
def test_the_likeliest_choice_counts(family):
    one = checkpoint(family)
    right = normalised = 0
    for question in QUESTIONS:
        scores, sizes = [], []
        for choice in question.choices:
            text = choice if choice.startswith(" ") else f" {choice}"
            start = [one.tokenizer.bos_token_id]
            alone = start + one.tokenizer(question.context, add_special_tokens=False).input_ids
            joined = start + one.tokenizer(question.context + text, add_special_tokens=False).input_ids
            assert joined[: len(alone)] == alone
            scores.append(-nats(one.model, joined, len(joined) - len(alone)))
            sizes.append(len(text.encode()))
        right += max(range(len(scores)), key=scores.__getitem__) == question.answer
        per_byte = [score / size for score, size in zip(scores, sizes, strict=True)]
        normalised += max(range(len(scores)), key=per_byte.__getitem__) == question.answer
    result = evaluate_questions(one, QUESTIONS)
    assert result.measures["accuracy"] == pytest.approx(right / 3)
    assert result.measures["accuracy_per_byte"] == pytest.approx(normalised / 3)
    assert result.measures["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    assert result.counts == {"questions": 3, "choices": 7}


def test_wilson_is_what_statistics_libraries_give():
    from scipy.stats import binomtest

    for right, n in [(0, 5), (3, 7), (50, 80), (9, 9)]:
        expected = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right, n) == pytest.approx((expected.low, expected.high))


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="at least one text"):
        evaluate_texts(checkpoint(), [])
    with pytest.raises(ValueError, match="at least one question"):
        evaluate_questions(checkpoint(), [])
    mute = checkpoint()
    mute.tokenizer.bos_token = mute.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="can begin a text"):
        evaluate_texts(mute, ["the cat"])


# -- data -----------------------------------------------------------------------------------------------------------


def written(folder, name, rows):
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2 + 2 is", "choices": ["3", "4"], "answer": 1},
        {"query": "2 + 2 is", "options": ["3", "4"], "label": "B"},
        {"ctx": "2 + 2 is", "endings": ["3", "4"], "label": "1"},
        {"prompt": "2 + 2 is", "choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"},
        {"question": "2 + 2 is", "choices": ["3", "4"], "answer": "4"},
    ],
)
def test_questions_of_the_usual_layouts_are_understood(tmp_path, row):
    data = read_data(written(tmp_path, "q.jsonl", [row]))
    assert isinstance(data, Questions)
    assert data.questions == (Question("2 + 2 is", ("3", "4"), 1),)


def test_every_kind_of_file_is_read(tmp_path):
    assert read_data(written(tmp_path, "t.txt", "one\ntwo")) == Texts(("one\ntwo",), str(tmp_path / "t.txt"))
    assert read_data(written(tmp_path, "t.jsonl", [{"text": "one"}, {"text": "two"}])).texts == ("one", "two")
    assert read_data(written(tmp_path, "t.json", '[{"content": "one"}]')).texts == ("one",)
    table = 'question,choices,answer\nx,"[""a"", ""b""]",B\n'
    assert read_data(written(tmp_path, "t.csv", table)).questions == (Question("x", ("a", "b"), 1),)
    assert len(read_data(written(tmp_path, "m.jsonl", [{"text": "x"}] * 9), limit=4).texts) == 4


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '{"text": ""}', "line 1: text must be a text that is not empty"),
        ("a.jsonl", '{"title": "x"}', "neither choices nor a text; its fields are title"),
        ("a.jsonl", "[1]", "must be an object with named fields, it is a list"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", '{"text": "x"}', "must hold a list of objects, it holds an object"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.txt", "  \n", "is empty"),
        ("a.jsonl", '{"question": "x", "choices": ["a", "b"], "answer": 2}', "answer 2 is none of the 2 choices"),
        ("a.jsonl", '{"question": "x", "choices": ["a", "b"], "answer": "C"}', "answer 'C' is none"),
        ("a.jsonl", '{"question": "x", "choices": ["a"], "answer": 0}', "at least two choices"),
        ("a.jsonl", '{"question": "x", "choices": "a", "answer": 0}', "is not JSON"),
        ("a.jsonl", '{"question": "x", "choices": [1, 2], "answer": 0}', "must be a list of texts"),
        ("a.jsonl", '{"question": "x", "choices": ["a", "b"]}', "has no answer"),
        ("a.jsonl", '{"choices": ["a", "b"], "answer": 0}', "has choices and no question"),
        ("a.jsonl", '{"text": "x"}\n{"ctx": "x", "choices": ["a", "b"], "label": 0}', "mixes texts and questions"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, name, rows, says):
    path = written(tmp_path, name, rows)
    with pytest.raises(UsageError, match=says):
        read_data(path)


def test_texts_are_wanted_where_questions_are_given(tmp_path):
    questions = written(tmp_path, "q.jsonl", [{"question": "x", "choices": ["a", "b"], "answer": 0}])
    with pytest.raises(UsageError, match="texts are wanted here"):
        read_texts(questions)
    assert read_texts(written(tmp_path, "README.md", "# one")).texts == ("# one",)


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("papertrial.lm.evaluation.data.MAX_BYTES", 10)
    with pytest.raises(UsageError, match="take a part of it"):
        read_data(written(tmp_path, "a.txt", "more than ten bytes"))


def test_bytes_that_are_no_text_and_names_that_are_no_data(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    with pytest.raises(UsageError, match=r"not UTF-8 text \(byte 3\)"):
        read_data(str(tmp_path / "b.txt"))
    for name in ("missing.jsonl", "no such thing!"):
        with pytest.raises(UsageError, match="there is no file"):
            read_data(name)
    with pytest.raises(UsageError, match="--limit"):
        read_data("x", limit=0)


def test_a_data_set_that_cannot_be_had_is_one_line():
    with pytest.raises(UsageError, match=r"pip install 'papertrial\[eval\]'|cannot read the data set") as caught:
        read_data("nobody/nothing:plain@test", limit=1)
    assert "\n" not in str(caught.value)


def test_evaluate_takes_either_kind(tmp_path):
    one = checkpoint()
    assert evaluate(one, read_data(written(tmp_path, "t.txt", "the cat sat"))).kind == "texts"
    rows = [{"question": "the cat", "choices": ["sat", "ran"], "answer": 0}]
    assert evaluate(one, read_data(written(tmp_path, "q.jsonl", rows))).kind == "questions"


# -- the harness ----------------------------------------------------------------------------------------------------

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: acc
"""


def test_the_harness_agrees_with_our_own_accuracy(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from papertrial.lm.evaluation.harness import run_tasks

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    words = ["cat", "dog", "mat", "sat", "ran", "and"]
    rows = [
        {"question": f"the {a}", "choices": [b, c], "answer": 0}
        for a, b, c in zip(words, words[2:] + words[:2], words[3:] + words[:3], strict=True)
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(path=written(tmp_path, "q.jsonl", rows)))
    one = checkpoint()
    found = run_tasks(one, ["tiny_choice"], task_folder=tmp_path / "tasks")
    own = evaluate(one, read_data(str(tmp_path / "q.jsonl")))
    assert found["tiny_choice"]["acc"] == pytest.approx(own.measures["accuracy"])
    with pytest.raises(UsageError, match="no task 'no_such_task'"):
        run_tasks(one, ["no_such_task"])


def test_without_the_harness_the_extra_is_named(monkeypatch):
    import sys

    from papertrial.lm.evaluation.harness import run_tasks

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"papertrial\[eval\]"):
        run_tasks(checkpoint(), ["hellaswag"])
