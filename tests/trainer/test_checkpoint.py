"""A run that is stopped anywhere continues from its last whole checkpoint as if it had not been."""

import builtins
import copy
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import peft.peft_model
import pytest
import safetensors.torch
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers.trainer_utils import get_last_checkpoint

from peft_lrqat.trainer import (
    LRQATOptimizerFactory,
    LRQATTrainer,
    last_complete_checkpoint,
)
from peft_lrqat.trainer.checkpoint import (
    SET_ASIDE,
    STAGING,
    delete_older,
    tidy_up,
    why_incomplete,
)


STEPS_PER_EPOCH = 5  # 9 batches, two to a step; the last step of an epoch has one
FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
}
SAVED = {"save_strategy": "steps", "save_steps": 1}
FIELDS = {
    **SAVED,
    "max_steps": 7,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
}


@pytest.fixture(scope="session")
def make_model(make_base, make_config):
    """``make_model(kind, seed, adapters, **fields)``: tiny, with dropout; the same at every call.

    A classifier whose head is trained in full, or GPT-2.
    """

    def make(kind="classifier", seed=0, adapters=("default",), **fields):
        base = make_base(kind, seed=seed)
        for module in base.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
        configs = [make_config(kind, **{"r": 2, "lora_alpha": 2, **fields}) for _ in adapters]
        torch.manual_seed(seed)
        model = get_peft_model(base, configs[0], adapter_name=adapters[0])
        for name, config in zip(adapters[1:], configs[1:]):
            model.add_adapter(name, config)
        return model

    return make


@pytest.fixture(scope="session")
def make_rows(token_rows):
    """``make_rows(kind, count)``: each row has one label, for GPT-2 the labels of its tokens."""

    def make(kind="classifier", count=18):
        rows = token_rows(count, 8)
        if kind == "gpt2":
            return rows
        return [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 3} for row in rows]

    return make


@pytest.fixture(scope="session")
def make_parts(make_model, make_base, make_rows, args_in):
    """``make_parts(folder, kind, model, **fields)``: what a trainer is made of, the same each time.

    Another process can be given it.
    """

    def make(folder, kind="classifier", model=None, **fields):
        return {
            "model": make_model(kind) if model is None else model,
            "args": args_in(folder, **{**FIELDS, **fields}),
            "train_dataset": make_rows(kind),
            "eval_dataset": make_rows(kind, 6),
            "teacher_model": make_base(kind) if fields.get("distillation_weight") else None,
        }

    return make


@pytest.fixture(scope="session")
def make_trainer(make_parts):
    """``make_trainer(folder, kind, model, callbacks, **fields)``: a trainer of `make_parts`."""

    def make(folder, kind="classifier", model=None, callbacks=(), **fields):
        parts = make_parts(folder, kind, model, **fields)
        torch.manual_seed(5)
        return LRQATTrainer(**parts, callbacks=list(callbacks))

    return make


class Stop(transformers.TrainerCallback):
    """After ``step`` steps: in good order, or by an exception amid the next step."""

    def __init__(self, step, how="stop"):
        self.step, self.how = step, how

    def on_step_end(self, args, state, control, **kwargs):
        if self.how == "stop" and state.global_step == self.step:
            control.should_training_stop = True

    def on_substep_end(self, args, state, control, **kwargs):
        if self.how == "error" and state.global_step == self.step:
            raise InterruptedError("in a step")


class SetEvalLoss(transformers.TrainerCallback):
    """``losses[step]`` as the result of the evaluation after ``step``."""

    def __init__(self, losses):
        self.losses = losses

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = self.losses[state.global_step]


