"""A checkpoint on somebody's own data: multiple choice by likelihood, and perplexity.

    data = read_data("questions.jsonl")              # or a data set of the Hub: "allenai/ai2_arc:ARC-Easy@test"
    result = evaluate(load("house:prose"), data)
    print(result.measures["accuracy"], result.intervals["accuracy"])

The standard tasks of lm-evaluation-harness run through :func:`papertrial.lm.evaluation.harness.run_tasks`.
"""

from papertrial.lm.evaluation.data import Question, Questions, Texts, read_data, read_texts
from papertrial.lm.evaluation.measures import Result, evaluate, evaluate_questions, evaluate_texts

__all__ = [
    "Question",
    "Questions",
    "Result",
    "Texts",
    "evaluate",
    "evaluate_questions",
    "evaluate_texts",
    "read_data",
    "read_texts",
]
