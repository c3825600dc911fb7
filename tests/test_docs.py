"""Every Python and shell block of README and docs runs, page by page; what cannot run says why.

The blocks of a page share one namespace and one directory, in which the names of the text exist:
`MODEL` is one layer of the demo's model, `my-lora` and `lrqat-3bit` are adapters of it, `train.txt`
and `heldout.txt` are texts, `chat.jsonl` has chats for `template.jinja`, `tasks` a task file.
`model_path()` names that layer, too: with all six, most of the time would go into the search for
scales. Training is cut to a few steps. Shell blocks may call `lrqat` only.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrqat_command import COMMANDS, main
from peft_lrqat import LRQATConfig
from peft_lrqat.demo import load_topics, model_path


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(
    r"(?:^<!--(?P<note>[^>]*)-->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
RUNS, SHOWN_ONLY = {"py", "sh"}, {"text", "json", "yaml"}
NOT_RUN = re.compile(r" not run: \S.{8,} ")
# Training is for the figures; here a few steps show that the code runs.
STEPS = re.compile(r"(max_steps[= ])\d+")
SOME_STEPS = r"\g<1>2"


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    note: str
    line: int

    @property
    def runs(self) -> bool:
        return self.language in RUNS and not NOT_RUN.fullmatch(self.note)


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = [
        Block(m["language"], m["code"], m["note"] or "", text[: m.start("code")].count("\n") + 1)
        for m in BLOCK.finditer(text)
    ]
    assert len(found) == text.count("\n```") / 2, f"{page.name}: a block that this test overlooks"
    return found


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """The directory that every page gets a copy of."""
    folder = tmp_path_factory.mktemp("places")
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(folder / "MODEL")
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder / "MODEL")
    lora = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4)
    )
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    lora.peft_config["default"].base_model_name_or_path = str(folder / "MODEL")
    lora.save_pretrained(folder / "my-lora")
    lrqat = get_peft_model(
        lora.unload(), LRQATConfig(task_type="CAUSAL_LM", target_modules="all-linear", bits=3)
    )
    lrqat.peft_config["default"].base_model_name_or_path = str(folder / "MODEL")
    lrqat.save_pretrained(folder / "lrqat-3bit")
    for split in ("train", "heldout"):  # two blocks of 512 tokens each
        (folder / f"{split}.txt").write_text("\n\n".join(load_topics(split))[:5_000])
    (folder / "TEXT").write_text((folder / "train.txt").read_text())
    answer = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": answer}) + "\n") * 20)
    question = {"question": "A list is", "choices": [" mutable", " an integer"], "answer": 0}
    (folder / "facts.jsonl").write_text((json.dumps(question) + "\n") * 4)
    (task,) = [b.code for b in blocks(ROOT / "docs" / "commands.md") if b.language == "yaml"]
    (folder / "tasks").mkdir()
    (folder / "tasks" / "facts.yaml").write_text(task)
    (folder / "template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return folder


def run_python(block: Block, page: Path, namespace: dict) -> None:
    code = "\n" * block.line + STEPS.sub(SOME_STEPS, block.code)
    exec(compile(code, page_name(page), "exec"), namespace)


def run_shell(block: Block) -> None:
    for command in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(STEPS.sub(SOME_STEPS, command), comments=True)
        if not words:
            continue
        assert words[0] == "lrqat", f"only lrqat is run here, but the block says: {command}"
        assert main(words[1:]) == 0, command


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.runs for b in blocks(p))], ids=page_name
)
@pytest.mark.filterwarnings("ignore")
def test_blocks_run(page, places, tmp_path, monkeypatch):
    disable_progress_bar()
    shutil.copytree(places, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peft_lrqat.demo.model_path", lambda: str(tmp_path / "MODEL"))
    namespace = {"__name__": "page"}
    # Dataclasses of a page look their module up.
    monkeypatch.setitem(sys.modules, "page", ModuleType("page"))
    for block in blocks(page):
        if block.runs:
            with contextlib.redirect_stdout(io.StringIO()):
                if block.language == "py":
                    run_python(block, page, namespace)
                else:
                    run_shell(block)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_block_that_does_not_run_says_why(page):
    for block in blocks(page):
        place = f"{page_name(page)}:{block.line}"
        assert block.language in RUNS | SHOWN_ONLY, f"{place}: unknown language {block.language!r}"
        if block.language in RUNS and block.note:
            assert NOT_RUN.fullmatch(block.note), f"{place}: <!--{block.note}-->"


def test_the_readme_is_for_a_person_in_a_hurry():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    quickstart = re.search(r"## Quickstart\n\n```py\n(.*?)```", text, re.S)[1]
    assert len([line for line in quickstart.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        if page.name != "index.md" and page.parent.name != "api":
            assert (page.parent / target).exists(), f"{page_name(page)}: {target}"


def test_the_command_line_page_names_every_command():
    named = set(re.findall(r"^\| `lrqat ([\w-]+)`", (ROOT / "docs/commands.md").read_text(), re.M))
    assert named == COMMANDS.keys()
