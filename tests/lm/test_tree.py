import pytest
import torch

from families import CONTEXT, DECODERS, left_padded, random_ids, tiny_model
from papertrial.lm.generation import StepDecoder, position_ids
from papertrial.lm.generation.tree import can_look_ahead, look_ahead, tree_mask

PARENTS = [-1, -1, 0, 0, 1, 2, 2]
PATHS = {0: [0], 1: [1], 2: [0, 2], 3: [0, 3], 4: [1, 4], 5: [0, 2, 5], 6: [0, 2, 6]}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # float32 rounding of two routes


def windowed(family):
    """The family with a window that hides most of a prompt of 12, where it has windows at all."""
    settings = {"mistral": {"sliding_window": 6}, "gemma2": {"sliding_window": 6}}
    if family in ("qwen2", "qwen3"):
        layers = ["sliding_attention", "full_attention"]
        return tiny_model(family, use_sliding_window=True, sliding_window=6, max_window_layers=0, layer_types=layers)
    return tiny_model(family, **settings.get(family, {}))


@torch.no_grad()
def plain(model, ids, mask):
    """Logits (B, V) of one token more, by a forward pass over everything, and the hidden states there."""
    arguments = {"position_ids": position_ids(mask)} if "position_ids" in model.forward.__annotations__ else {}
    out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **arguments)
    return out.logits[:, -1], out.hidden_states[-1][:, -1]


def extended(decoder, tokens, path):
    ids = torch.cat([decoder.input_ids, tokens[:, path]], 1)
    return ids, torch.cat([decoder.attention_mask, torch.ones_like(tokens[:, path])], 1)


@pytest.mark.parametrize("make", [tiny_model, windowed])
@pytest.mark.parametrize("family", DECODERS)
def test_every_node_sees_what_a_plain_forward_over_its_path_sees(family, make):
    model = make(family)
    decoder = StepDecoder(model, *left_padded(3, 12), keep_hidden=True)
    tokens = random_ids(3, len(PARENTS), seed=7)
    ahead = look_ahead(decoder, tokens, PARENTS)
    for node, path in PATHS.items():
        logits, hidden = plain(model, *extended(decoder, tokens, path))
        torch.testing.assert_close(ahead.logits[:, node], logits, **CLOSE)
        torch.testing.assert_close(ahead.hidden[:, node], hidden, **CLOSE)


@pytest.mark.parametrize("make", [tiny_model, windowed])
@pytest.mark.parametrize("family", DECODERS)
def test_rows_that_keep_paths_of_different_lengths_go_on_as_if_each_had_been_fed_alone(family, make):
    model = make(family)
    decoder = StepDecoder(model, *left_padded(3, 12))
    kept = [[-1, -1, 1], [0, 2, 6], [-1, 1, 4]]
    rows = [decoder.input_ids[row][decoder.attention_mask[row].bool()].tolist() for row in range(3)]
    for seed in (7, 8):  # twice: the second tree stands on what the first one left
        tokens = random_ids(3, len(PARENTS), seed=seed)
        look_ahead(decoder, tokens, PARENTS).accept(torch.tensor(kept))
        for row, path in enumerate(kept):
            rows[row] += [int(tokens[row, node]) for node in path if node >= 0]
            assert decoder.input_ids[row][decoder.attention_mask[row].bool()].tolist() == rows[row]
    after = random_ids(3, 1, seed=9)[:, 0]
    logits = decoder.step(after)
    for row, ids in enumerate(rows):
        alone = torch.tensor([[*ids, int(after[row])]])
        torch.testing.assert_close(logits[row], plain(model, alone, torch.ones_like(alone))[0][0], **CLOSE)


@pytest.mark.parametrize("family", DECODERS)
def test_after_a_rejected_tree_it_is_as_if_nothing_had_been_asked(family):
    model = windowed(family)
    decoder, other = (StepDecoder(model, *left_padded(2, 12)) for _ in range(2))
    look_ahead(decoder, random_ids(2, len(PARENTS), seed=3), PARENTS).reject()
    token = random_ids(2, 1, seed=4)[:, 0]
    assert torch.equal(decoder.step(token), other.step(token))


def test_the_mask_of_a_tree_holds_each_node_and_its_ancestors():
    sees, depths = tree_mask(PARENTS)
    assert depths.tolist() == [0, 0, 1, 1, 1, 2, 2]
    for node, path in PATHS.items():
        assert sees[node].nonzero()[:, 0].tolist() == path


def test_what_cannot_be_run_as_a_tree_is_refused_with_a_reason():
    for parents, reason in (([], "at least one node"), ([0], "must be -1 or come before"), ([-1, 2], "must be -1")):
        with pytest.raises(ValueError, match=reason):
            tree_mask(parents)
    model = tiny_model("llama")
    uncached = StepDecoder(model, random_ids(1, 4), use_cache=False)
    assert not can_look_ahead(uncached, 2)
    with pytest.raises(ValueError, match="cannot run a tree"):
        look_ahead(uncached, random_ids(1, 2), [-1, -1])
    decoder = StepDecoder(model, random_ids(2, 4))
    with pytest.raises(ValueError, match=r"must be \(2, 3\)"):
        look_ahead(decoder, random_ids(2, 2), [-1, -1, 0])
    ahead = look_ahead(decoder, random_ids(2, 2), [-1, -1])
    for nodes in ([[0], [-1]], [[0, 1]], [[0, -1], [0, 1]], [[], []]):
        with pytest.raises(ValueError, match="nodes"):
            ahead.accept(torch.tensor(nodes, dtype=torch.long))
    learned = StepDecoder(tiny_model("gpt2"), random_ids(1, CONTEXT - 1))
    with pytest.raises(ValueError, match="position table"):
        look_ahead(learned, random_ids(1, 2), [-1, 0])
