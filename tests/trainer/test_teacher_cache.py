"""A cached teacher teaches what a resident one does, is asked once, and goes."""

import copy
import gc
import shutil
import weakref
from dataclasses import dataclass

import pytest
import torch
import transformers
from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig, SFTTrainer

from peft_lrqat import LRQATConfig
from peft_lrqat.demo import model_path
from peft_lrqat.trainer import LRQATArguments, LRQATTrainer, LRQATTrainerMixin
from peft_lrqat.trainer.teacher_cache import TeacherCache
from peft_lrqat.trainer.texts import texts_of


LAYOUT = {"states": ((3,), torch.bfloat16), "tokens": ((2,), torch.int32)}


def tensors_of(tokens):
    return {
        "states": torch.randn(tokens, 3).bfloat16(),
        "tokens": torch.randint(9, (tokens, 2)).int(),
    }


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(t, expected[name]) for name, t in found.items()
    )


# On disk


def test_what_is_added_is_found_again_by_any_process(tmp_path):
    texts = {f"{n}": tensors_of(n) for n in (1, 5, 3)}
    cache = TeacherCache(tmp_path, {"teacher": "a"}, LAYOUT)
    other = TeacherCache(tmp_path, {"teacher": "a"}, LAYOUT)
    for key, tensors in texts.items():
        (other if key == "5" else cache).add(key, tensors)
        cache.add(key, tensors)
    assert all(equal(cache.get(key), texts[key]) for key in ("1", "3"))
    other.refresh()
    for each in (other, TeacherCache(tmp_path, {"teacher": "a"}, LAYOUT)):
        assert len(each) == 3
        assert each.bytes == (1 + 5 + 3) * (3 * 2 + 2 * 4)
        assert all(equal(each.get(key), tensors) for key, tensors in texts.items())


@pytest.mark.parametrize("change", ["settings", "layout"])
def test_other_teachers_and_targets_have_their_own(change, tmp_path):
    cache = TeacherCache(tmp_path, {"teacher": "a"}, LAYOUT)
    cache.add("1", tensors_of(1))
    settings = {"teacher": "b"} if change == "settings" else {"teacher": "a"}
    layout = LAYOUT if change == "settings" else {**LAYOUT, "states": ((4,), torch.bfloat16)}
    assert "1" not in TeacherCache(tmp_path, settings, layout)


@pytest.mark.parametrize("cut", ["line", "tensors"])
def test_what_a_killed_run_left_does_not_count(cut, tmp_path):
    cache = TeacherCache(tmp_path, {}, LAYOUT)
    texts = {"1": tensors_of(4), "2": tensors_of(2)}
    for key, tensors in texts.items():
        cache.add(key, tensors)
    pattern = "*.index" if cut == "line" else "*.bin"
    (file,) = cache.place.glob(pattern)
    file.write_bytes(file.read_bytes()[:-1])
    found = TeacherCache(tmp_path, {}, LAYOUT)
    assert "2" not in found
    assert equal(found.get("1"), texts["1"])
    found.add("2", texts["2"])
    assert equal(TeacherCache(tmp_path, {}, LAYOUT).get("2"), texts["2"])


def test_damage_is_noticed(tmp_path):
    cache = TeacherCache(tmp_path, {}, LAYOUT)
    cache.add("1", tensors_of(4))
    (file,) = cache.place.glob("*.bin")
    damaged = bytearray(file.read_bytes())
    damaged[7] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(
        ValueError, match=r"damaged in .*\.bin; delete .*, and it is computed again"
    ):
        TeacherCache(tmp_path, {}, LAYOUT).get("1")


# Texts


def test_padding_and_place_do_not_change_a_text():
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [5, 6, 8, 0, 0]])
    texts = texts_of({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids})
    assert [text.tokens.tolist() for text in texts] == [[0, 1, 2], [2, 3, 4], [0, 1, 2]]
    assert texts[0].key == texts[1].key != texts[2].key
    alone = texts_of({"input_ids": ids[:1, :3], "attention_mask": torch.ones(1, 3).long()})
    assert alone[0].key == texts[0].key


def test_a_packed_row_holds_several_texts():
    ids = torch.tensor([[5, 6, 7, 5, 6, 9]])
    texts = texts_of({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])})
    assert [text.tokens.tolist() for text in texts] == [[0, 1, 2], [3, 4], [5]]
    other = texts_of({"input_ids": ids[:, 3:5], "position_ids": torch.tensor([[0, 1]])})
    assert other[0].key == texts[1].key


