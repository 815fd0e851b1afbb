"""AMP: take out the attention heads and MLP neurons that feed the residual stream least (arXiv 2504.21174).

    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in fifty_texts]
    importance = amp_importance(model, prompts)                # one forward pass over each
    plan = amp_plan(model, importance, ratio=0.3)              # 30 % of all parameters, every layer alike
    pruned = prune(model, plan)                                # papertrial.lm.pruning
    pruned = recover(pruned, batches, steps=500, generator=generator)
    pruned.save_pretrained("smaller")                          # AutoModelForCausalLM.from_pretrained("smaller")

From the command line: ``papertrial apply amp_pruning --model org/name --out smaller --ratio 0.3``.

Notation: z_h (T, d_h) is what head h hands to the output projection, W_h (d_h, D) the rows of that projection that read
it, a_j the input j of the last MLP projection. The statistics come from the whole model, once.
"""

from papertrial.papers.compression.amp_pruning.method.checkpoint import ApplyOptions, apply, calibration_pieces
from papertrial.papers.compression.amp_pruning.method.importance import amp_importance
from papertrial.papers.compression.amp_pruning.method.recovery import recover
from papertrial.papers.compression.amp_pruning.method.selection import Amounts, amp_amounts, amp_plan

__all__ = [
    "Amounts",
    "ApplyOptions",
    "amp_amounts",
    "amp_importance",
    "amp_plan",
    "apply",
    "calibration_pieces",
    "recover",
]
