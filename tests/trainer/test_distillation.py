"""Distillation: the divergence is torch's, the scored tokens count, the teacher stays itself."""

import copy
import math

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F

from peft_lrqat import LowBitConfig, LRQATConfig
from peft_lrqat.trainer import LRQATTrainer, distillation_loss, divergence
from peft_lrqat.trainer.labels import scored_tokens


ROWS, VOCABULARY = 7, 11


def logits(dtype=torch.float32, rows=ROWS, spread=3.0):
    pair = (spread * torch.randn(rows, VOCABULARY) for _ in range(2))
    return tuple(t.to(dtype).requires_grad_(i == 0) for i, t in enumerate(pair))


def naive(student, teacher, scored, temperature, num_items=None):
    """The formula as anyone would write it."""
    each = F.kl_div(
        (student / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    return temperature**2 * each[scored].sum() / (num_items or scored.sum())


# The loss


@pytest.mark.parametrize(
    "chunk", [1, 2 * VOCABULARY, 3 * VOCABULARY + 5, 1 << 20], ids=["one", "two", "three", "all"]
)
@pytest.mark.parametrize("num_items", [None, 13, torch.tensor(13)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_equal_those_of_torch(temperature, num_items, chunk, monkeypatch):
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", chunk)
    student, teacher = logits(torch.float64)
    scored = torch.tensor([True, False, True, True, True, False, True])
    ours = distillation_loss(student, teacher, scored, temperature=temperature, num_items=num_items)
    theirs = naive(student, teacher, scored, temperature, num_items)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    upstream = torch.tensor(0.37, dtype=torch.float64)
    grads = [torch.autograd.grad(loss, student, upstream)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)
    assert (grads[0][~scored] == 0).all()


def test_gradient_is_that_of_finite_differences():
    student, teacher = logits(torch.float64, rows=3, spread=1.0)
    scored = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(s, teacher, scored, temperature=2.0), (student,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shorter_logits_are_widened(dtype):
    student, teacher = logits(dtype)
    scored = torch.ones(ROWS, dtype=torch.bool)
    wide = student.detach().double().requires_grad_()
    ours = distillation_loss(student, teacher, scored, temperature=1.0)
    theirs = naive(wide, teacher.double(), scored, 1.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    ours.backward()
    theirs.backward()
    assert student.grad.dtype == dtype
    # p_s - p_t is rounded to the dtype, and so is the product with the factor.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(student.grad.double(), wide.grad, rtol=2 * eps, atol=1e-6)


def test_a_scaler_of_float16_gradients_saves_them():
    """Over 10^4 tokens most entries are below the smallest float16; scaled by 2^16 they are not."""
    student, teacher = logits(torch.float16, spread=1.0)
    scored, scale = torch.ones(ROWS, dtype=torch.bool), 2.0**16
    wide = student.detach().double().requires_grad_()
    (
        scale * distillation_loss(student, teacher, scored, temperature=1.0, num_items=10**6)
    ).backward()
    naive(wide, teacher.double(), scored, 1.0, 10**6).backward()
    torch.testing.assert_close(student.grad.double() / scale, wide.grad, rtol=2e-3, atol=1e-12)


def test_equal_predictions_diverge_by_nothing():
    student, _ = logits()
    scored = torch.ones(ROWS, dtype=torch.bool)
    # Logits are known up to a constant.
    loss = distillation_loss(student, student.detach() + 5, scored, temperature=1.0)
    assert loss.abs() < 1e-6
    (grad,) = torch.autograd.grad(loss, student)
    assert grad.abs().max() < 1e-6


def test_nothing_scored_is_zero_and_has_no_gradient():
    student, teacher = logits()
    loss = distillation_loss(student, teacher, torch.zeros(ROWS, dtype=torch.bool), temperature=1.0)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_what_is_not_scored_may_hold_anything():
    student, teacher = logits()
    scored = torch.arange(ROWS) % 2 == 0
    expected = distillation_loss(student, teacher, scored, temperature=1.0)
    (grad,) = torch.autograd.grad(expected, student)
    for junk in (math.nan, math.inf, -math.inf):
        spoilt = torch.where(scored[:, None], student.detach(), junk).requires_grad_()
        loss = distillation_loss(
            spoilt, torch.where(scored[:, None], teacher, junk), scored, temperature=1.0
        )
        loss.backward()
        assert torch.equal(loss, expected)
        assert torch.equal(spoilt.grad, grad)


def test_tokens_that_both_exclude_count_for_nothing():
    student, teacher = logits()
    scored = torch.ones(ROWS, dtype=torch.bool)
    mask = torch.zeros(ROWS, 2).fill_(-math.inf)
    longer = [torch.cat([t.detach(), mask], dim=-1).requires_grad_() for t in (student, teacher)]
    expected = distillation_loss(student, teacher, scored, temperature=1.0)
    loss = distillation_loss(*longer, scored, temperature=1.0)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert (longer[0].grad[:, VOCABULARY:] == 0).all()


def test_nan_in_a_scored_row_is_not_hidden():
    for spoilt in (0, 1):
        pair = [t.detach().clone().requires_grad_() for t in logits()]
        with torch.no_grad():
            pair[spoilt][2, 3] = math.nan
        assert distillation_loss(*pair, torch.ones(ROWS, dtype=torch.bool), temperature=1.0).isnan()


def test_other_shapes_are_refused():
    student, teacher = logits()
    with pytest.raises(
        ValueError, match=r"teacher's logits have shape \(7, 10\) and the student's \(7, 11\)"
    ):
        distillation_loss(
            student, teacher[:, :-1], torch.ones(ROWS, dtype=torch.bool), temperature=1.0
        )


# Which tokens count

LABELS = torch.tensor([[5, -100, 6, 7], [-100, -100, 8, -100]])
MASK = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("labels", "mask", "shift", "expected"),
    [
        (LABELS, None, False, [[1, 0, 1, 1], [0, 0, 1, 0]]),
        (LABELS, MASK, True, [[0, 1, 1, 0], [0, 1, 0, 0]]),
        (None, MASK, False, [[0, 1, 1, 1], [1, 1, 0, 0]]),
        (None, MASK, True, [[1, 1, 1, 0], [1, 0, 0, 0]]),
        (None, None, True, [[1, 1, 1, 0], [1, 1, 1, 0]]),
        (
            torch.tensor([1, 2]),
            MASK,
            False,
            [[0, 1, 1, 1], [1, 1, 0, 0]],
        ),  # labels of rows, not of tokens
    ],
    ids=[
        "labels",
        "labels before the mask, shifted",
        "mask",
        "mask, shifted",
        "neither, shifted",
        "labels of rows",
    ],
)
def test_scored_tokens(labels, mask, shift, expected):
    assert torch.equal(
        scored_tokens(torch.zeros(2, 4, 9), labels, mask, shift=shift),
        torch.tensor(expected).bool(),
    )


def test_scored_tokens_are_those_of_the_task(make_base):
    """As many as transformers divides its own loss by."""
    model = make_base()
    ids = torch.randint(3, 96, (2, 4))
    nats = F.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1).float(),
        LABELS[:, 1:].flatten(),
        reduction="none",
    ).view(2, 3)
    scored = scored_tokens(torch.zeros(2, 4, 96), LABELS, None, shift=True)
    expected = nats[scored[:, :-1]].mean()
    torch.testing.assert_close(model(input_ids=ids, labels=LABELS).loss, expected)


# Teachers that are refused, and how they are found


@pytest.fixture
def distilling(lrqat_trainer, make_base):
    """``distilling(model, teacher, **fields)``: a trainer with a teacher, by default the base."""

    def make(model=None, teacher=None, options=None, **fields):
        fields = {"distillation_weight": 0.5, **fields}
        return lrqat_trainer(
            model, {"teacher_model": teacher or make_base(), **(options or {})}, **fields
        )

    return make


def test_the_students_own_base_is_refused(make_base, make_config, distilling):
    base = make_base()
    model = get_peft_model(base, make_config())
    for teacher in (base, model, model.get_base_model(), copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"but it has LR-QAT layers.*copy\.deepcopy\(model\)"):
            distilling(model, teacher)


def test_a_teacher_with_another_adapter_may_teach(make_base, distilling):
    lora = get_peft_model(make_base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    distilling(teacher=lora).train()


def test_another_vocabulary_is_refused(make_base, distilling):
    config = copy.deepcopy(make_base().config)
    config.vocab_size = 97
    with pytest.raises(ValueError, match="predicts over 97 tokens and the student over 96"):
        distilling(teacher=transformers.LlamaForCausalLM(config))


def test_a_teacher_without_a_weight_is_refused(make_base, lrqat_trainer):
    with pytest.raises(
        ValueError, match="`teacher_model` is given, but `distillation_weight` is 0; set it"
    ):
        lrqat_trainer(options={"teacher_model": make_base()})


def test_without_a_weight_nothing_is_loaded(lrqat_trainer):
    assert lrqat_trainer().teacher is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_teacher_is_loaded_from_where_the_base_came_from(
    dtype, make_base, make_config, lrqat_trainer, tmp_path
):
    base = make_base(dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype), make_config()
    )
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    trainer = lrqat_trainer(model, distillation_weight=0.5)
    assert type(trainer.teacher) is transformers.LlamaForCausalLM
    assert {p.dtype for p in trainer.teacher.parameters()} == {dtype}
    loaded = trainer.teacher.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("name", [None, "", "/nowhere/at/all"])
def test_a_base_that_cannot_be_found_is_named(name, make_peft, lrqat_trainer):
    model = make_peft()
    model.peft_config["default"].base_model_name_or_path = name
    with pytest.raises(
        ValueError, match=rf"`{name}` cannot be loaded \(.*; give it as `teacher_model`"
    ):
        lrqat_trainer(model, distillation_weight=0.5)


def test_the_teacher_of_a_low_bit_base_is_what_it_was_made_from(
    make_base, make_config, lrqat_trainer, distilling, tmp_path
):
    make_base().save_pretrained(tmp_path / "plain")
    load = transformers.AutoModelForCausalLM.from_pretrained
    settings = LowBitConfig(bits=4, embedding_bits=8)
    base = load(tmp_path / "plain", quantization_config=settings)
    base.save_pretrained(tmp_path / "base")
    trainer = lrqat_trainer(
        get_peft_model(base, LRQATConfig(target_modules="all-linear")), distillation_weight=0.5
    )
    expected = make_base().state_dict()
    loaded = trainer.teacher.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    trainer.train()
    stored = get_peft_model(load(tmp_path / "base"), LRQATConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"a local directory, `plain`; give it as `teacher_model`"):
        lrqat_trainer(stored, distillation_weight=0.5)
    distilling(stored, make_base()).train()
    with pytest.raises(ValueError, match="it is a low-bit base"):
        distilling(stored, load(tmp_path / "base"))


# The teacher in training


def test_what_is_frozen_and_equal_is_shared(make_base, make_peft, distilling, logits_of):
    model, teacher = make_peft(), make_base()
    before, student_before = logits_of(teacher), logits_of(model)
    trainer = distilling(model, teacher)
    mine = dict(model.get_base_model().named_parameters())
    shared = {
        n for n, p in teacher.named_parameters() if n in mine and mine[n].data_ptr() == p.data_ptr()
    }
    assert shared == {
        n for n in mine if n.endswith(("embed_tokens.weight", "norm.weight", "lm_head.weight"))
    }
    assert torch.equal(logits_of(teacher), before)
    assert torch.equal(logits_of(model), student_before)
    trainer.train()
    assert torch.equal(logits_of(teacher), before)
    assert not torch.equal(logits_of(model.eval()), student_before)
    assert not teacher.training


def test_what_differs_or_is_trained_is_not_shared(make_base, make_config, distilling):
    model = get_peft_model(make_base(), make_config(modules_to_save=["lm_head"]))
    teacher = make_base()
    with torch.no_grad():
        teacher.model.norm.weight.mul_(2)
    distilling(model, teacher)
    mine = {p.data_ptr() for p in model.parameters()}
    shared = {name for name, p in teacher.named_parameters() if p.data_ptr() in mine}
    assert "model.embed_tokens.weight" in shared
    assert not shared & {"model.norm.weight", "lm_head.weight"}


def test_the_teacher_has_no_gradient_and_is_in_no_checkpoint(distilling, make_base, tmp_path):
    teacher = make_base()
    trainer = distilling(teacher=teacher, save_strategy="steps", save_steps=3)
    trainer.train()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    teachers = {id(p) for p in teacher.parameters()}
    assert not teachers & {
        id(p) for group in trainer.optimizer.param_groups for p in group["params"]
    }
    # No file could hold it.
    size = sum(p.numel() * p.element_size() for p in teacher.parameters())
    trained = sum(
        p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad
    )
    assert 3 * trained < size * 2
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors", "pt") as file:
        assert all(".lrqat_" in name for name in set(file.keys()))


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [(torch.float32, {}), (torch.float32, {"bf16": True}), (torch.bfloat16, {})],
    ids=["float32", "autocast", "bfloat16"],
)
def test_students_of_either_dtype_learn(
    dtype, fields, make_base, make_peft, distilling, token_rows, step_logs
):
    model, options = make_peft(dtype=dtype, bits=2), {"train_dataset": token_rows(2)}
    fields = {"max_steps": 10, "distillation_weight": 1.0, "learning_rate": 2e-2, **fields}
    trainer = distilling(model, make_base(dtype=dtype), options, **fields)
    trainer.train()
    divergence = [log["distillation_loss"] for log in step_logs(trainer)]
    assert divergence[-1] < 0.8 * divergence[0]


# The loss of a step


def divergence_of(model, teacher, batch, temperature=1.0):
    """Mean over the scored tokens, of a causal language model."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    scored = torch.cat(
        [batch["labels"][:, 1:] != -100, torch.zeros(len(batch["labels"]), 1, dtype=torch.bool)],
        dim=1,
    )
    with torch.no_grad():
        return naive(model(**inputs).logits, teacher(**inputs).logits, scored, temperature).item()


@pytest.mark.parametrize(("weight", "temperature"), [(0.25, 1.0), (0.25, 3.0), (1.0, 1.0)])
def test_the_loss_is_mixed(
    weight, temperature, make_base, make_peft, distilling, token_rows, step_logs
):
    model, teacher = make_peft(init_weights=False), make_base()
    rows = token_rows(2)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        task = model(**batch).loss.item()
    divergence = divergence_of(model, teacher, batch, temperature)
    trainer = distilling(
        model,
        teacher,
        {"train_dataset": rows},
        max_steps=1,
        distillation_weight=weight,
        distillation_temperature=temperature,
    )
    trainer.train()
    (log,) = step_logs(trainer)
    assert log["distillation_loss"] == pytest.approx(divergence, rel=1e-5)
    assert log["loss"] == pytest.approx((1 - weight) * task + weight * divergence, rel=1e-5)


def test_at_weight_one_the_labels_do_not_matter(make_peft, distilling, token_rows, trained_tensors):
    """Only which of them are scored."""
    results = []
    for seed in (1, 2):
        ids = torch.randint(3, 96, (8, 10), generator=torch.Generator().manual_seed(seed))
        rows = [
            {"input_ids": row["input_ids"], "labels": labels}
            for row, labels in zip(token_rows(), ids)
        ]
        trainer = distilling(make_peft(), options={"train_dataset": rows}, distillation_weight=1.0)
        trainer.train()
        results.append(trained_tensors(trainer.model))
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


def test_evaluation_is_that_of_the_task(make_peft, distilling, token_rows):
    model, rows = make_peft(init_weights=False), token_rows(2)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        task = model(**batch).loss.item()
    trainer = distilling(model, options={"eval_dataset": rows}, distillation_weight=1.0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task, rel=1e-6)


def unequal_rows():
    """Of 4 to 10 tokens, some of them not scored."""
    ids = torch.randint(3, 96, (4, 10), generator=torch.Generator().manual_seed(0))
    rows = []
    for row, length in zip(ids, (10, 4, 7, 9)):
        labels = row[:length].clone()
        labels[2] = -100
        rows.append({"input_ids": row[:length].tolist(), "labels": labels.tolist()})
    return rows


def padded(rows, width=None, left=False):
    """A batch of them, padded with 0 and -100."""
    width = width or max(len(row["labels"]) for row in rows)

    def pad(values, filler):
        missing = [filler] * (width - len(values))
        return torch.tensor(missing + values if left else values + missing)

    return {
        "input_ids": torch.stack([pad(row["input_ids"], 0) for row in rows]),
        "labels": torch.stack([pad(row["labels"], -100) for row in rows]),
        "attention_mask": torch.stack([pad([1] * len(row["labels"]), 0) for row in rows]),
    }


@pytest.mark.parametrize("width", [10, 16])
def test_padding_changes_nothing(width, make_peft, make_base, distilling):
    """Rows one by one, weighted by their scored tokens, are the same as one padded batch."""
    model, teacher, rows = make_peft(init_weights=False), make_base(), unequal_rows()
    alone = [divergence_of(model, teacher, padded([row])) for row in rows]
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    expected = sum(a * c for a, c in zip(alone, counts)) / sum(counts)
    trainer = distilling(model, teacher, distillation_weight=1.0)
    model.train()
    loss = trainer.compute_loss(
        model, padded(rows, width), num_items_in_batch=torch.tensor(sum(counts))
    )
    # The divergence is a difference of logarithms of the order of 1, in float32.
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=5e-7)
    assert trainer.compute_loss(model, padded(rows, width)).item() == pytest.approx(
        expected, rel=1e-5, abs=5e-7
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["labels", "smoothed"])
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_accumulated_batches_equal_one(
    weight, smoothing, make_peft, distilling, gradients, step_logs
):
    found, logs = [], []
    for size, steps in ((4, 1), (2, 2)):
        trainer = distilling(
            make_peft(init_weights=False),
            options={
                "train_dataset": unequal_rows(),
                "data_collator": padded,
                "callbacks": [gradients],
            },
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            distillation_weight=weight,
            label_smoothing_factor=smoothing,
            max_grad_norm=0.0,
        )
        trainer.train()
        found.append(gradients.steps.pop())
        logs.append(step_logs(trainer)[0])
    for other, log in zip(found[1:], logs[1:]):
        for name, gradient in found[0].items():
            # Sums of float32 in another order.
            torch.testing.assert_close(
                other[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max()
            )
        for key in ("loss", "distillation_loss"):
            assert log[key] == pytest.approx(logs[0][key], rel=1e-5, abs=5e-7)


def test_label_smoothing_is_the_tasks(make_base, make_peft, distilling, token_rows, step_logs):
    model, teacher, rows = make_peft(init_weights=False), make_base(), token_rows(2)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        log_p = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    gold = -log_p.gather(-1, batch["labels"][:, 1:, None]).mean()
    task = 0.9 * gold + 0.1 * -log_p.mean()
    divergence = divergence_of(model, teacher, batch)
    trainer = distilling(
        model, teacher, {"train_dataset": rows}, max_steps=1, label_smoothing_factor=0.1
    )
    trainer.train()
    (log,) = step_logs(trainer)
    assert log["loss"] == pytest.approx(0.5 * task.item() + 0.5 * divergence, rel=1e-5)


def test_the_logged_divergence_is_the_mean_of_the_steps_since_the_last_log(
    distilling, step_logs, tmp_path
):
    fields = {"max_steps": 6, "optim": "sgd", "learning_rate": 1e-9, "scale_learning_rate": 1e-12}
    each = distilling(**fields)
    each.train()
    single = [log["distillation_loss"] for log in step_logs(each)]
    pairs = distilling(**fields, logging_steps=3, save_strategy="steps", save_steps=2)
    pairs.train()
    logged = [log["distillation_loss"] for log in step_logs(pairs)]
    assert logged == pytest.approx([sum(single[:3]) / 3, sum(single[3:]) / 3], rel=1e-4)
    # Resumed between two logs, only the steps of this run count.
    resumed = distilling(**fields, logging_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert step_logs(resumed)[0]["distillation_loss"] == pytest.approx(single[2], rel=1e-4)


# Other tasks


@pytest.mark.parametrize("architecture", ["t5", "classifier", "gpt2", "opt"])
def test_other_architectures(architecture, make_base, make_peft, batch_for, distilling, step_logs):
    model, teacher = make_peft(architecture, init_weights=False), make_base(architecture)
    batch = batch_for(architecture)
    for module in (model, teacher):
        for part in module.modules():
            for rate in ("p", "dropout"):
                if isinstance(getattr(part, rate, None), float):
                    setattr(part, rate, 0.0)
    with torch.no_grad():
        outputs, target = model(**batch), teacher(**batch).logits
    if architecture == "classifier":
        student, scored = outputs.logits, torch.ones(2, dtype=torch.bool)
    elif architecture == "t5":  # aligned with its labels
        student, scored = outputs.logits, torch.ones(2, 12, dtype=torch.bool)
    else:
        student, target, scored = (
            outputs.logits[:, :-1],
            target[:, :-1],
            torch.ones(2, 11, dtype=torch.bool),
        )
    rows = [{name: value[i] for name, value in batch.items()} for i in range(2)]
    expected = naive(student, target, scored, 1.0).item()
    trainer = distilling(
        model, teacher, {"train_dataset": rows}, max_steps=1, distillation_weight=0.25
    )
    trainer.train()
    (log,) = step_logs(trainer)
    # GPT-2's task loss is divided by all labels, the first included: the Trainer does not know
    # that it shifts them.
    share = 11 / 12 if architecture == "gpt2" else 1
    assert log["distillation_loss"] == pytest.approx(share * expected, rel=1e-4)
    assert log["loss"] == pytest.approx(
        share * (0.75 * outputs.loss.item() + 0.25 * expected), rel=1e-4
    )


def test_decoder_inputs_of_a_collator_reach_the_teacher(
    make_base, make_peft, distilling, batch_for, step_logs
):
    """With label smoothing an encoder-decoder sees no labels, only the decoder's input."""
    model, teacher, batch = make_peft("t5", init_weights=False), make_base("t5"), batch_for("t5")
    decoder_inputs = teacher.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    rows = [
        {**{n: v[i] for n, v in batch.items()}, "decoder_input_ids": decoder_inputs[i]}
        for i in range(2)
    ]
    trainer = distilling(
        model, teacher, {"train_dataset": rows}, max_steps=1, label_smoothing_factor=0.1
    )
    trainer.train()
    assert step_logs(trainer)[0]["distillation_loss"] > 0


def test_a_loss_that_hands_out_no_logits_is_refused(make_peft, make_base, lrqat_args, token_rows):
    class Silent(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs).loss
            return (loss, {}) if return_outputs else loss

    class SilentLRQAT(LRQATTrainer, Silent):
        pass

    trainer = SilentLRQAT(
        model=make_peft(),
        args=lrqat_args(distillation_weight=0.5),
        train_dataset=token_rows(),
        teacher_model=make_base(),
    )
    with pytest.raises(
        ValueError, match="the loss of SilentLRQAT does not return them; use LRQATTrainer"
    ):
        trainer.train()


def test_a_distilled_adapter_is_like_any_other(
    make_peft, make_base, distilling, logits_of, tmp_path
):
    trainer = distilling(make_peft())
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_base(), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded.eval()), logits_of(trainer.model.eval()))