def test_a_row_with_a_mask_is_one_text():
    """transformers keeps texts of a row apart by position ids only where there is no mask."""
    ids, positions = torch.tensor([[5, 6, 7, 5, 6]]), torch.tensor([[0, 1, 2, 0, 1]])
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones(1, 5)}
    assert [text.tokens.tolist() for text in texts_of(inputs)] == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("name", ["token_type_ids", "image"])
def test_all_that_the_model_sees_counts(name):
    ids = torch.ones(2, 3).long()
    shape = (2, 3) if name == "token_type_ids" else (2, 4, 5)
    extra = torch.zeros(shape)
    first = texts_of({"input_ids": ids, name: extra})
    extra[1] = 1
    second = texts_of({"input_ids": ids, name: extra})
    assert first[0].key == second[0].key
    assert first[1].key != second[1].key


# In training


@pytest.fixture
def cached(lrqat_trainer, make_base, tmp_path):
    """``cached(model, **fields)``: a trainer whose teacher is the base, cached in ``cache``."""

    def make(model=None, options=None, **fields):
        fields = {
            "distillation_weight": 0.5,
            "distillation_target": "hidden_states",
            "distillation_cache": str(tmp_path / "cache"),
            **fields,
        }
        if "teacher_model" not in (options or {}):
            options = {"teacher_model": make_base(), **(options or {})}
        return lrqat_trainer(model, options, **fields)

    return make


def losses(trainer):
    return [
        (log["loss"], log["distillation_loss"])
        for log in trainer.state.log_history
        if "loss" in log
    ]


@pytest.mark.parametrize(
    ("fields", "rel"),
    [
        # What is cached of hidden states has the 8 bits of bfloat16.
        ({"distillation_target": "hidden_states"}, 2e-2),
        # All 96 tokens of the vocabulary.
        ({"distillation_target": "predictions", "distillation_top_k": 500}, 1e-4),
    ],
    ids=["hidden_states", "predictions"],
)
def test_a_cached_teacher_teaches_what_a_resident_one_does(
    fields, rel, cached, make_peft, trained_tensors
):
    found = []
    for cache in ({}, {"distillation_cache": None}):
        trainer = cached(make_peft(init_weights=False), max_steps=4, **fields, **cache)
        trainer.train()
        found.append((losses(trainer), trained_tensors(trainer.model)))
    (ours, weights), (resident, expected) = found
    assert len(ours) == 4
    for mine, theirs in zip(ours, resident, strict=True):
        # 1 minus the sum of all probabilities is only a rounding error, but not 0.
        assert mine == pytest.approx(theirs, rel=rel, abs=3e-6)
    before = trained_tensors(make_peft(init_weights=False))
    for name, tensor in weights.items():
        moved = (expected[name] - before[name]).norm()
        assert (tensor - expected[name]).norm() <= 0.2 * moved


