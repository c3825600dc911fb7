"""Publishing through the genuine client to a stand-in for the Hub, and loading back from there in
another process.
"""

import inspect
import json
import urllib.error
import urllib.request

import pytest
import torch
import yaml
from hub_server import StandInHub, run_client
from peft import PeftModel, get_peft_model
from safetensors.torch import load, load_file

import peft_lrqat
from peft_lrqat.hub import override_push_to_hub
from peft_lrqat.shared.card import BEGIN, END


RECORD = {"steps": 7, "settings": {"learning_rate": 0.005}, "metrics": {"eval_perplexity": 15.37}}


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def titles(repo):
    """The commits of the clients; the first one of every repository is the Hub's."""
    return [commit.title for commit in repo.commits[1:]]


# The stand-in itself


CLIENT = """
import json
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import *
api, results = HfApi(), {}
api.create_repo("user/files", exist_ok=True)
api.create_repo("user/files", exist_ok=True)
try:
    api.create_repo("user/files")
except HfHubHTTPError as error:
    results["again"] = error.response.status_code
folder = Path("folder")
(folder / "sub").mkdir(parents=True)
(folder / "notes.txt").write_bytes(b"one\\r\\ntwo")
(folder / "empty.txt").write_bytes(b"")
(folder / "sub" / "big.safetensors").write_bytes(bytes(range(256)) * 5000)
commit = api.upload_folder(folder_path=folder, repo_id="user/files", commit_message="three files")
results["same"] = api.upload_folder(folder_path=folder, repo_id="user/files").oid == commit.oid
back = Path(snapshot_download("user/files"))
results["equal"] = {
    str(p.relative_to(folder)): p.read_bytes() == (back / p.relative_to(folder)).read_bytes()
    for p in folder.rglob("*") if p.is_file()
}
results["sha"] = [api.model_info("user/files").sha == commit.oid, back.name == commit.oid]
results["revision"] = api.file_exists("user/files", "notes.txt", revision=commit.oid)
api.create_branch("user/files", branch="other")
api.delete_file("notes.txt", "user/files", revision="other")
results["branches"] = [
    sorted(api.list_repo_files("user/files", revision=r)) for r in ("main", "other")
]
results["pr"] = api.upload_file(
    path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="user/files", create_pr=True
).pr_num
results["user"] = api.whoami()["name"]
for name, call in {
    "no repo": lambda: api.model_info("user/none"),
    "no file": lambda: api.hf_hub_download("user/files", "none.txt"),
    "no revision": lambda: api.hf_hub_download("user/files", "notes.txt", revision="none"),
    "upload to no repo": lambda: api.upload_file(
        path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="user/none"),
    "download from no repo": lambda: api.hf_hub_download("user/none", "notes.txt"),
    "another's name": lambda: api.create_repo("somebody/files"),
    "wrong token": lambda: api.create_repo("user/stolen", token="hf_wrong"),
    "wrong token, reading": lambda: api.model_info("user/files", token="hf_wrong"),
    "no token": lambda: api.create_repo("user/stolen", token=False),
    "card": lambda: api.upload_file(
        path_or_fileobj=b"---\\nbase_model: /srv/base\\n---\\n",
        path_in_repo="README.md", repo_id="user/files"),
}.items():
    try:
        call()
        results[name] = None
    except Exception as error:
        code = getattr(getattr(error, "response", None), "status_code", "")
        results[name] = f"{type(error).__name__} {code} {error}"
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """What the client reports of the stand-in, and the stand-in.

    The first upload of a file fails for a moment.
    """
    with StandInHub() as hub:
        hub.fail("PUT /lfs/user/files/", 503, times=1)
        yield json.loads(run_client(hub, CLIENT, tmp_path_factory.mktemp("client"))), hub


def test_files_come_back_as_they_were_uploaded(client):
    results, hub = client
    assert results["equal"] == {"notes.txt": True, "empty.txt": True, "sub/big.safetensors": True}
    assert results["sha"] == [True, True]
    assert results["revision"] is results["same"] is True
    repo = hub.repos["user/files"]
    assert titles(repo)[0] == "three files"
    assert [blob.lfs for _, blob in sorted(repo.at("main").files.items())] == [
        False,
        False,
        False,
        True,
    ]
    assert hub.unknown == []


def test_branches_and_pull_requests(client):
    results, hub = client
    files = [".gitattributes", "empty.txt", "notes.txt", "sub/big.safetensors"]
    assert results["branches"] == [files, [f for f in files if f != "notes.txt"]]
    assert results["pr"] == 1
    assert "x.txt" in hub.repos["user/files"].at("refs/pr/1").files
    assert results["user"] == "user"


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("no repo", "RepositoryNotFoundError 404"),
        ("upload to no repo", "RepositoryNotFoundError 404"),
        ("download from no repo", "RepositoryNotFoundError 404"),
        ("no file", "RemoteEntryNotFoundError 404"),
        ("no revision", "RevisionNotFoundError 404"),
        ("another's name", "HfHubHTTPError 403"),
        ("wrong token", "HfHubHTTPError 401"),
        ("wrong token, reading", "HfHubHTTPError 401"),
        ("no token", "HfHubHTTPError 401"),
        (
            "card",
            "ValueError  Invalid metadata in README.md.\n"
            '- "base_model" with value "/srv/base" is not valid',
        ),
    ],
)
def test_refusals_are_those_of_the_hub(call, answer, client):
    results, hub = client
    assert results[call].startswith(answer)
    assert list(hub.repos) == ["user/files"]


def test_transient_failure_is_tried_again(client):
    results, hub = client
    assert results["again"] == 409
    puts = [line for line in hub.requests if line.startswith("PUT /lfs/")]
    assert len(puts) == 2
    assert puts[0] == puts[1]


def test_damaged_upload_is_refused(client):
    _, hub = client
    request = urllib.request.Request(
        f"{hub.endpoint}/lfs/user/files/{'0' * 64}?size=3", data=b"abc", method="PUT"
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
    assert "0" * 64 not in hub.repos["user/files"].lfs


# Publishing


PUSH = """
import json, logging, transformers
from huggingface_hub import CommitInfo, HfApi
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
import peft_lrqat

