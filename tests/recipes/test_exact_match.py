"""Exact match: what the prompt is, what is expected, and how they are compared."""

import numpy as np

from tunejax.evaluate import exact_match, scores


class Tokenizer:
    """Ids are letters; 0 is special."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(96 + i) for i in ids if i)


def test_the_first_loss_bearing_run_is_expected_and_what_precedes_it_is_the_prompt():
    # a b | c d <end> | e | f: two turns are learned, the first is asked for.
    tokens, targets = np.array([1, 2, 3, 4, 0, 5]), np.array([2, 3, 4, 0, 5, 6])
    found = exact_match.task(tokens, targets, np.array([0, 1, 1, 1, 0, 1.0]), Tokenizer())
    assert found == exact_match.Task([1, 2], "cd")
    whole = exact_match.task(tokens, targets, np.array([0, 0, 0, 0, 1, 1.0]), Tokenizer())
    assert whole == exact_match.Task([1, 2, 3, 4, 0], "ef")


def test_answers_come_in_order_in_batches_of_one_shape():
    shapes = []

    def generate(tokens, mask):
        shapes.append(tokens.shape)
        lengths = mask.sum(axis=1)
        return np.stack([lengths, np.zeros_like(lengths)], axis=1)

    tasks = [exact_match.Task([1] * n, chr(96 + n)) for n in (1, 2, 3)] + [exact_match.Task([1], "wrong")]
    found = list(exact_match.answers(generate, tasks, Tokenizer(), batch_size=3))
    assert [a.generated for a in found] == ["a", "b", "c", "a"]
    assert [a.correct for a in found] == [True, True, True, False]
    assert shapes == [(3, exact_match.ROUND)] * 2


def test_padding_stands_in_front():
    tokens, mask = exact_match.left_padded([[5, 6], [7]], 3)
    assert tokens.tolist() == [[0, 5, 6], [0, 0, 7]]
    assert mask.tolist() == [[0, 1, 1], [0, 0, 1]]


def test_space_does_not_count():
    assert exact_match.normal("  a \n b ") == exact_match.normal("a b")
    assert exact_match.normal("A") != exact_match.normal("a")


def test_perplexity_follows_from_the_loss():
    assert scores.with_perplexity({"loss": 0.0, "accuracy": 1.0}) == {"loss": 0.0, "accuracy": 1.0, "perplexity": 1.0}
    assert scores.with_perplexity({"loss": 1000.0})["perplexity"] == float("inf")
    assert np.isnan(scores.with_perplexity({"loss": float("nan")})["perplexity"])
    assert scores.with_perplexity({"accuracy": 1.0}) == {"accuracy": 1.0}
    assert scores.with_perplexity({"loss": 2.0, "nll": 0.0})["perplexity"] == 1.0
