"""In-context navigation: explore the vocabulary by telling the model what it has already said.

Next-token scores are products of one query with fixed keys (the rows of the output layer), so tokens whose keys
resemble those of the top tokens ride along, right or wrong. Writing the answers that were explored into the prompt
moves the query away from their keys.

    navigator = InContextNavigator(model, tokenizer, n_runs=10, per_run=10)
    for found in navigator.run("Name some sports leagues."):
        print(found.run, found.rank, found.text)

    report = spurious_key_report(model, tokenizer, "Name some sports leagues.", is_correct, cluster_keys(model, 1024))
    print(report.accuracy_main, report.accuracy_other)

    vote = navigate_cot(model, tokenizer, question, extract_answer=last_number)

Source: arXiv 2410.02284 and the notebook and scripts of its authors.
"""

from papertrial.papers.decoding.in_context_navigation.method.keys import (
    KeyClusters,
    KeyReport,
    cluster_keys,
    key_weight,
    rank_adjusted_accuracy,
    regrouped,
    spurious_key_report,
)
from papertrial.papers.decoding.in_context_navigation.method.measures import (
    accuracy_at_k,
    explored_key_similarity,
    explored_mass,
    map_at_k,
)
from papertrial.papers.decoding.in_context_navigation.method.navigation import (
    Exploration,
    InContextNavigator,
    Template,
    numbered_list,
)
from papertrial.papers.decoding.in_context_navigation.method.reasoning import (
    VoteResult,
    answer_prompt,
    navigate_cot,
    ways_list,
)

__all__ = [
    "Exploration",
    "InContextNavigator",
    "KeyClusters",
    "KeyReport",
    "Template",
    "VoteResult",
    "accuracy_at_k",
    "answer_prompt",
    "cluster_keys",
    "explored_key_similarity",
    "explored_mass",
    "key_weight",
    "map_at_k",
    "navigate_cot",
    "numbered_list",
    "rank_adjusted_accuracy",
    "regrouped",
    "spurious_key_report",
    "ways_list",
]