messages, results, api = [], {}, HfApi()
class Listener(logging.Handler):
    def emit(self, record):
        messages.append(record.getMessage())
logging.getLogger("peft_lrqat.hub").addHandler(Listener())

def error_of(call):
    try:
        return call() and None
    except Exception as error:
        return f"{type(error).__name__} {error}"

def base():
    return AutoModelForCausalLM.from_pretrained("base")

AutoModelForCausalLM.from_pretrained("base").push_to_hub("user/base")

# The base has a name on the Hub.
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("user/base"), "adapter")
# The adapter's file names the directory that it was trained from.
model.peft_config["default"].base_model_name_or_path = "user/base"
pushed = model.push_to_hub("user/adapter", tags=["my-tag"], commit_description="of a test")
results["pushed"] = [isinstance(pushed, CommitInfo), pushed.oid, str(pushed)]
model.add_adapter("unnamed", type(model.peft_config["default"])(task_type="CAUSAL_LM", bits=3, r=4,
    target_modules="all-linear", range_estimator="minmax"))
model.push_to_hub("user/unnamed")
results["warnings with a name"] = list(messages)

# It is a local directory; the name of the repository alone is enough.
model = PeftModel.from_pretrained(base(), "adapter")
peft_lrqat.push_to_hub(model, "of-directory", private=True)
results["warnings of a directory"] = list(messages)

# A person edits the card, and the adapter is pushed again, with other bits in its history.
card = api.hf_hub_download("user/of-directory", "README.md")
text = open(card).read().replace("# Model Card", "# My Card", 1)
text = text.replace("tags:", "tags:\\n- by-hand\\n- 8-bit", 1)
other = "base_model: user/base\\nlanguage: en\\nlibrary_name: other"
text = text.replace("library_name: peft", other, 1)
text = text.replace("## LR-QAT adapter", "## Old section") + "\\n## My evaluation\\n\\nfine\\n"
card = {"path_in_repo": "README.md", "repo_id": "user/of-directory"}
api.upload_file(path_or_fileobj=text.encode(), **card)
model.peft_config["default"].training_record = {"steps": 9}
model.push_to_hub("user/of-directory", commit_message="second push")
model.push_to_hub("user/of-directory", revision="trial", tags=["trial"])
results["pr"] = model.push_to_hub(
    "user/of-directory", create_pr=True, tags=["pr"], max_shard_size="1MB"
).pr_num
api.upload_file(
    path_or_fileobj=b"---\\n[\\n---\\n", path_in_repo="README.md", repo_id="user/of-directory",
    revision="trial",
)
results["broken card"] = error_of(lambda: model.push_to_hub("user/of-directory", revision="trial"))
# A Hub that does not answer has not said that there is no card.
results["no answer"] = error_of(lambda: model.push_to_hub("user/unanswered"))

# Two adapters, and adapters without a default one.
model.load_adapter("adapter", "second")
model.push_to_hub("user/two")
model.delete_adapter("default")
model.push_to_hub("user/named")

