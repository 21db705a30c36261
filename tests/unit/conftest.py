"""What several unit tests read: a small random model, and a corpus of its tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from midiscover.config import ModelConfig
from midiscover.corpus import Corpus
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.store.storage import open_store
from tests.tiny import make_tiny_model
from tests.unit.test_harvest import tiny_corpus


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")
    return LanguageModel.load(resolve_model(ModelConfig(id=str(folder))), dtype="float32")


@pytest.fixture
def corpus(tmp_path: Path, model: LanguageModel) -> Corpus:
    return tiny_corpus(tmp_path, model, open_store(str(tmp_path / "store")))
