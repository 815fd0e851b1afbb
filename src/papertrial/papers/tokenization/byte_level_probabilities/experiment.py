"""Plain encoding, token healing and the exact byte-level sum, at prompts cut at any byte of held-out source code.

A seed is its own set of cuts. Questions are asked of one code model: how well it predicts the next byte of the
text (half of the cuts inside a token of the canonical encoding, half between tokens), and how often greedy decoding
completes an identifier that was cut at any character. A copy of it, trained for a moment to fill gaps between a prefix
and a suffix, is asked for the rest of lines that were cut at any character. A second code model with another vocabulary
joins for the ensemble, and a Markov chain over bytes, whose token model is known in closed form, says whether "exact"
is exact.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from papertrial.lab.trial import Trial
from papertrial.lm.anatomy import position_limit
from papertrial.lm.corpora import corpus, unseen_by
from papertrial.lm.generation import greedy, left_pad
from papertrial.lm.models import Checkpoint, load
from papertrial.lm.tokenizers import train_bpe
from papertrial.papers.tokenization.byte_level_probabilities.chain import ByteChain, induced_model
from papertrial.papers.tokenization.byte_level_probabilities.fill_model import FillRecipe, fill_model
from papertrial.papers.tokenization.byte_level_probabilities.gaps import GAP, Gap, compiles, fill_gap
from papertrial.papers.tokenization.byte_level_probabilities.method import (
    ByteEnsemble,
    ByteLevelLM,
    FillTokens,
    encode_prompt,
    healed_next_byte,
    plain_next_byte,
    token_healing,
)

SCALES = {
    "smoke": {
        "seeds": 1,
        "cuts": 8,
        "identifiers": 4,
        "windows": 2,
        "window_bytes": 4,
        "context_bytes": 100,
        "batch": 8,
        "chain_bytes": 12,
        "chain_text": 20000,
        "gaps": 2,
        "gap_suffix": 150,
        "fill": {"steps": 2, "batch_size": 1, "length": 64, "segments": 40},
        "least_bytes_per_token": 0.0,
        "least_accuracy": 0.0,
    },
    "small": {
        "seeds": 6,
        "cuts": 60,
        "identifiers": 80,
        "windows": 32,
        "window_bytes": 16,
        "context_bytes": 400,
        "batch": 32,
        "chain_bytes": 48,
        "chain_text": 40000,
        "gaps": 40,
        "gap_suffix": 150,
        "fill": {"steps": 80, "batch_size": 8, "length": 256, "segments": 2000},
        "least_bytes_per_token": 2.5,
        "least_accuracy": 0.3,
    },
    "gpu": {
        "seeds": 5,
        "cuts": 2000,
        "identifiers": 2000,
        "windows": 500,
        "window_bytes": 64,
        "context_bytes": 600,
        "batch": 128,
        "chain_bytes": 400,
        "chain_text": 200000,
        "gaps": 2000,
        "gap_suffix": 200,
        "fill": {
            "steps": 6000,
            "batch_size": 64,
            "length": 512,
            "segments": 60000,
            "lr": 6e-4,
            "width": 640,
            "layers": 8,
            "vocabulary": 8192,
            "precision": "bf16",
        },
        "least_bytes_per_token": 2.5,
        "least_accuracy": 0.3,
    },
}

ARMS = ("plain", "token_healing", "exact")
IDENTIFIER = re.compile(rb"[A-Za-z_][A-Za-z_0-9]*")
LONGEST = 40
"""Bytes that a completion may have; identifiers with more left are not asked for."""


@dataclass(frozen=True)
class Cut:
    """A place in a document: the text before it, the text behind it, and how far inside a token it lies."""

    before: bytes
    after: bytes
    inside: int


def run(trial: Trial) -> dict[str, dict[str, float]]:
    """One seed. Bits are of the true next byte; accuracies and matches in percent; bits_per_byte over whole windows."""
    first, second = trial.checkpoint("house:code"), _second(trial)
    lm, other = (ByteLevelLM(c.model, c.tokenizer) for c in (first, second))
    room = _room(trial, lm)
    documents = _documents(first, second)
    cuts, bytes_per_token = _cuts(trial, lm, documents, trial["cuts"], room)
    trial.note("bytes per token of the model's encoding", round(bytes_per_token, 2))
    trial.require(
        bytes_per_token >= trial["least_bytes_per_token"],
        f"the tokenizer has {bytes_per_token:.2f} bytes per token; without longer tokens there is no bias to remove",
    )
    results: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    _next_byte(trial, lm, cuts, bytes_per_token, results)
    trial.require(
        results["plain"]["token_end_accuracy"] >= 100 * trial["least_accuracy"],
        f"the model predicts {results['plain']['token_end_accuracy']:.0f} % of the bytes after whole tokens; it is too "
        "weak to show what a better conversion gains",
    )
    _identifiers(trial, lm, documents, room, results)
    _gaps(trial, first, documents, room, results)
    _ensemble(trial, lm, other, documents, room, results)
    _known_source(trial, results)
    return results


# -- texts -------------------------------------------------------------------------------------------------------


def _second(trial: Trial) -> Checkpoint:
    checkpoint = load("house:code-fine", device=trial.device)
    trial.models[checkpoint.name] = checkpoint.digest
    return checkpoint


def _documents(*models: Checkpoint) -> list[bytes]:
    """Held-out source files that no house model among these saw, in ASCII parts."""
    documents = corpus("code").documents("test")
    for model in models:
        if model.name.startswith("house:"):
            documents = unseen_by(model.name, documents)
    return [document.text.encode() for document in documents if document.text.isascii()]


def _room(trial: Trial, lm: ByteLevelLM) -> int:
    """Bytes of context before a cut: those of the scale, or what the model's position table leaves."""
    limit, spare = position_limit(lm.model), 2 * LONGEST + 8  # room for a completion, one token a byte
    trial.require(
        limit is None or limit >= spare + 40,
        f"the model has {limit} positions; a prompt and a completion need {spare + 40}: use a model with as many",
    )
    room = trial["context_bytes"] if limit is None else min(trial["context_bytes"], limit - spare)
    if room < trial["context_bytes"]:
        trial.note("bytes of context that the model has positions for", room)
    return room