def outcome(trainer):
    """Every tensor that training changes (adapter, head, moments), and where the schedule is."""
    tensors = {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    for index, values in trainer.optimizer.state_dict()["state"].items():
        tensors.update({f"{index}.{name}": value.clone() for name, value in values.items()})
    return {
        **tensors,
        "rates": torch.tensor(trainer.lr_scheduler.get_last_lr(), dtype=torch.float64),
    }


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def saved_adapter(folder):
    with safe_open(Path(folder, "adapter_model.safetensors"), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def adapter_of(model, adapter="default"):
    return peft.get_peft_model_state_dict(model, adapter_name=adapter)


def tree(folder):
    """Every file below ``folder`` with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture(scope="module")
def uninterrupted(make_trainer, tmp_path_factory):
    """``uninterrupted(kind, **fields)``: the outcome of a whole run, and the run's folder."""
    done = {}

    def run(kind="classifier", **fields):
        key = kind, *sorted(fields.items())
        if key not in done:
            folder = tmp_path_factory.mktemp("uninterrupted")
            trainer = make_trainer(folder, kind, **fields)
            trainer.train()
            done[key] = outcome(trainer), folder
        return done[key]

    return run


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    """A copy of a checkpoint after step 2."""
    _, folder = uninterrupted(max_steps=4)
    return Path(shutil.copytree(folder / "checkpoint-2", tmp_path / "run" / "checkpoint-2"))


# What a checkpoint holds


def test_checkpoint_holds_the_adapter_and_the_state_of_the_run(make_model, uninterrupted):
    trained, folder = uninterrupted(max_steps=4)
    assert names_in(folder) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    assert set(names_in(folder / "checkpoint-4")) == FILES
    saved = saved_adapter(folder / "checkpoint-4")
    assert saved.keys() == adapter_of(make_model()).keys()
    assert all(".lrqat_" in name or name == "base_model.model.score.weight" for name in saved)
    for name, tensor in saved.items():
        if ".lrqat_fingerprint" not in name:
            full = (
                name.replace("score.", "score.modules_to_save.default.")
                if "score" in name
                else f"{name}.default"
            )
            assert torch.equal(trained[full], tensor)
    state = torch.load(folder / "checkpoint-4" / "optimizer.pt")
    assert [group["name"] for group in state["param_groups"]] == ["A", "B", "scales", "other"]
    assert {value.shape for moments in state["state"].values() for value in moments.values()} <= {
        *(tensor.shape for tensor in saved.values()),
        torch.Size([]),
    }


def test_save_only_model_is_said_where_it_is_resumed(make_trainer, tmp_path, caplog):
    make_trainer(tmp_path, max_steps=2, save_only_model=True).train()
    assert set(names_in(tmp_path / "checkpoint-2")) == FILES - {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    }
    assert why_incomplete(tmp_path / "checkpoint-2") is None
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert f"{tmp_path / 'checkpoint-2'} holds no state of the optimizer" in caplog.text
    assert trainer.state.global_step == 3


# Exact resumption


@pytest.mark.parametrize("how", ["stop", "error"])
@pytest.mark.parametrize("step", [1, 3, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1])
@pytest.mark.parametrize("kind", ["classifier", "gpt2"])
def test_resumed_is_uninterrupted(make_trainer, kind, step, how, uninterrupted, tmp_path):
    fields = {"distillation_weight": 0.5, "save_steps": step, "lr_scheduler_type": "cosine"}
    whole, _ = uninterrupted(kind, **{**fields, "save_steps": 100})
    trainer = make_trainer(tmp_path, kind, callbacks=[Stop(step, how)], **fields)
    try:
        trainer.train()
    except InterruptedError:
        assert how == "error"
    assert trainer.state.global_step == step
    torch.manual_seed(99)
    trainer = make_trainer(tmp_path, kind, **{**fields, "save_strategy": "no"})
    torch.rand(3)
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), whole)


def test_same_trainer_goes_on_after_an_exception(make_trainer, uninterrupted, tmp_path):
    whole, _ = uninterrupted(max_steps=4)
    trainer = make_trainer(tmp_path, max_steps=4, callbacks=[stop := Stop(3, "error")])
    with pytest.raises(InterruptedError):
        trainer.train()
    stop.step = None
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), whole)


def test_checkpoint_of_every_epoch(make_trainer, uninterrupted, tmp_path):
    whole, _ = uninterrupted()
    fields = {"save_strategy": "epoch", "max_steps": 7}
    make_trainer(tmp_path, callbacks=[Stop(STEPS_PER_EPOCH)], **fields).train()
    assert names_in(tmp_path) == [f"checkpoint-{STEPS_PER_EPOCH}"]
    trainer = make_trainer(tmp_path, **fields)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS_PER_EPOCH}"))
    assert_same(outcome(trainer), whole)