# What is refused.
lora = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
results["lora refused"] = error_of(lambda: peft_lrqat.push_to_hub(lora, "user/refused"))
results["base refused"] = error_of(lambda: peft_lrqat.push_to_hub(base(), "user/refused"))
model = PeftModel.from_pretrained(base(), "adapter")
results["tags refused"] = error_of(lambda: model.push_to_hub("user/refused", tags="one"))
results["interrupted"] = error_of(lambda: model.push_to_hub("user/interrupted"))
for value in ("nan", "inf"):
    parameters = dict(model.named_parameters())
    name = next(n for n in parameters if "lrqat_B" in n)
    parameters[name].data[0, 0] = float(value)
    results[value] = error_of(lambda: model.push_to_hub("user/refused"))
results["name"] = name.replace(".default", "")

# LoRA goes where it went before.
base = AutoModelForCausalLM.from_pretrained("user/base")
lora = get_peft_model(base, lora.peft_config["default"])
lora.push_to_hub("user/lora", tags=["my-tag"])
transformers.utils.PushToHubMixin.push_to_hub(lora, "user/lora-directly", tags=["my-tag"])
print(json.dumps(results))
"""

LOAD = """
import json, torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
import peft_lrqat
from safetensors.torch import save_file
results = {}
loaders = {
    "adapter": lambda: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("base"), "user/adapter"),
    "of-directory": lambda: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("base"), "user/of-directory"),
    "auto": lambda: AutoPeftModelForCausalLM.from_pretrained("user/adapter"),
    "second": lambda: PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("user/base"), "user/named", subfolder="second"),
}
for name, loader in loaders.items():
    model = loader().eval()
    with torch.no_grad():
        results[name] = torch.equal(model(**torch.load("batch.pt")).logits, torch.load("logits.pt"))
    state = {n: p.detach().contiguous() for n, p in model.named_parameters() if ".lrqat_" in n}
    save_file(state, f"{name}.safetensors")
results["record"] = PeftConfig.from_pretrained("user/adapter").training_record
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_base, make_config, disturb, batch_for):
    """A base model, a trained adapter, and the logits that both give together."""
    folder = tmp_path_factory.mktemp("publish")
    base = make_base()
    base.save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = disturb(get_peft_model(base, make_config(bits=3, training_record=RECORD)).eval())
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        torch.save(model(**batch_for()).logits, folder / "logits.pt")
    torch.save(batch_for(), folder / "batch.pt")
    return folder


@pytest.fixture(scope="module")
def pushed(folder):
    """What one process reports that pushes all of the models, and the Hub after it."""
    with StandInHub() as hub:
        hub.fail("PUT /lfs/user/interrupted/", 403)  # as an upload address that has expired
        hub.fail("HEAD /user/unanswered/", 501)  # the client would wait for 500 to pass
        yield json.loads(run_client(hub, PUSH, folder)), hub


@pytest.fixture(scope="module")
def loaded(folder, pushed):
    """What another process reports that loads them from the Hub, with an empty cache."""
    return json.loads(run_client(pushed[1], LOAD, folder))


@pytest.mark.parametrize("name", ["adapter", "of-directory", "auto", "second"])
def test_adapter_comes_back_bit_for_bit(name, folder, loaded):
    assert loaded[name] is True
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    back = load_file(folder / f"{name}.safetensors")
    assert len(back) == sum(".lrqat_fingerprint" not in n for n in saved) > 0
    for key, value in back.items():
        assert torch.equal(value, saved[key.replace(".default", "")])


def test_published_file_is_the_saved_one(folder, pushed):
    published = pushed[1].repos["user/adapter"].files["adapter_model.safetensors"]
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert load(published).keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in load(published).items())


def test_result_and_commit_are_those_of_transformers(pushed):
    results, hub = pushed
    repo = hub.repos["user/adapter"]
    (commit,) = repo.commits[1:]
    assert (commit.title, commit.description) == ("Upload model", "of a test")
    assert results["pushed"] == [
        True,
        commit.oid,
        f"{hub.endpoint}/user/adapter/commit/{commit.oid}",
    ]
    assert sorted(repo.files) == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not repo.private
    assert hub.unknown == []


def test_published_card_says_how_to_load(pushed, loaded):
    card = pushed[1].repos["user/adapter"].files["README.md"].decode()
    data = metadata(card)
    assert data["library_name"] == "peft"
    assert data["base_model"] == "user/base"
    assert {
        "3-bit",
        "lr-qat",
        "peft_lrqat",
        "my-tag",
        "transformers",
        "base_model:adapter:user/base",
    } == set(data["tags"])
    assert data["pipeline_tag"] == "text-generation"
    section = card.split(BEGIN)[1].split(END)[0]
    assert "import peft_lrqat  # registers" in section
    assert "- weights: 3 bits" in section
    assert '.from_pretrained("user/base", dtype="float32")' in section
    assert "Trained for 7 steps." in section
    assert "| learning_rate | 0.005 |" in section
    assert "| eval_perplexity | 15.37 |" in section
    assert loaded["record"] == RECORD


