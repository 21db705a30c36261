"""Wrong input: one clear sentence, exit code 2, in under five seconds, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs_cli import midiscover
from tests.ports import free_port
from tests.runs import write_run
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.alone

SECONDS = 5.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_run(folder)
    make_tiny_model("gpt2", folder / "unused")
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").write_text("")
    (folder / "file").write_text("x")
    # The table of hooks is made once per model and then read; the first time is not what is timed here.
    assert midiscover("inspect", str(folder / "model-llama")).code == 0
    return folder


CASES: dict[str, tuple[list[str], str]] = {
    "unknown verb": (["tain"], "'tain' is no verb"),
    "no config": (["sweep"], "required: CONFIG"),
    "absent config": (["sweep", "absent.yaml"], "There is no config file 'absent.yaml'"),
    "unknown key": (["sweep", "run.yaml", "--train.lrr", "1"], "did you mean 'lr'"),
    "wrong type": (["sweep", "run.yaml", "--sae.l1_coefficient", "much"], "it must be a number"),
    "wrong sign": (["sweep", "run.yaml", "--sae.l1_coefficient=-1"], "must be 0 or above"),
    "wrong width": (["sweep", "run.yaml", "--sae.d_sae", "0"], "above 0"),
    "unknown model": (["sweep", "run.yaml", "--model.id", "./no/such/model"], "no/such/model"),
    "unknown hub model": (["sweep", "run.yaml", "--model.id", "nobody/nothing-here"], "nobody/nothing-here"),
    "unknown stored model": (["sweep", "run.yaml", "--model.id", "store:nope", "--store", "made"], "no model 'nope'"),
    "push of no model": (["model", "push", "./no/such/model", "--store", "new"], "no/such/model"),
    "no such hook": (["sweep", "run.yaml", "--harvest.hooks", "model.layers.0.mlp.down_prj"], "down_proj"),
    "layer out of range": (["sweep", "run.yaml", "--harvest.hooks", "model.layers.99.mlp"], "layers 0 to 2"),
    "missing corpus": (["sweep", "run.yaml", "--corpus.source", "./nothing.jsonl"], "nothing.jsonl"),
    "empty corpus": (["sweep", "run.yaml", "--corpus.source", "empty.jsonl"], "empty.jsonl"),
    "empty folder": (["sweep", "run.yaml", "--corpus.source", "empty"], "empty"),
    "no bucket": (["sweep", "run.yaml", "--store", "s3://"], "names no bucket"),
    "no credentials": (["sweep", "run.yaml", "--store", "s3://bucket/prefix"], "credentials"),
    "store is a file": (["sweep", "run.yaml", "--store", "file"], "is a file"),
    "unknown scheme": (["sweep", "run.yaml", "--store", "gs://bucket"], "unknown scheme"),
    "unknown id": (["runs", "show", "nothing", "--store", "made"], "nothing"),
    "no hook": (["train", "--l1", "3"], "--hook is missing"),
    "two sparsities": (["train", "--hook", "a", "--l1", "3", "--k", "3"], "exclude each other"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(folder: Path, name: str) -> None:
    arguments, sentence = CASES[name]
    (folder / "made").mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    arguments = [*arguments, "--store", "new"] if arguments[0] == "sweep" and "--store" not in arguments else arguments
    env = {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/none",
    }
    done = midiscover(*arguments, cwd=folder, env=env)
    assert done.code == 2, done
    assert sentence in done.err
    assert done.err.count("\n") <= 2
    assert "Traceback" not in done.err
    assert done.out == ""
    assert done.seconds < SECONDS
    left = [path for path in sorted(folder.rglob("*")) if path not in before]
    assert [
        path for path in left if path.name not in ("tracker.db", "tracker.db-shm", "tracker.db-wal", "tracker.db.lock")
    ] == []


@pytest.mark.parametrize(
    ("hook", "sentence"),
    [
        ("model.layers.99.mlp", "layers 0 to 2"),
        ("model.layers.0.mlp.down_prj", "nearest are model.layers.0.mlp.down_proj,"),
        ("blocks.0.hook_mlp_out", "has no hook"),
    ],
)
@pytest.mark.parametrize("place", ["folder", "store"])
def test_wrong_hooks_of_a_model_that_is_new(folder: Path, tmp_path: Path, place: str, hook: str, sentence: str) -> None:
    model = str(folder / "model-llama")
    env = {"MIDISCOVER_HOME": str(tmp_path / "home"), "MIDISCOVER_STORE": str(tmp_path / "store")}
    if place == "store":
        assert midiscover("model", "push", model, cwd=folder, env=env).out == "store:model-llama\n"
        model = "store:model-llama"
    done = midiscover("config", "run.yaml", "--model.id", model, "--harvest.hooks", hook, cwd=folder, env=env)
    assert (done.code, done.out) == (2, "")
    assert sentence in done.err
    assert done.err.count("\n") == 1
    assert done.seconds < SECONDS
    # Told from the config and the names of the weights: what needs torch was not asked.
    assert not (tmp_path / "home" / "hooks").exists()


def test_a_database_that_does_not_answer(folder: Path) -> None:
    address = f"postgresql://user:secret@127.0.0.1:{free_port()}/db"
    done = midiscover("sweep", "run.yaml", "--store", "new-db", cwd=folder, env={"MIDISCOVER_DATABASE_URL": address})
    assert done.code == 2
    assert "secret" not in done.err + done.out
    assert done.seconds < SECONDS


def test_an_s3_store_that_does_not_answer(folder: Path) -> None:
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    done = midiscover("sweep", "run.yaml", "--store", "s3://bucket/x", cwd=folder, env=env)
    assert done.code == 2
    assert "secret" not in done.err
    assert done.seconds < SECONDS


def test_help_is_there_for_everyone(folder: Path) -> None:
    assert midiscover("--help", cwd=folder).code == 0
    for verb in ("inspect", "config", "harvest", "sweep", "train", "model", "runs"):
        done = midiscover(verb, "--help", cwd=folder)
        assert done.code == 0, done.err
        assert "usage" in done.out