def test_resumed_in_another_place(make_trainer, tmp_path):
    """The best checkpoint is found again, too, where the directory has been moved."""
    fields = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    losses = SetEvalLoss({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0})
    make_trainer(tmp_path / "here", callbacks=[losses, Stop(3)], **fields).train()
    (tmp_path / "here").rename(tmp_path / "there")
    trainer = make_trainer(tmp_path / "there", callbacks=[losses], **fields)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-2")
    assert_same(adapter_of(trainer.model), saved_adapter(tmp_path / "there" / "checkpoint-2"))


@pytest.mark.parametrize(
    "adapters", [("mine",), ("default", "second"), ("first", "default")], ids="-".join
)
def test_resumed_with_adapters_of_any_name(make_model, make_trainer, adapters, tmp_path):
    def trainer(folder, **fields):
        model = make_model(adapters=adapters)
        model.set_adapter(adapters[-1])
        return make_trainer(folder, model=model, max_steps=3, **fields)

    whole = trainer(tmp_path / "whole", save_strategy="no")
    whole.train()
    trainer(tmp_path / "parts", callbacks=[Stop(2)]).train()
    rest = trainer(tmp_path / "parts")
    rest.train(resume_from_checkpoint=True)
    assert rest.model.active_adapters == [adapters[-1]]
    assert_same(outcome(rest), outcome(whole))
    for name in adapters:
        assert_same(adapter_of(rest.model, name), adapter_of(whole.model, name))


# Killed while writing


class KilledAtEveryWrite:
    """Kills a fork of this process in the middle of each change that it makes in a folder.

    A file is then half-written. What that leaves is copied to ``left/<number>-<what>``, and the
    process itself continues. An audit hook sees renames, removals and new directories. Writes are
    seen where they happen: Python's own files, `torch.save`, safetensors, and copies.
    """

    def __init__(self, folder, left):
        self.folder, self.left, self.number, self.busy = (
            os.path.realpath(folder),
            Path(left),
            0,
            False,
        )
        self.open, self.copyfile, self.torch_save = io.open, shutil.copyfile, torch.save
        builtins.open = io.open = self.open_file
        shutil.copyfile = self.copy
        torch.save = self.save
        peft.peft_model.safe_save_file = self.save_safetensors
        sys.addaudithook(self.audit)

    def reach(self, what, path=None, content=b"", before=b""):
        if self.busy:
            return
        self.busy = True
        killed = os.fork()
        if killed == 0:
            if path is not None:
                with self.open(path, "wb") as file:
                    file.write(before + content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(killed, 0)[1]) == signal.SIGKILL
        shutil.copytree(self.folder, self.left / f"{self.number:03}-{what}")
        self.number += 1
        self.busy = False

    def inside(self, path):
        return isinstance(path, str | os.PathLike) and os.path.realpath(path).startswith(
            self.folder
        )

    def audit(self, event, args):
        # shutil.rmtree names files relative to an open directory.
        if event == "os.mkdir" and self.inside(args[0]):
            self.reach("mkdir")
        elif event in ("os.remove", "os.rmdir") and (self.inside(args[0]) or args[-1] != -1):
            self.reach("remove")
        elif event == "os.rename" and (self.inside(args[0]) or self.inside(args[1])):
            self.reach("rename")

    def open_file(self, path, mode="r", *args, **kwargs):
        file = self.open(path, mode, *args, **kwargs)
        if set(mode) & set("wxa") and self.inside(path):
            write, written = file.write, bytearray()

            def reach_and_write(content):
                data = content.encode() if isinstance(content, str) else bytes(content)
                self.reach(Path(path).name, path, data, before=bytes(written))
                written.extend(data)
                return write(content)

            file.write = reach_and_write
        return file

    def copy(self, source, target, **kwargs):
        if self.inside(target):
            self.reach(Path(target).name, target, Path(source).read_bytes())
        return self.copyfile(source, target, **kwargs)

    def save(self, value, path, *args, **kwargs):
        content = io.BytesIO()
        self.torch_save(value, content, *args, **kwargs)
        self.reach(Path(path).name, path, content.getvalue())
        self.torch_save(value, path, *args, **kwargs)

    def save_safetensors(self, tensors, path, metadata=None):
        self.reach(Path(path).name, path, safetensors.torch.save(tensors, metadata))
        safetensors.torch.save_file(tensors, path, metadata)


