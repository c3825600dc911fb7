"""Distances from cached targets: their values and gradients are those of the plain formula."""

import pytest
import torch

from peft_lrqat.trainer import distillation_loss, divergence
from peft_lrqat.trainer.distillation_targets import TopPredictions
from peft_lrqat.trainer.divergence import hidden_states_loss, top_predictions_loss


ROWS, VOCABULARY = 7, 11
SCORED = torch.tensor([True, False, True, True, True, False, True])


def logits(spread=3.0):
    pair = (spread * torch.randn(ROWS, VOCABULARY, dtype=torch.float64) for _ in range(2))
    return tuple(t.requires_grad_(i == 0) for i, t in enumerate(pair))


def top(teacher, k, temperature):
    values, tokens = (teacher / temperature).log_softmax(-1).topk(k)
    return values, tokens.int()


def naive(student, teacher, scored, k, temperature):
    """KL between two distributions over the k tokens and "any other token"."""
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    tokens = p.topk(k).indices
    p, q = (
        torch.cat([x.gather(-1, tokens), x.scatter(-1, tokens, 0).sum(-1, keepdim=True)], dim=-1)
        for x in (p, q)
    )
    each = (p * (p / q).log()).sum(-1)
    return temperature**2 * each[scored].mean()


@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY + 5, 1 << 20], ids=["one", "three", "all"])
@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_top_predictions_follow_the_formula(temperature, k, chunk, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", chunk)
    student, teacher = logits()
    ours = top_predictions_loss(
        student, *top(teacher, k, temperature), SCORED, temperature=temperature
    )
    theirs = naive(student, teacher, SCORED, k, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    upstream = torch.tensor(0.37, dtype=torch.float64)
    grads = [torch.autograd.grad(loss, student, upstream)[0] for loss in (ours, theirs)]
    # What the k tokens leave for all others is a small difference of large numbers.
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)
    assert (grads[0][~SCORED] == 0).all()


@pytest.mark.parametrize("sure", [10.0, 20.0, 100.0])
def test_a_student_that_is_sure_gets_a_bounded_gradient(sure):
    """In float32 nothing is left of 1 for the other tokens, but their logits still tell."""
    student, teacher = logits(1.0)
    student = (student + sure * (teacher == teacher.amax(-1, keepdim=True))).detach()
    loss, grads = {}, {}
    for dtype in (torch.float32, torch.float64):
        x = student.to(dtype).requires_grad_()
        loss[dtype] = top_predictions_loss(x, *top(teacher, 3, 1.0), SCORED, temperature=1.0)
        grads[dtype] = torch.autograd.grad(loss[dtype], x)[0].double()
    log_q, chosen = student.log_softmax(-1), teacher.topk(3).indices
    p = teacher.softmax(-1)
    others = p.scatter(-1, chosen, 0).sum(-1, keepdim=True)
    shared = others * log_q.scatter(-1, chosen, -torch.inf).softmax(-1)
    expected = log_q.exp() - shared.scatter(-1, chosen, p.gather(-1, chosen))
    expected[~SCORED] = 0
    torch.testing.assert_close(grads[torch.float64], expected / SCORED.sum(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(*grads.values(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(loss[torch.float32].double(), loss[torch.float64], rtol=1e-4, atol=0)


def test_all_tokens_are_the_whole_divergence():
    student, teacher = logits()
    whole = distillation_loss(student, teacher, SCORED, temperature=2.0)
    ours = top_predictions_loss(student, *top(teacher, VOCABULARY, 2.0), SCORED, temperature=2.0)
    torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (ours, whole)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("num_items", [None, 13, torch.tensor(13)], ids=["mean", "int", "tensor"])
def test_hidden_states_follow_the_formula(num_items):
    student, teacher = logits()
    ours = hidden_states_loss(student, teacher, SCORED, num_items=num_items)
    each = (student - teacher).pow(2).sum(-1) / teacher.pow(2).sum(-1)
    expected = each[SCORED].sum() / (num_items or SCORED.sum())
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(
        lambda x: hidden_states_loss(x, teacher, SCORED, num_items=num_items), student
    )


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf")])
def test_what_is_not_scored_may_hold_anything(rubbish):
    student, teacher = logits()
    wanted = [
        torch.autograd.grad(loss, student)[0][SCORED]
        for loss in (
            top_predictions_loss(student, *top(teacher, 3, 1.0), SCORED, temperature=1.0),
            hidden_states_loss(student, teacher, SCORED),
        )
    ]
    broken = student.detach().clone()
    broken[~SCORED] = rubbish
    broken.requires_grad_()
    found = [
        top_predictions_loss(broken, *top(teacher, 3, 1.0), SCORED, temperature=1.0),
        hidden_states_loss(broken, teacher, SCORED),
    ]
    for loss, expected in zip(found, wanted, strict=True):
        grad = torch.autograd.grad(loss, broken)[0]
        assert torch.equal(grad[SCORED], expected)
        assert (grad[~SCORED] == 0).all()


def test_nothing_scored_is_zero():
    student, teacher = logits()
    none = torch.zeros(ROWS, dtype=torch.bool)
    for loss in (
        top_predictions_loss(student, *top(teacher, 3, 1.0), none, temperature=1.0),
        hidden_states_loss(student, teacher, none),
    ):
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, student)[0].any()


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="must be the base model itself"):
        hidden_states_loss(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2).bool())


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_top_predictions_are_found_some_tokens_at_a_time(chunk, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", chunk)
    output = torch.randn(2, 5, 17)
    found = TopPredictions(2.0, 4).record(output)
    expected = (output / 2).log_softmax(-1).topk(4)
    torch.testing.assert_close(found["log_probabilities"], expected.values)
    assert torch.equal(found["tokens"], expected.indices.int())
