"""Perplexity is exp of the mean negative log-likelihood of the scored tokens in any batches."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from peft_lrqat.trainer.metrics import (
    Perplexity,
    compute_metrics,
    evaluate_perplexity,
    preprocess_logits_for_metrics,
    standard_error,
)


VOCABULARY, CONTEXT = 11, 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=1.0,  # predictions that differ from one token to the next
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, VOCABULARY, (45,), generator=torch.Generator().manual_seed(1))


def nats_by_hand(model, tokens):
    """Of tokens 1, 2, .. given all before them, in double precision from the model's logits."""
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0].double()
    log_probability = logits - logits.exp().sum(-1, keepdim=True).log()
    return [-log_probability[t - 1, tokens[t]].item() for t in range(1, len(tokens))]


def test_perplexity_of_known_probabilities():
    nats = [[math.log(2), math.log(8)], [math.log(4), 99.0]]
    result = Perplexity(keep_in_memory=True).compute(
        predictions=nats, references=[[1, 2], [3, -100]]
    )
    assert result["perplexity"] == pytest.approx(4.0, rel=1e-6)  # the nats are stored in float32
    assert result["nats_per_token"] == pytest.approx(math.log(4), rel=1e-6)
    assert result["tokens"] == 3


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    labels = torch.randint(0, 7, (3, 5))
    nats = preprocess_logits_for_metrics(torch.zeros(3, 5, 7), labels)
    result = compute_metrics(EvalPrediction(predictions=nats.numpy(), label_ids=labels.numpy()))
    assert result["perplexity"] == pytest.approx(7, rel=1e-6)
    assert result["tokens"] == 3 * 4


def test_batches_add_up_to_the_whole():
    generator = np.random.default_rng(0)
    nats, labels = generator.random((6, 9), dtype=np.float32), generator.integers(-1, 5, (6, 9))
    labels[labels == -1] = -100
    whole = Perplexity(keep_in_memory=True).compute(predictions=nats, references=labels)
    parts = Perplexity(keep_in_memory=True)
    for start, end in ((0, 1), (1, 4), (4, 6)):
        parts.add_batch(predictions=nats[start:end], references=labels[start:end])
    assert parts.compute() == whole


def test_a_metric_can_be_used_again():
    metric = Perplexity(keep_in_memory=True)
    first = metric.compute(predictions=[[1.0]], references=[[0]])
    metric.compute(predictions=[[5.0]], references=[[0]])
    assert metric.compute(predictions=[[1.0]], references=[[0]]) == first


def test_ruin_is_infinite_and_nothing_to_score_is_an_error():
    assert (
        Perplexity(keep_in_memory=True).compute(predictions=[[1e4]], references=[[0]])["perplexity"]
        == math.inf
    )
    with pytest.raises(ValueError, match="at least one scored token"):
        Perplexity(keep_in_memory=True).compute(predictions=[[1.0]], references=[[-100]])
    with pytest.raises(ValueError, match=r"row 0 has 2 of them for 1 labels"):
        Perplexity(keep_in_memory=True).compute(predictions=[[1.0, 2.0]], references=[[1]])


def test_preprocessing_shifts_and_skips_padding(model, text):
    tokens = text[:6]
    labels = tokens.clone()
    labels[4:] = -100
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits
    nats = preprocess_logits_for_metrics(logits, labels[None])
    assert nats.shape == (1, 5)
    assert nats.dtype == torch.float32
    assert nats[0, :3].tolist() == pytest.approx(nats_by_hand(model, tokens)[:3], rel=1e-5)
    assert torch.equal(nats[0, 3:], torch.zeros(2))
    assert torch.equal(preprocess_logits_for_metrics((logits, "cache"), labels[None]), nats)


def test_preprocessing_of_half_precision_is_done_in_float32():
    logits = torch.randn(2, 4, 9).bfloat16()
    labels = torch.randint(0, 9, (2, 4))
    assert torch.equal(
        preprocess_logits_for_metrics(logits, labels),
        preprocess_logits_for_metrics(logits.float(), labels),
    )


def test_batches_that_were_not_joined_count_alike():
    """As the Trainer gives them with ``eval_do_concat_batches=False``."""
    nats, labels = np.random.rand(3, 4).astype(np.float32), np.ones((3, 5), dtype=np.int64)
    labels[0, 2] = -100
    cut = [slice(0, 2), slice(2, 3)]
    apart = EvalPrediction(predictions=[nats[c] for c in cut], label_ids=[labels[c] for c in cut])
    together = EvalPrediction(predictions=nats, label_ids=labels)
    assert compute_metrics(apart) == compute_metrics(together)