def in_child(target, *args):
    """Runs ``target`` in a fork of a process that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=args)
    process.start()
    process.join(300)
    assert process.exitcode == 0


def killed_everywhere(target, folder, left, *args):
    """Runs ``target(folder, left, *args)``; each change that it made, and what was left then."""
    in_child(target, folder, left, *args)
    return [(path.name.partition("-")[2], path) for path in sorted(left.iterdir())]


def resume_and_die(folder, left, parts):
    torch.set_num_threads(1)
    trainer = LRQATTrainer(**parts, callbacks=[Stop(3)])
    KilledAtEveryWrite(folder, left)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


@pytest.mark.parametrize(
    ("present", "limit", "found"),
    [((1, 2), None, [2, 3]), ((1, 2), 1, [2, 3]), ((2, 3), None, [3, 2, 3])],
    ids=["keep-all", "keep-one", "write-over"],
)
def test_killed_while_writing_a_checkpoint(
    make_parts, make_trainer, present, limit, found, uninterrupted, tmp_path
):
    """The last checkpoint is always whole, and the run that resumes from it ends the same."""
    whole, source = uninterrupted(max_steps=4)
    fields = {"max_steps": 4, "save_total_limit": limit}
    for step in present:
        shutil.copytree(source / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    reached, last, recovered = set(), [], {}
    for what, folder in killed_everywhere(
        resume_and_die,
        tmp_path / "run",
        tmp_path / "left",
        make_parts(tmp_path / "run", **fields),
    ):
        reached.add(what)
        assert all(why_incomplete(path) is None for path in folder.glob("checkpoint-*"))
        assert last_complete_checkpoint(folder) == get_last_checkpoint(folder)
        last.append(int(last_complete_checkpoint(folder).rpartition("-")[2]))
        # What a run does first. Where that leaves the same files behind, it goes on alike.
        tidied = Path(shutil.copytree(folder, tmp_path / "tidied" / folder.name))
        tidy_up(tidied)
        assert not (tidied / STAGING).exists()
        recovered.setdefault(frozenset(tree(tidied).items()), folder)
    assert {*FILES, "mkdir", "rename", "remove"} <= reached
    assert [step for step, _ in itertools.groupby(last)] == found
    assert len(recovered) > 1
    for folder in recovered.values():
        trainer = make_trainer(folder, **fields)
        trainer.train(resume_from_checkpoint=True)
        assert_same(outcome(trainer), whole)
        assert not (folder / STAGING).exists()
        if limit == 1:
            assert names_in(folder) == ["checkpoint-4"]


def tidy_and_die(folder, left):
    KilledAtEveryWrite(folder, left)
    tidy_up(folder)


def test_killed_while_tidying_up(checkpoint, tmp_path):
    """A checkpoint that had been set aside survives that, too."""
    content, run = tree(checkpoint), tmp_path / "untidy"
    for name in ("checkpoint-2.replaced", "checkpoint-2", "checkpoint-1.deleted"):
        shutil.copytree(checkpoint, run / STAGING / name)
    reached = []
    for what, folder in killed_everywhere(tidy_and_die, run, tmp_path / "left"):
        reached.append(what)
        tidy_up(folder)
        assert names_in(folder) == ["checkpoint-2"]
        assert tree(folder / "checkpoint-2") == content
    assert reached.count("rename") == 1
    assert reached.count("remove") == 2 * (len(FILES) + 1) + 1


def save_and_die(folder, left, parts):
    torch.set_num_threads(1)
    trainer = LRQATTrainer(**parts)
    KilledAtEveryWrite(folder, left)
    trainer.save_model()


@pytest.mark.parametrize("alpha", [2, 4], ids=["same-config", "other-config"])
def test_killed_while_saving_over_an_adapter(
    make_base, make_model, make_parts, make_trainer, alpha, tmp_path
):
    """Each file is the old or the new one, and weights are never read with the config of others."""
    new_folder, left = tmp_path / "new", tmp_path / "left"
    make_trainer(new_folder).save_model()
    old = tree(new_folder)
    model = make_model(lora_alpha=alpha)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lrqat_B." in name:
                parameter.fill_(0.5)
    points = killed_everywhere(save_and_die, new_folder, left, make_parts(new_folder, model=model))
    new, name = tree(new_folder), "adapter_model.safetensors"
    alphas = {old[name]: 2, new[name]: alpha}
    assert len(alphas) == 2
    refused = loaded = 0
    seen = {}
    for _, folder in points:
        found = {
            path: digest for path, digest in tree(folder).items() if not path.startswith(STAGING)
        }
        seen.setdefault(frozenset(found.items()), (found, folder))
    for found, folder in seen.values():
        assert all(digest in (old[path], new[path]) for path, digest in found.items())
        if "adapter_config.json" in found:
            loaded += 1
            model = PeftModel.from_pretrained(make_base("classifier"), str(folder))
            assert model.peft_config["default"].lora_alpha == alphas[found[name]]
            assert_same(adapter_of(model), saved_adapter(folder))
        else:
            refused += 1
            with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
                PeftModel.from_pretrained(make_base("classifier"), str(folder))
        assert old.keys() - found.keys() <= {"adapter_config.json"}
    assert {*old, "rename", "mkdir", "remove"} <= {what for what, _ in points}
    assert loaded > 1
    assert (refused > 0) == (alpha != 2)
    # And again over the last of those.
    make_trainer(folder).save_model()
    assert set(names_in(folder)) == set(old)


# No space left


def run_with_small_files(parts, limit, answer):
    """No file may grow beyond ``limit`` bytes after step 2."""

    class Limit(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    torch.set_num_threads(1)
    trainer = LRQATTrainer(**parts, callbacks=[Limit()])
    try:
        trainer.train()
    except RuntimeError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(answer).write_text(str(error))


@pytest.mark.parametrize(
    "name", ["README.md", "adapter_model.safetensors", "rng_state.pth", "optimizer.pt"]
)
def test_full_disk(make_parts, make_trainer, name, uninterrupted, tmp_path):
    whole, source = uninterrupted(max_steps=4)
    sizes = {n: (source / "checkpoint-3" / n).stat().st_size for n in FILES}
    # Whatever comes before the largest files is smaller than they are.
    limit = (
        sizes[name] - 1
        if name in ("adapter_model.safetensors", "optimizer.pt")
        else sizes[name] // 2
    )
    folder, answer = tmp_path / "run", tmp_path / "answer"
    in_child(run_with_small_files, make_parts(folder, max_steps=4), limit, answer)
    message = answer.read_text()
    assert f"checkpoint-3 could not be written to {folder}" in message
    assert (
        f"no part of it is left. Resume from {folder / 'checkpoint-2'} once the cause is fixed"
        in message
    )
    assert names_in(folder) == ["checkpoint-1", "checkpoint-2"]
    assert all(why_incomplete(path) is None for path in folder.iterdir())
    trainer = make_trainer(folder, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), whole)


def test_checkpoint_that_cannot_take_its_place_leaves_the_older_one_of_its_name(
    make_trainer, checkpoint, tmp_path, monkeypatch
):
    folder, content = checkpoint.parent, tree(checkpoint)
    rename = Path.rename

    def refuse(path, target):
        if Path(target) == checkpoint and not path.name.endswith(".replaced"):
            raise OSError("no")
        return rename(path, target)

    trainer = make_trainer(folder, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RuntimeError, match=r"checkpoint-2 could not be written .*\(OSError: no\)"):
        trainer._save_checkpoint(trainer.model_wrapped, None)
    assert names_in(folder) == ["checkpoint-2"]
    assert tree(checkpoint) == content


# Half-written by others


def cut(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
@pytest.mark.parametrize(
    "name", sorted(FILES - {"README.md"})
)  # a text ends anywhere; PEFT writes it first
def test_cut_off_checkpoint_is_passed_over_and_refused(
    make_trainer, name, part, checkpoint, caplog
):
    newer = Path(shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-3")))
    cut(newer / name, part)
    assert last_complete_checkpoint(newer.parent) == str(checkpoint)
    assert f"{newer} is skipped: {name} is not whole (" in caplog.text
    trainer = make_trainer(newer.parent, max_steps=4)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(
        ValueError, match=rf"checkpoint-3 cannot be resumed from: {name} is not whole"
    ):
        trainer.train(resume_from_checkpoint=str(newer))
    assert_same(trainer.model.state_dict(), before)


@pytest.mark.parametrize("name", sorted(FILES - {"README.md", "training_args.bin"}))
def test_checkpoint_with_a_file_missing_is_passed_over(make_trainer, name, checkpoint):
    (checkpoint / name).unlink()
    pattern = {"optimizer.pt": "optimizer*", "rng_state.pth": "rng_state*.pth"}.get(name, name)
    assert why_incomplete(checkpoint) == f"it has no {pattern}"
    assert last_complete_checkpoint(checkpoint.parent) is None
    trainer = make_trainer(checkpoint.parent)
    with pytest.raises(
        ValueError, match=f"no whole checkpoint in {checkpoint.parent} to resume from"
    ):
        trainer.train(resume_from_checkpoint=True)


def test_cut_off_adapter_of_several_is_found(make_model, make_trainer, tmp_path):
    model = make_model(adapters=("default", "second"))
    make_trainer(tmp_path, model=model, max_steps=1).train()
    second = tmp_path / "checkpoint-1" / "second"
    assert why_incomplete(second.parent) is None
    cut(second / "adapter_model.safetensors", 0.5)
    assert why_incomplete(second.parent).startswith("second/adapter_model.safetensors is not whole")
    (second / "adapter_config.json").unlink()
    assert why_incomplete(second.parent) == "it has no second/adapter_config.json"


def test_what_is_no_checkpoint_is_passed_over(make_trainer, tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    assert why_incomplete(tmp_path / "nowhere") == "there is no such directory"
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(
        ValueError, match="checkpoint-7 cannot be resumed from: there is no such directory"
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


# Which checkpoints stay


@pytest.mark.parametrize("limit", [1, 2])
def test_limit_keeps_the_last(make_trainer, limit, tmp_path):
    make_trainer(tmp_path, max_steps=4, save_total_limit=limit).train()
    assert names_in(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)][-limit:]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, 1, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (1, None, [2]),
        (1, 1, [1, 2]),
        (1, 2, [2]),
        (2, None, [2, 4]),
        (2, 3, [2, 3]),
        (3, 1, [1, 2, 4]),
        (9, None, [1, 2, 3, 4]),
    ],
)
def test_just_written_and_best_stay_whatever_their_numbers(limit, best, left, tmp_path):
    """Step 2 is written last, over a run that went to step 4."""
    for age, step in enumerate([2, 4, 3, 1]):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (1e9 - age, 1e9 - age))
    delete_older(tmp_path / "checkpoint-2", limit, best and str(tmp_path / f"checkpoint-{best}"))
    assert names_in(tmp_path) == [f"checkpoint-{step}" for step in left]


@pytest.mark.parametrize("strategy", ["steps", "best"])
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_best_model_is_loaded_at_the_end(make_model, make_trainer, limit, strategy, tmp_path):
    fields = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_strategy": strategy,
    }
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}
    trainer = make_trainer(
        tmp_path,
        callbacks=[SetEvalLoss(losses)],
        max_steps=4,
        save_total_limit=limit,
        metric_for_best_model="loss",
        **fields,
    )
    trainer.train()
    best = tmp_path / "checkpoint-2"
    steps = {"steps": [1, 2, 3, 4], "best": [1, 2]}[strategy]
    kept = {None: steps, 1: [2], 2: [2, 4] if strategy == "steps" else [1, 2]}[limit]
    assert names_in(tmp_path) == [f"checkpoint-{step}" for step in kept]
    assert trainer.state.best_model_checkpoint == str(best)
    for step in kept:
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == (
            str(best) if step > 1 else str(tmp_path / "checkpoint-1")
        )
    assert_same(adapter_of(trainer.model), saved_adapter(best))
    fresh = {name for name, p in make_model().named_parameters() if p.requires_grad}
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == fresh
    trainer.save_model()
    assert_same(saved_adapter(tmp_path), saved_adapter(best))
    assert PeftConfig.from_pretrained(str(tmp_path)).training_record["steps"] == 2


@pytest.mark.parametrize("adapters", [("mine",), ("default", "second")], ids="-".join)
def test_best_model_of_any_name_is_loaded(make_model, make_trainer, adapters, tmp_path):
    model = make_model(adapters=adapters)
    model.set_adapter(adapters[-1])
    fields = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "max_steps": 3,
    }
    trainer = make_trainer(
        tmp_path, model=model, callbacks=[SetEvalLoss({1: 1.0, 2: 2.0, 3: 3.0})], **fields
    )
    trainer.train()
    assert model.active_adapters == [adapters[-1]]
    for name in adapters:
        folder = tmp_path / "checkpoint-1" / ("" if name == "default" else name)
        assert_same(adapter_of(model, name), saved_adapter(folder))


def test_new_run_among_another_runs_checkpoints_is_refused(make_trainer, checkpoint, tmp_path):
    """Resuming from elsewhere is a new run there, too."""
    content = tree(checkpoint.parent)
    other = shutil.copytree(checkpoint, tmp_path / "other" / "checkpoint-2")
    for resume in (None, False, str(other)):
        trainer = make_trainer(checkpoint.parent, max_steps=4)
        with pytest.raises(ValueError, match=r"holds `checkpoint-2` of an earlier run\. Continue"):
            trainer.train(resume_from_checkpoint=resume)
    assert tree(checkpoint.parent) == content


def test_new_run_overwrites_when_told_to(make_trainer, uninterrupted, checkpoint):
    """Nothing of the old run is left, not even later checkpoints, from the first step on."""
    _, source = uninterrupted(max_steps=4)
    shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-9"))
    with (checkpoint / "README.md").open("a") as file:
        file.write("of the old run")
    fields = {"max_steps": 4, "overwrite_checkpoints": True}
    with pytest.raises(InterruptedError):
        make_trainer(checkpoint.parent, callbacks=[Stop(0, "error")], **fields).train()
    assert names_in(checkpoint.parent) == []
    make_trainer(checkpoint.parent, callbacks=[Stop(3)], **fields).train()
    assert names_in(checkpoint.parent) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for step in (1, 2, 3):
        one, two = checkpoint.with_name(f"checkpoint-{step}"), source / f"checkpoint-{step}"
        assert set(names_in(one)) == FILES
        assert_same(saved_adapter(one), saved_adapter(two))
        assert (one / "README.md").read_text() == (two / "README.md").read_text()


def test_later_checkpoints_are_set_aside_by_a_run_from_an_earlier_one(
    make_trainer, uninterrupted, checkpoint, caplog
):
    """The last checkpoint is then this run's last, whenever it is stopped."""
    whole, source = uninterrupted(max_steps=4)
    for step in (3, 4):
        shutil.copytree(source / f"checkpoint-{step}", checkpoint.with_name(f"checkpoint-{step}"))
    content = tree(source / "checkpoint-4")
    trainer = make_trainer(checkpoint.parent, max_steps=4, callbacks=[Stop(2, "error")])
    with pytest.raises(InterruptedError):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    aside = checkpoint.with_name(SET_ASIDE) / "1"
    assert f"`checkpoint-3`, `checkpoint-4` of an earlier run are now in {aside}" in caplog.text
    assert last_complete_checkpoint(checkpoint.parent) == str(checkpoint)
    assert tree(aside / "checkpoint-4") == content
    trainer = make_trainer(checkpoint.parent, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert_same(outcome(trainer), whole)
    assert names_in(checkpoint.parent) == [
        SET_ASIDE,
        *[f"checkpoint-{step}" for step in (2, 3, 4)],
    ]


def test_a_second_training_sets_the_first_ones_checkpoints_aside(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train()
    first = tree(tmp_path)
    trainer.args.max_steps = 2
    trainer.train()
    trainer.train()
    assert names_in(tmp_path) == [SET_ASIDE, "checkpoint-1", "checkpoint-2"]
    assert tree(tmp_path / SET_ASIDE / "1") == first
    assert names_in(tmp_path / SET_ASIDE / "2") == ["checkpoint-1", "checkpoint-2"]


# A run that is over


@pytest.mark.parametrize("fields", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}])
def test_resuming_a_run_that_is_over_changes_nothing(make_trainer, fields, tmp_path, caplog):
    """In the middle of an epoch and at its end: no tensor, no file, and the record stays."""
    fields = {**fields, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, **fields)
    trainer.train()
    steps, whole = trainer.state.global_step, outcome(trainer)
    record = trainer.model.peft_config["default"].training_record
    files = tree(tmp_path)
    again = make_trainer(tmp_path, **fields)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps
    assert_same(outcome(again), whole)
    assert tree(tmp_path) == files
    assert again.model.peft_config["default"].training_record == record
    assert record["metrics"].keys() == {"eval_loss"}
    checkpoint = tmp_path / f"checkpoint-{steps}"
    assert f"resuming from step {steps} of {steps} ({checkpoint}); this run is over" in caplog.text


