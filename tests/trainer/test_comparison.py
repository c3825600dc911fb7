"""Two models on one text: figures against the plain formulas, and bad input."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peft_lrqat.trainer import compare_models
from peft_lrqat.trainer.metrics import evaluate_perplexity


def make(seed, vocabulary=11):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=1.0,
    )
    return LlamaForCausalLM(config).eval()


TEXT = torch.randint(0, 11, (45,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_are_those_of_the_formulas(batch_size):
    reference, candidate = make(0), make(1)
    found = compare_models(
        reference, candidate, TEXT, window=8, batch_size=batch_size, progress=False
    )
    divergences, agree, by_window = [], [], []
    for start in range(0, 40, 8):
        ids = TEXT[None, start : start + 8]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0, :-1].double() for m in (reference, candidate))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        divergences += kl.tolist()
        by_window.append(float(kl.mean()))
        agree += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.tokens == len(divergences) == 35
    assert found.kl_mean == pytest.approx(sum(divergences) / 35, rel=1e-5)
    spread = torch.tensor(by_window).std().item() / math.sqrt(5)
    assert found.kl_error == pytest.approx(spread, rel=1e-4)
    assert found.kl_99 == pytest.approx(
        torch.tensor(divergences).double().quantile(0.99).item(), rel=1e-5
    )
    assert found.same_top == pytest.approx(sum(agree) / 35)
    mine, theirs = (
        evaluate_perplexity(m, TEXT, window=8, progress=False) for m in (candidate, reference)
    )
    assert found.perplexity == pytest.approx(mine["perplexity"], rel=1e-6)
    assert found.nats_difference == pytest.approx(
        mine["nats_per_token"] - theirs["nats_per_token"], rel=1e-5
    )


def test_a_model_against_itself():
    model = make(0)
    found = compare_models(model, model, TEXT, window=8, progress=False)
    assert found.kl_mean == found.kl_99 == found.nats_difference == 0
    assert found.same_top == 1


def test_training_goes_on_afterwards():
    models = make(0).train(), make(1).train()
    compare_models(*models, TEXT, window=8, progress=False)
    assert all(model.training for model in models)


def test_one_window_has_no_standard_error():
    found = compare_models(make(0), make(1), TEXT[:8], window=8, progress=False)
    assert found.kl_error is found.same_top_error is found.nats_difference_error is None


def test_sliding_windows_score_every_token_once():
    found = compare_models(make(0), make(1), TEXT, window=8, stride=3, progress=False)
    assert found.tokens == len(TEXT) - 1


def test_vocabularies_that_differ_are_refused():
    with pytest.raises(ValueError, match="11 logits a token and the candidate 12"):
        compare_models(make(0), make(0, vocabulary=12), TEXT, window=8, progress=False)