def test_compute_metrics_without_the_preprocessing_says_so():
    with pytest.raises(ValueError, match="pass `preprocess_logits_for_metrics"):
        compute_metrics(EvalPrediction(predictions=np.zeros((1, 3, 5)), label_ids=np.zeros((1, 3))))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_windows_side_by_side(model, text, batch_size):
    # 45 tokens are 5 windows of 8, and 5 tokens that are dropped.
    expected = [nats for i in range(0, 40, 8) for nats in nats_by_hand(model, text[i : i + 8])]
    result = evaluate_perplexity(model, text, window=8, batch_size=batch_size, progress=False)
    assert result["tokens"] == len(expected) == 35
    assert result["nats_per_token"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["nats_per_token"]), rel=1e-12)
    assert (
        evaluate_perplexity(model, text, window=8, stride=8, batch_size=batch_size, progress=False)
        == result
    )


def test_standard_error_is_that_of_a_ratio_of_sums(model, text):
    windows = np.array([nats_by_hand(model, text[i : i + 8]) for i in range(0, 40, 8)])
    expected = windows.mean(-1).std(ddof=1) / math.sqrt(len(windows))
    found = evaluate_perplexity(model, text, window=8, progress=False)
    assert found["nats_standard_error"] == pytest.approx(expected, rel=1e-4)
    one = evaluate_perplexity(model, text[:8], window=8, progress=False)
    assert one["nats_standard_error"] is None


def test_standard_error_against_leaving_windows_out():
    # The jackknife agrees to the first order, for windows of unlike length too.
    generator = np.random.default_rng(0)
    counts = generator.integers(50, 150, size=200)
    sums = counts * generator.normal(3, 0.3, size=200)
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    jackknife = math.sqrt((len(sums) - 1) * left_out.var())
    assert standard_error(sums, counts) == pytest.approx(jackknife, rel=0.02)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(
    ("length", "window", "stride"), [(45, 8, 3), (45, 16, 4), (8, 8, 1), (9, 8, 7), (45, 8, 1)]
)
def test_sliding_windows_score_every_token_once(model, text, length, window, stride, batch_size):
    text = text[:length]
    # From the definition: token t is scored in the first window that holds it.
    expected = []
    for t in range(1, length):
        start = max(0, math.ceil((t + 1 - window) / stride)) * stride
        expected.append(nats_by_hand(model, text[start : t + 1])[-1])
    result = evaluate_perplexity(
        model, text, window=window, stride=stride, batch_size=batch_size, progress=False
    )
    assert result["tokens"] == length - 1
    assert result["nats_per_token"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_trainer_and_windows_agree(model, text, tmp_path):
    blocks = [row.tolist() for row in text[:40].view(5, 8)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=2,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        eval_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks}),
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    windows = evaluate_perplexity(model, text[:40], window=8, batch_size=2, progress=False)
    metrics = trainer.evaluate()
    assert windows.pop("nats_standard_error") > 0
    assert {name: metrics[f"eval_{name}"] for name in windows} == windows
    assert metrics["eval_loss"] == pytest.approx(windows["nats_per_token"], rel=1e-5)
    # The Trainer held one number per predicted token, not one per word of the vocabulary.
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (5, 7)


def test_evaluation_leaves_the_mode_of_the_model(model, text):
    try:
        model.train()
        evaluate_perplexity(model, text, window=8, progress=False)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": CONTEXT + 1}, "17 is more than its 16 tokens"),
        ({"window": 1}, "`window` must be at least 2"),
        ({"window": 8, "stride": 9}, "between 1 and `window`, but it is 9"),
        ({"window": 8, "stride": 0}, "between 1 and `window`, but it is 0"),
    ],
)
def test_bad_windows_are_refused(model, text, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(model, text, **options)


def test_bad_texts_are_refused(model, text):
    with pytest.raises(ValueError, match="it has 7 tokens and the window is 8"):
        evaluate_perplexity(model, text[:7], window=8)
    with pytest.raises(ValueError, match=r"its shape is \(1, 45\); pass `input_ids\[0\]`"):
        evaluate_perplexity(model, text[None], window=8)