def test_fewer_steps_than_the_checkpoint_has_are_over_too(make_trainer, checkpoint, caplog):
    trainer = make_trainer(checkpoint.parent, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert_same(adapter_of(trainer.model), saved_adapter(checkpoint))
    assert f"resuming from step 2 of 1 ({checkpoint}); this run is over" in caplog.text


# Of another run


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 4}, "r is 2 there and 4 here"),
        ({"lora_alpha": 4}, "lora_alpha is 2 there and 4 here"),
        ({"bits": 3, "r": 1}, "bits is 4 there and 3 here; r is 2 there and 1 here"),
        (
            {"target_modules": ["q_proj"]},
            r"target_modules is \['.*\.v_proj'\] there and \['q_proj'\] here",
        ),
    ],
    ids=str,
)
def test_another_config_is_refused(make_model, make_trainer, fields, named, checkpoint):
    trainer = make_trainer(checkpoint.parent, model=make_model(**fields))
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(
        ValueError,
        match=rf"checkpoint-2 holds the adapter `default` with another config: {named}\. ",
    ):
        trainer.train(resume_from_checkpoint=True)
    assert_same(trainer.model.state_dict(), before)


def test_adapter_that_is_not_there_is_refused(make_model, make_trainer, checkpoint):
    trainer = make_trainer(checkpoint.parent, model=make_model(adapters=("mine",)))
    with pytest.raises(ValueError, match="checkpoint-2 holds no adapter `mine`"):
        trainer.train(resume_from_checkpoint=True)