def test_directory_as_base_is_told_to_both_sides(folder, pushed):
    results, hub = pushed
    assert results["warnings with a name"] == []
    assert (
        metadata(hub.repos["user/unnamed"].files["unnamed/README.md"].decode())["base_model"]
        == "user/base"
    )
    assert len(results["warnings of a directory"]) == 1
    assert "base model with the same weights" in results["warnings of a directory"][0]
    repo = hub.repos["user/of-directory"]
    card = repo.commits[1].files["README.md"].content.decode()
    assert "base_model" not in card.split("---")[1]
    assert "must supply a model with the same weights" in card
    assert str(folder) not in card
    assert repo.private


def test_second_push_keeps_what_a_person_wrote(pushed):
    repo = pushed[1].repos["user/of-directory"]
    assert titles(repo)[2] == "second push"
    card = repo.files["README.md"].decode()
    assert (
        card.count("# My Card")
        == card.count("## My evaluation\n\nfine")
        == card.count("## LR-QAT adapter")
        == 1
    )
    assert "Old section" not in card
    assert "Trained for 9 steps." in card
    assert "15.37" not in card
    data = metadata(card)
    assert {"by-hand", "3-bit"} < set(data["tags"])
    assert "8-bit" not in data["tags"]
    assert (data["library_name"], data["base_model"], data["language"]) == (
        "peft",
        "user/base",
        "en",
    )


def test_branches_start_from_the_published_card(pushed):
    results, hub = pushed
    repo = hub.repos["user/of-directory"]
    assert results["pr"] == 1
    for commit in repo.commits[4:6]:
        assert "## My evaluation" in commit.files["README.md"].content.decode()
    assert "pr" in metadata(repo.at("refs/pr/1").files["README.md"].content.decode())["tags"]
    assert "pr" not in metadata(repo.files["README.md"].decode())["tags"]
    assert results["broken card"].startswith(
        "ValueError the metadata of a card must be YAML, but those of `README.md` in"
    )
    assert len(repo.commits) == 7


def test_adapters_with_names_of_their_own(pushed):
    two, named = (pushed[1].repos[name].files for name in ("user/two", "user/named"))
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(two) == sorted([".gitattributes", *files, *[f"second/{f}" for f in files]])
    assert sorted(named) == sorted([".gitattributes", "README.md", *[f"second/{f}" for f in files]])
    for files in (two, named):
        for card in (files["README.md"].decode(), files["second/README.md"].decode()):
            assert card.count("import peft_lrqat") == 1
            assert "base_model" not in card.split("---")[1]
    assert 'subfolder="second"' in named["README.md"].decode()
    assert "subfolder" not in two["README.md"].decode()


def test_refusals_leave_nothing_on_the_hub(pushed):
    results, hub = pushed
    for value in ("nan", "inf"):
        assert results[value].startswith("ValueError an adapter must be finite")
        assert f"`{results['name']}`" in results[value]
    assert "LRQAT, but has {'default': 'PeftType.LORA'}" in results["lora refused"]
    assert "LRQAT, but has LlamaForCausalLM" in results["base refused"]
    assert (
        results["tags refused"]
        == "ValueError `tags` must be a list of strings, but is 'one'; use ['one']"
    )
    assert results["no answer"].startswith("LocalEntryNotFoundError")
    assert {"user/refused", "user/unanswered"}.isdisjoint(hub.repos)


def test_interrupted_upload_leaves_no_commit(pushed):
    results, hub = pushed
    assert "Error while uploading 'adapter_model.safetensors'" in results["interrupted"]
    repo = hub.repos["user/interrupted"]
    assert titles(repo) == []
    assert list(repo.files) == [".gitattributes"]


def test_other_types_go_where_they_went_before(pushed):
    repos = pushed[1].repos
    through, directly = repos["user/lora"].files, repos["user/lora-directly"].files
    assert through == directly
    assert metadata(through["README.md"].decode())["library_name"] == "transformers"
    assert b"peft_lrqat" not in through["README.md"]


def test_method_keeps_its_signature_and_is_put_in_place_once():
    method = PeftModel.push_to_hub
    inherited = method.__wrapped__
    assert inspect.signature(method) == inspect.signature(inherited)
    assert method.__doc__ == inherited.__doc__
    override_push_to_hub()
    assert PeftModel.push_to_hub is method
    ours = inspect.signature(peft_lrqat.push_to_hub)
    assert list(ours.parameters)[1:] == list(inspect.signature(inherited).parameters)[1:]
    for name, parameter in list(inspect.signature(inherited).parameters.items())[1:]:
        assert (ours.parameters[name].default, ours.parameters[name].kind) == (
            parameter.default,
            parameter.kind,
        )
