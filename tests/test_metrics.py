import math

import pytest
import torch

from radargate_pl.metrics import TaskScore, TaskScores, mean_over_tasks, score_examples


def logits_with(probabilities):
    """Rows of logits whose softmax is the rows given."""
    return torch.tensor(probabilities, dtype=torch.float32).log()


def test_scores_of_a_batch_by_hand():
    logits = logits_with([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1]])
    targets, example = torch.tensor([0, 2, 0]), torch.tensor([0, 0, 2])
    scores = score_examples(logits, targets, example, 4)
    expected = [-math.log(0.5) - math.log(0.6), 0.0, -math.log(0.1), 0.0]
    torch.testing.assert_close(scores.loss_sum, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert scores.tokens.tolist() == [2, 0, 1, 0]
    assert scores.exact.tolist() == [True, False, False, False]  # a row without an answer is not right by default


def test_one_wrong_token_is_not_exact():
    logits = torch.eye(3)[[0, 1, 2, 0, 1]] * 9
    scores = score_examples(logits, torch.tensor([0, 1, 2, 0, 2]), torch.tensor([0, 0, 0, 1, 1]), 2)
    assert scores.exact.tolist() == [True, False]


def test_bf16_logits_are_scored_in_float32():
    logits = torch.randn(5, 11).bfloat16()
    targets, example = torch.arange(5), torch.tensor([0, 0, 1, 1, 1])
    wide = score_examples(logits.float(), targets, example, 2)
    torch.testing.assert_close(score_examples(logits, targets, example, 2).loss_sum, wide.loss_sum, atol=0, rtol=0)


def test_a_task_pools_its_tokens_and_the_mean_is_over_tasks():
    metric = TaskScores(3)
    # task 0: one example of 1 token with loss 4, one of 3 tokens with loss 2 in all: 6 / 4, not (4 + 2/3) / 2
    logits = logits_with([[math.exp(-4), 1 - math.exp(-4)]] + [[math.exp(-2 / 3), 1 - math.exp(-2 / 3)]] * 3)
    metric.update(
        score_examples(logits, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 1, 1]), 2), torch.tensor([0, 0])
    )
    even = logits_with([[0.5, 0.5]])
    metric.update(score_examples(even, torch.tensor([0]), torch.tensor([0]), 1), torch.tensor([2]))
    results = metric.results(["a", "b", "c"])
    assert list(results) == ["a", "c"]  # b has seen nothing
    assert results["a"].loss == pytest.approx(1.5, abs=1e-6)
    assert results["a"].exact_match == 0.5  # exp(-2/3) > 1/2: all three tokens of the second example are the argmax
    assert results["a"].n == 2
    assert results["c"].loss == pytest.approx(math.log(2), abs=1e-6)
    mean = mean_over_tasks(results)
    assert mean.loss == pytest.approx((1.5 + math.log(2)) / 2, abs=1e-6)
    assert mean == TaskScore(mean.loss, (0.5 + results["c"].exact_match) / 2, 3)


def test_batches_and_ranks_add_up_to_the_whole():
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 7), torch.randint(0, 7, (40,))
    example, task = torch.arange(40) // 4, torch.arange(10) % 3
    whole = TaskScores(3)
    whole.update(score_examples(logits, targets, example, 10), task)
    ranks = [TaskScores(3), TaskScores(3)]
    for rows, rank in ((slice(0, 1), 0), (slice(1, 7), 1), (slice(7, 10), 0)):
        kept = (example >= rows.start) & (example < rows.stop)
        part = score_examples(logits[kept], targets[kept], example[kept] - rows.start, rows.stop - rows.start)
        ranks[rank].update(part, task[rows])
    assert all(reduction is torch.sum or "sum" in str(reduction) for reduction in whole._reductions.values())
    ranks[0].merge_state(ranks[1])
    for name, value in whole.compute().items():
        torch.testing.assert_close(ranks[0].compute()[name], value, rtol=1e-12, atol=0)


def test_a_cast_of_the_whole_model_leaves_the_sums_alone():
    metric = torch.nn.ModuleList([TaskScores(1)]).to(torch.bfloat16)[0]
    assert metric.loss_sum.dtype == torch.float64
    one = score_examples(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]), 1)
    for _ in range(600):  # in bf16 a sum of ones stops at 256
        metric.update(one, torch.tensor([0]))
    assert metric.results(["a"])["a"] == TaskScore(pytest.approx(math.log(2)), 1.0, 600)


def test_reset_forgets():
    metric = TaskScores(1)
    metric.update(score_examples(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([0]), 1), torch.tensor([0]))
    metric.reset()
    assert [float(state.sum()) for state in metric.metric_state.values()] == [0, 0, 0, 0]


def test_any_of_several_ends_is_right_where_an_answer_ends():
    """Generation stops at each of them, so an answer that ends otherwise than its label reads the same."""
    likeliest = torch.tensor([4, 2, 4, 3, 2, 2])
    targets, example = torch.tensor([4, 3, 4, 3, 4, 3]), torch.tensor([0, 0, 1, 1, 2, 2])
    logits = torch.nn.functional.one_hot(likeliest, 5).float()
    assert score_examples(logits, targets, example, 3, (2, 3)).exact.tolist() == [True, True, False]
    assert score_examples(logits, targets, example, 3, (3,)).exact.tolist() == [False, True, False]
    assert score_examples(logits, targets, example, 3).exact.tolist() == [False, True, False]