def test_another_base_is_refused(make_model, make_trainer, checkpoint):
    trainer = make_trainer(checkpoint.parent, model=make_model(seed=1))
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(
        ValueError, match="this is not the base model that the adapter was trained on"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert_same(trainer.model.state_dict(), before)


def test_changed_rate_is_said(make_trainer, checkpoint, caplog):
    fields = {"max_steps": 4, "save_strategy": "no"}
    make_trainer(checkpoint.parent, **fields).train(resume_from_checkpoint=True)
    assert "was asked for" not in caplog.text
    changed = {**fields, "scale_learning_rate": 3e-4, "adam_beta2": 0.5}
    make_trainer(checkpoint.parent, **changed).train(resume_from_checkpoint=True)
    assert (
        "`scale_learning_rate` is 0.0001 in the checkpoint, but 0.0003 was asked for" in caplog.text
    )
    assert (
        "`betas` of the group `A` is (0.9, 0.95) in the checkpoint, but (0.9, 0.5) was asked for"
        in caplog.text
    )
    assert "`A_learning_rate`" not in caplog.text


def test_changed_rate_is_said_in_a_plain_trainer(args_in, make_model, make_rows, tmp_path, caplog):
    def train(resume, **rates):
        trainer = transformers.Trainer(
            model=make_model(),
            args=args_in(tmp_path, transformers.TrainingArguments, max_steps=2, **SAVED),
            train_dataset=make_rows(),
            optimizer_cls_and_kwargs=(
                LRQATOptimizerFactory,
                {"lr": 1e-3, "scale_lr": 1e-5, **rates},
            ),
        )
        trainer.train(resume_from_checkpoint=resume)

    train(None)
    train(str(tmp_path / "checkpoint-1"))
    assert "was asked for" not in caplog.text
    train(str(tmp_path / "checkpoint-1"), lr_B=2e-3)
    assert "`B_learning_rate` is 0.001 in the checkpoint, but 0.002 was asked for" in caplog.text


def test_other_parameter_groups_are_refused(make_model, make_trainer, checkpoint):
    model = make_model()
    for name, parameter in model.named_parameters():
        if ".lrqat_scale." in name:
            parameter.requires_grad_(False)
    trainer = make_trainer(checkpoint.parent, model=model)
    groups = (
        r"the parameter groups \['A', 'B', 'scales', 'other'\], but this one has "
        r"\['A', 'B', 'other'\]"
    )
    with pytest.raises(ValueError, match=f"the checkpoint's optimizer has {groups}"):
        trainer.train(resume_from_checkpoint=True)