def test_hidden_states_are_compared(cached, make_base, make_peft, token_rows):
    model, teacher, rows = make_peft(init_weights=False), make_base(), token_rows(2)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        ours, theirs = (
            m(**batch, output_hidden_states=True).hidden_states[-1][:, :-1]
            for m in (model, teacher)
        )
    # The last token of a row predicts nothing that is scored.
    expected = ((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()
    trainer = cached(model, {"train_dataset": rows, "teacher_model": teacher}, max_steps=1)
    trainer.train()
    ((_, distance),) = losses(trainer)
    assert distance == pytest.approx(expected.item(), rel=1e-2)


def test_the_teacher_is_asked_once_for_each_text_and_goes(cached, make_base, token_rows):
    teacher, calls = make_base(), []
    teacher.register_forward_hook(lambda m, args, out: calls.append(1))
    trainer = cached(
        options={"teacher_model": teacher, "train_dataset": token_rows(6)}, max_steps=9
    )
    gone = weakref.ref(teacher)
    del teacher
    trainer.train()
    assert len(calls) == 3  # batches of two
    gc.collect()
    assert gone() is None
    assert trainer.teacher is None
    # The cache is whole now: the next one is not asked, and goes as well.
    teacher = make_base()
    options = {"teacher_model": teacher, "train_dataset": token_rows(6)}
    again = cached(options=options, max_steps=9, overwrite_checkpoints=True)
    gone = weakref.ref(teacher)
    del teacher, options
    again.train()
    gc.collect()
    assert gone() is None


def test_a_second_run_needs_no_teacher(cached, make_base, make_peft, monkeypatch, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    first = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = make_peft(init_weights=False)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    twin = copy.deepcopy(model)
    trainer = cached(model, {"teacher_model": None}, max_steps=3)
    trainer.train()

    def forbidden(*_):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("peft_lrqat.trainer.distillation.load_teacher", forbidden)
    again = cached(twin, {"teacher_model": None}, max_steps=3, overwrite_checkpoints=True)
    again.train()
    assert losses(again) == losses(trainer)
    assert type(first) is type(base)


def test_only_texts_of_the_run_are_computed(cached, token_rows, tmp_path):
    trainer = cached(options={"train_dataset": token_rows(8)}, max_steps=2)
    trainer.train()
    (folder,) = (tmp_path / "cache").iterdir()
    (index,) = folder.glob("*.index")
    assert len(index.read_text().splitlines()) == 4


def test_resuming_equals_a_run_without_a_stop(cached, make_peft, trained_tensors, tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = cached(make_peft(init_weights=False), **fields)
    whole.train()
    for checkpoint in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(tmp_path / "out" / checkpoint)
    resumed = cached(make_peft(init_weights=False), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    expected = trained_tensors(whole.model)
    assert equal(trained_tensors(resumed.model), expected)


def test_the_order_of_the_data_is_that_of_a_run_without_a_cache(cached, make_peft):
    orders = []
    for weight in (0.5, 0.0):
        seen = []

        def collate(rows, seen=seen):
            seen.append([row["input_ids"].tolist() for row in rows])
            return transformers.default_data_collator(rows)

        options = {"data_collator": collate}
        if not weight:
            options["teacher_model"] = None
        fields = {"distillation_weight": weight, "max_steps": 8, "overwrite_checkpoints": True}
        cached(make_peft(init_weights=False), options, **fields).train()
        orders.append(seen[-8:])
    assert orders[0] == orders[1]


def test_texts_that_change_call_the_teacher_back(cached, caplog):
    def collate(rows):
        batch = transformers.default_data_collator(rows)
        batch["input_ids"] = torch.randint(3, 96, batch["input_ids"].shape)
        return batch

    base = cached(options={"data_collator": collate}, max_steps=2)
    given = base._given_teacher
    base._dismiss_teacher = lambda: None  # the one that was given cannot be loaded again
    base.train()
    assert base.teacher is given
    assert len(losses(base)) == 2


def test_padded_batches_in_any_order(cached, make_peft):
    ids = torch.randint(3, 96, (6, 10), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row[: 4 + i].tolist()} for i, row in enumerate(ids)]

    def collate(batch):
        width = max(len(row["input_ids"]) for row in batch)
        padded = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch]
        mask = [[int(token != 0) for token in row] for row in padded]
        labels = [[token or -100 for token in row] for row in padded]
        return {
            "input_ids": torch.tensor(padded),
            "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(labels),
        }

    found = []
    for cache in ({}, {"distillation_cache": None}):
        options = {"train_dataset": rows, "data_collator": collate}
        trainer = cached(make_peft(init_weights=False), options, max_steps=9, **cache)
        trainer.train()
        found.append(losses(trainer))
        assert (trainer.teacher is None) == (not cache)
    # Later on, roundings that fell the other way make two runs of it.
    for mine, theirs in list(zip(*found, strict=True))[:3]:
        assert mine == pytest.approx(theirs, rel=1e-2)


class SFT(LRQATTrainerMixin, SFTTrainer):
    pass


@dataclass(kw_only=True)
class SFTArguments(LRQATArguments, SFTConfig):
    pass


@pytest.mark.parametrize("packing", [False, True])
def test_trl_learns_from_hidden_states(packing, cached, make_base, make_peft, args_in, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path())
    teacher = copy.deepcopy(model)
    student = get_peft_model(
        model, LRQATConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bits=2)
    )
    texts = [f"number {n} is followed by {n + 1}" * (1 + n % 3) for n in range(8)]
    args = args_in(
        tmp_path / "out",
        SFTArguments,
        distillation_weight=0.5,
        distillation_target="hidden_states",
        distillation_cache=str(tmp_path / "cache"),
        packing=packing,
        max_length=64,
        bf16=False,
    )
    trainer = SFT(
        student,
        args=args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        teacher_model=teacher,
    )
    trainer.train()
    found = losses(trainer)
    assert len(found) == args.max_steps
    assert all(0 < distance < 10 for _, distance in found)
    assert trainer.teacher is None


# Refused


def test_encoder_decoders_are_refused(make_peft, cached, make_base):
    with pytest.raises(ValueError, match="does not hold what encoder-decoder models give"):
        cached(make_peft("t5"), {"teacher_model": make_base("t5")})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"distillation_target": "logits"}, "must be one of 'predictions', 'hidden_states'"),
        ({"distillation_top_k": 0}, "must be at least 1, but is 0"),
    ],
)
def test_wrong_settings_are_refused(field, message, cached):
    with pytest.raises(ValueError, match=message):
        cached(**field)


def test_the_trainer_is_exported():
    assert issubclass(LRQATTrainer, LRQATTrainerMixin)