def test_a_teacher_with_a_random_head_is_refused(make_config, lrqat_trainer, tmp_path):
    """A classifier made from a language model has one, and loading it again draws another."""
    config = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**config, intermediate_size=48)
    ).save_pretrained(tmp_path / "base")
    base = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3
    )
    model = get_peft_model(base, make_config("classifier"))
    with pytest.raises(
        ValueError,
        match=r"has no weights for `score.weight`: a teacher loaded from there would have random",
    ):
        lrqat_trainer(model, distillation_weight=0.5)


def test_the_teacher_keeps_no_cache(make_base, make_peft, distilling):
    trainer = distilling(make_peft(), make_base())
    caches = []
    trainer.teacher.register_forward_hook(
        lambda module, args, output: caches.append(output.past_key_values)
    )
    trainer.train()
    assert set(caches) == {None}


def test_what_is_trained_later_is_shared_no_more(make_base, make_peft, distilling, monkeypatch):
    # Training refuses parameters that no adapter saves; sharing must be right without that.
    monkeypatch.setattr("peft_lrqat.trainer.optimizer.check_trained_is_saved", lambda *_: None)
    teacher, model = make_base(), make_peft()
    trainer = distilling(model, teacher)
    embedding = model.get_input_embeddings().weight
    assert embedding.data_ptr() == teacher.get_input_embeddings().weight.data_ptr()
    before = embedding.detach().clone()
    embedding.requires_grad_(True)
    trainer.train()
    assert torch.equal(teacher.get_input_embeddings().weight, before)
    assert not torch.equal(embedding, before)


def test_a_second_attempt_logs_its_own_divergence(make_base, make_peft, distilling, step_logs):
    """``auto_find_batch_size`` restarts from step 0 when memory runs out between two logs."""

    class OutOfMemory(transformers.TrainerCallback):
        raised = False

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3 and not self.raised:
                self.raised = True
                raise RuntimeError("CUDA out of memory.")

    options = {
        "logging_steps": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "auto_find_batch_size": True,
    }
    trainer = distilling(make_peft(), make_base(), **options)
    callback = OutOfMemory()
    trainer.add_callback(callback)
    trainer.train()
    assert callback.raised
    assert [log["step"] for log in step_logs(trainer)] == [2, 4]
    assert all(0 <= log["distillation_loss"] < 1 for log in step_logs(trainer))