def _place(room: int, documents: list[bytes], generator: torch.Generator) -> tuple[bytes, int, int]:
    """A document, a byte position uniform over all documents' bytes, and a line start about ``room`` before it."""
    tail = 2 * LONGEST
    sizes = [max(0, len(document) - room - tail) for document in documents]
    at = int(torch.randint(sum(sizes), (1,), generator=generator))
    for document, size in zip(documents, sizes, strict=True):
        if at < size:
            at += room
            line = document.find(b"\n", at - room, at)
            return document, at, at - room if line < 0 else line + 1
        at -= size
    raise AssertionError("the position lies in some document")


def _cuts(trial: Trial, lm: ByteLevelLM, documents: list[bytes], count: int, room: int) -> tuple[list[Cut], float]:
    """As many cuts inside a token of the canonical encoding as between tokens, and the mean bytes per token."""
    generator, wanted = trial.generator("cuts"), {True: count // 2, False: count - count // 2}
    found: list[Cut] = []
    tokens = size = 0
    while any(wanted.values()):
        document, at, start = _place(room, documents, generator)
        if start >= at:
            continue
        text = document[start : at + LONGEST]
        ids = lm.tokens.encode_bytes(text)
        tokens, size, end, last = tokens + len(ids), size + len(text), -len(lm.tokens.dummy_prefix(text)), 0
        for token in ids:
            last, end = end, end + len(lm.tokens.bytes_of(token) or b"")
            if end >= at - start:
                break
        inside = 0 if end == at - start else at - start - max(0, last)
        if wanted[inside > 0]:
            wanted[inside > 0] -= 1
            found.append(Cut(document[start:at], document[at : at + 2 * LONGEST], inside))
    return found, size / tokens


# -- next byte ---------------------------------------------------------------------------------------------------


def _next_byte(
    trial: Trial, lm: ByteLevelLM, cuts: list[Cut], bytes_per_token: float, results: dict[str, dict[str, float]]
) -> None:
    """Bits and accuracy of the true next byte, inside tokens and between them, and weighed as the two occur."""
    methods: dict[str, Callable[[list[bytes]], Tensor]] = {
        "plain": lambda texts: plain_next_byte(lm, texts),
        "token_healing": lambda texts: healed_next_byte(lm, texts),
        "exact": lambda texts: _exact(lm, texts, leaks),
        "exact_conditioned": lambda texts: conditioned.next_byte_logprobs(conditioned.start(texts)),
    }
    conditioned = ByteLevelLM(lm.model, lm.tokenizer, lm.validity, renormalise=True)
    results["exact_conditioned"], probabilities = {}, {}
    leaks: list[float] = []
    true = torch.tensor([cut.after[0] for cut in cuts])
    inside = torch.tensor([cut.inside for cut in cuts])
    by_depth: dict[str, list[tuple[float, float]]] = {}
    for arm, method in methods.items():
        parts = [cuts[i : i + trial["batch"]] for i in range(0, len(cuts), trial["batch"])]
        found = torch.cat([method([c.before for c in part]) for part in trial.track(parts, f"next byte: {arm}")])
        probabilities[arm] = found.exp()
        bits = -found.gather(1, true[:, None])[:, 0] / math.log(2)
        hit = (found.argmax(1) == true).double()
        for name, where in (("mid_token", inside > 0), ("token_end", inside == 0)):
            results[arm][f"{name}_bits"] = float(bits[where].mean())
            results[arm][f"{name}_accuracy"] = float(100 * hit[where].mean())
        share = 1 - 1 / bytes_per_token  # of the bytes of a text, those that do not end a token
        own = results[arm]
        own["any_cut_bits"] = share * own["mid_token_bits"] + (1 - share) * own["token_end_bits"]
        depths = [(depth, inside == depth) for depth in range(int(inside.max()) + 1)]
        by_depth[arm] = [(depth, float(bits[here].mean())) for depth, here in depths if int(here.sum()) >= 3]
    apart = (probabilities["exact"] - probabilities["exact_conditioned"]).abs().amax(1)
    results["exact_conditioned"]["differs_by_at_most"] = float(apart.max())
    results["exact_conditioned"]["differs_by_on_average"] = float(apart.mean())
    trial.note("mass on sequences that no encoder makes, %", round(100 * sum(leaks) / len(leaks), 3))
    trial.figure(
        "How wrong the plain encoding is, by the place of the cut",
        x_label="bytes of the token that lie before the cut (0: the cut is between tokens)",
        y_label="bits of the true next byte",
        caption="Mean over held-out cuts, at least three a point. Inside a token the plain encoding rules out the very "
        "token that the text is in the middle of. At 0 it is told a truth that nobody knows who does not see the rest.",
        series=by_depth,
    )


def _exact(lm: ByteLevelLM, texts: list[bytes], leaks: list[float]) -> Tensor:
    state = lm.start(texts)
    found = lm.leaked(state)
    leaks += found if isinstance(found, list) else [found]
    return lm.next_byte_logprobs(state)


# -- identifiers -------------------------------------------------------------------------------------------------


def _identifiers(
    trial: Trial, lm: ByteLevelLM, documents: list[bytes], room: int, results: dict[str, dict[str, float]]
) -> None:
    """How often greedy decoding completes an identifier that was cut at a uniformly drawn character inside it."""
    generator = trial.generator("identifiers")
    cuts: list[Cut] = []
    while len(cuts) < trial["identifiers"]:
        document, at, start = _place(room, documents, generator)
        word = next((m for m in IDENTIFIER.finditer(document, max(start, at - LONGEST)) if m.end() > at), None)
        if start < at and word is not None and word.start() < at and word.end() - at < LONGEST:
            cuts.append(Cut(document[start:at], document[at : word.end()], at - word.start()))
    made: dict[str, list[bytes]] = {arm: [] for arm in ARMS}
    for i in trial.track(range(0, len(cuts), trial["batch"]), "completing identifiers"):
        prompts = [cut.before for cut in cuts[i : i + trial["batch"]]]
        ids, mask = left_pad([encode_prompt(lm, prompt) for prompt in prompts], 0)
        made["plain"] += _token_completions(lm, ids, mask, [b""] * len(prompts), [])
        healed = token_healing(lm, prompts)
        last = [lm.tokens.bytes_of(encode_prompt(lm, prompt)[-1]) or b"" for prompt in prompts]
        made["token_healing"] += _token_completions(
            lm, healed.input_ids, healed.attention_mask, last, [healed.processor]
        )
        made["exact"] += [_word(text) for text in _byte_completions(lm, prompts)]
    for arm, words in made.items():
        hits = [word == cut.after for word, cut in zip(words, cuts, strict=True)]
        results[arm]["identifier_match"] = 100 * sum(hits) / len(hits)
    differing = [n for n in range(len(cuts)) if len({made[arm][n] for arm in ARMS}) > 1]
    for n in differing[:5]:
        line = cuts[n].before[-90:].decode()
        outputs = {arm: made[arm][n].decode(errors="replace") for arm in ARMS} | {"the file": cuts[n].after.decode()}
        trial.example(f"An identifier cut after {cuts[n].inside} characters", line, outputs)


def _word(text: bytes) -> bytes:
    """The identifier characters at the beginning of what was generated."""
    matched = re.match(rb"[A-Za-z_0-9]*", text)
    return matched[0] if matched else b""


def _byte_completions(lm: ByteLevelLM, prompts: list[bytes]) -> list[bytes]:
    made = lm.generate(prompts, LONGEST + 1, stop=lambda text: _word(text) != text)
    return made if isinstance(made, list) else [made]


def _token_completions(
    lm: ByteLevelLM, ids: Tensor, mask: Tensor, given: list[bytes], processors: list[Callable[[Tensor, Tensor], Tensor]]
) -> list[bytes]:
    """Greedy tokens, as bytes without what was ``given`` back, up to the end of the identifier.

    12 tokens, or more where one token a byte would need them: then rows are run again with room for every byte.
    """
    for room in (12, LONGEST + 2):
        tokens = greedy(lm.model, ids, mask, max_new_tokens=room, processors=processors).tokens.tolist()
        texts = [b"".join(lm.tokens.bytes_of(t) or b"\0" for t in row) for row in tokens]
        rest = [text[len(back) :] for text, back in zip(texts, given, strict=True)]
        if all(_word(text) != text for text in rest):
            break
    return [_word(text) for text in rest]


# -- gaps --------------------------------------------------------------------------------------------------------


def _gaps(
    trial: Trial, first: Checkpoint, documents: list[bytes], room: int, results: dict[str, dict[str, float]]
) -> None:
    """How often a model that was trained to fill gaps writes the rest of a line that was cut at any character."""
    recipe = FillRecipe(**trial["fill"])
    limit = position_limit(first.model)
    if limit is not None and not recipe.width:
        recipe = replace(recipe, length=min(recipe.length, limit))
    texts = [document.text for document in corpus("code").documents("train")]
    progress = trial.reporter("learning to fill gaps")
    model, tokenizer = fill_model(first.model, first.tokenizer, texts, recipe, trial.generator("filling"), progress)
    lm, marks = ByteLevelLM(model, tokenizer), FillTokens.of(tokenizer)
    generator = trial.generator("gaps")
    suffix_bytes = min(trial["gap_suffix"], room // 3)
    before_bytes = room - suffix_bytes if room < trial["context_bytes"] else room
    gaps: list[Gap] = []
    while len(gaps) < trial["gaps"]:
        document, at, start = _place(before_bytes, documents, generator)
        end = document.find(b"\n", at)
        if start < at < end <= at + GAP and document[at:end].strip() and document[start:at].strip():
            gaps.append(Gap(document, start, at, end))
    made: dict[str, list[bytes]] = {arm: [] for arm in ARMS}
    for gap in trial.track(gaps, "filling gaps"):
        for arm, line in fill_gap(lm, marks, gap, suffix_bytes).items():
            made[arm].append(line)
    for arm, lines in made.items():
        pairs = list(zip(lines, gaps, strict=True))
        hits = [line == gap.document[gap.at : gap.end] for line, gap in pairs]
        results[arm]["gap_match"] = 100 * sum(hits) / len(hits)
        fits = [compiles(gap.document[: gap.at] + line + gap.document[gap.end :]) for line, gap in pairs]
        results[arm]["gap_compiles"] = 100 * sum(fits) / len(fits)
    differing = [n for n in range(len(gaps)) if len({made[arm][n] for arm in ARMS}) > 1]
    for n in differing[:3]:
        gap = gaps[n]
        outputs = {arm: made[arm][n].decode(errors="replace") for arm in ARMS}
        outputs |= {"the file": gap.document[gap.at : gap.end].decode()}
        prompt = gap.document[max(gap.start, gap.at - 90) : gap.at].decode()
        trial.example("The rest of a line, with the text behind it known", prompt, outputs)


# -- two vocabularies --------------------------------------------------------------------------------------------


def _ensemble(
    trial: Trial,
    lm: ByteLevelLM,
    other: ByteLevelLM,
    documents: list[bytes],
    room: int,
    results: dict[str, dict[str, float]],
) -> None:
    """Bits per byte of windows after cuts anywhere: each model on bytes, and their mean, at every byte anew."""
    generator, length = trial.generator("windows"), trial["window_bytes"]
    windows: list[tuple[bytes, bytes]] = []
    while len(windows) < trial["windows"]:
        document, at, start = _place(room, documents, generator)
        if start < at:
            windows.append((document[start:at], document[at : at + length]))
    ensemble, totals = ByteEnsemble([lm, other]), torch.zeros(3, dtype=torch.float64)
    for i in trial.track(range(0, len(windows), trial["batch"]), "ensemble"):
        part = windows[i : i + trial["batch"]]
        states = ensemble.start([before for before, _ in part])
        for step in range(length):
            bytes_ = [after[step] for _, after in part]
            column = torch.tensor(bytes_)[:, None]
            each = [m.next_byte_logprobs(s) for m, s in zip(ensemble.members, states, strict=True)]
            for n, log_probs in enumerate([*each, ensemble.next_byte_logprobs(states)]):
                totals[n] -= log_probs.gather(1, column).sum()
            if step < length - 1:
                states = ensemble.advance(states, bytes_)
    code, fine, both = (totals / math.log(2) / (len(windows) * length)).tolist()
    results["first_model"] = {"bits_per_byte": code}
    results["second_model"] = {"bits_per_byte": fine}
    results["best_single"] = {"bits_per_byte": min(code, fine)}
    results["byte_ensemble"] = {"bits_per_byte": both}


# -- a source with a known answer --------------------------------------------------------------------------------


def _known_source(trial: Trial, results: dict[str, dict[str, float]]) -> None:
    """Largest error of a next-byte probability of the token model that a byte chain induces, in single precision."""
    generator = trial.generator("chain")
    chain = ByteChain.random(b"abcdef", generator)
    text = chain.sample(trial["chain_text"], generator)
    tokenizer = train_bpe([text.decode()], 259 + 40, split_words=False)
    lm = ByteLevelLM(induced_model(chain, tokenizer, torch.float32), tokenizer)
    probe = chain.sample(trial["chain_bytes"], generator)
    errors: dict[str, list[float]] = {"plain": [], "exact": []}
    state = lm.start(b"")
    for at in range(1, len(probe)):
        state = lm.advance(state, probe[at - 1])
        true = chain.next_row(probe[:at])
        errors["exact"].append(float((lm.next_byte_logprobs(state).exp() - true).abs().max()))
        errors["plain"].append(float((plain_next_byte(lm, probe[:at]).exp() - true).abs().max()))
    for arm, found in errors.items():
        results[arm]["probability_error"] = max(found)
    results["byte_source"] = {"probability_error": 0.0}  # the chain against itself: what "exact" means
    trial.figure(
        "Error against a source whose answer is known",
        x_label="bytes of the text so far",
        y_label="largest error of a next-byte probability",
        log_y=True,
        caption="A Markov chain over six letters, and the token model that its encoded text has. The plain encoding is "
        "wrong wherever the text so far could still merge; the exact sum gives the chain's own row up to rounding.",
        series={arm: [max(e, 1e-9) for e in found[:60]] for arm, found in errors.items()},
        x=list(range(1, min(60, len(probe) - 1) + 1)),
    )
