"""`word_substitution` beside TextAttack's greedy search, which TextFooler is made of."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import nn

import muroan
from muroan.attacks.base import ThreatModel
from muroan.attacks.word_substitution import WordSubstitution
from muroan.data.samples import Example, PreparedDataset, Sample
from muroan.modalities import Text, WordTokenizer
from muroan.models.base import MultimodalModel

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
if importlib.util.find_spec("textattack") is None:
    pytest.skip("make test-peers installs textattack", allow_module_level=True)

# Importing any of TextAttack imports all of it, and thus these: for taggers, other languages, grammar and data sets,
# which a search with a table of synonyms has no use for. Several cannot be installed beside current packages.
UNUSED = ["OpenHowNet", "bert_score", "datasets", "editdistance", "flair", "jieba", "langdetect", "lemminflect", "nltk"]
UNUSED += ["Levenshtein", "language_tool_python", "more_itertools", "num2words", "pandas", "pinyin", "terminaltables"]
UNUSED += ["word2number"]


class Empty(MetaPathFinder, Loader):
    """Finds the unused packages, with nothing in them."""

    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec):
        return MagicMock(name=spec.name, __path__=[], __spec__=spec)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Empty())
try:
    from textattack import Attack
    from textattack.attack_results import SuccessfulAttackResult
    from textattack.constraints.pre_transformation import RepeatModification
    from textattack.goal_functions import UntargetedClassification
    from textattack.models.wrappers import ModelWrapper
    from textattack.search_methods import GreedyWordSwapWIR
    from textattack.shared import AttackedText
    from textattack.transformations import WordSwap
finally:
    del sys.meta_path[0]
    for loaded in [name for name in sys.modules if name.split(".")[0] in UNUSED]:
        del sys.modules[loaded]

VOCABULARY = [f"w{i}" for i in range(60)]
# Two classes: with more, TextAttack ranks by the probability of the label, and MUROAN by the margin.
CLASSES = 2


class Reader(MultimodalModel):
    """Word embeddings, where their neighbours stand, and a layer. Random weights."""

    def __init__(self):
        super().__init__({"text": Text(WordTokenizer(VOCABULARY), 12)}, CLASSES)
        torch.manual_seed(0)
        self.word, self.mix = nn.Embedding(len(VOCABULARY) + 5, 16, padding_idx=0), nn.Conv1d(16, 16, 3, padding=1)
        self.classes = nn.Linear(16, CLASSES)
        nn.init.zeros_(self.classes.bias)
        self.double().eval()

    def encode(self, modality, x):
        return self.mix(self.word(x).transpose(1, 2)).tanh().mean(2)

    def fuse(self, features):
        return features["text"]

    def head(self, embedding):
        return self.classes(embedding)


class Wrapped(ModelWrapper):
    """The same model, as TextAttack asks it."""

    def __init__(self, model: Reader):
        self.model = model

    def __call__(self, texts):
        prepared = [self.model.modalities["text"].prepare(text)[0] for text in texts]
        with torch.no_grad():
            return self.model({"text": torch.stack(prepared)}).logits.softmax(1)


class Table(WordSwap):
    def __init__(self, table: dict[str, list[str]]):
        super().__init__()
        self.table = table

    def _get_replacement_words(self, word):
        return self.table[word]


def texts_of(model: Reader, count: int) -> list[Sample]:
    """Texts of different words, labelled as the model does."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(VOCABULARY[:30], rng.integers(2, 9), replace=False)) for _ in range(count)]
    labels = Wrapped(model)(texts).argmax(1).tolist()
    examples = [Example(str(i), {"text": t}, y) for i, (t, y) in enumerate(zip(texts, labels, strict=True))]
    return [s for s in PreparedDataset(examples, model.modalities, CLASSES) if isinstance(s, Sample)]


def test_the_same_words_are_replaced_as_by_textattack(tmp_path):
    model = Reader()
    rng = np.random.default_rng(1)
    drawn = {word: rng.choice(VOCABULARY[30:], rng.integers(0, 3), replace=False) for word in VOCABULARY[:30]}
    table = {word: [str(other) for other in others] for word, others in drawn.items()}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table))
    samples = texts_of(model, 200)
    records = muroan.evaluate(
        model, samples, WordSubstitution(synonyms=str(path)), threat_model=ThreatModel(max_queries=10_000)
    )
    goal = UntargetedClassification(Wrapped(model), use_cache=False)
    theirs = Attack(goal, [RepeatModification()], Table(table), GreedyWordSwapWIR("delete"))
    for sample, record in zip(samples, records, strict=True):
        words = list(sample.layouts["text"].words)
        found = theirs.attack(AttackedText(" ".join(words)), sample.label)
        assert record.flipped == isinstance(found, SuccessfulAttackResult)
        assert record.queries + 1 == found.num_queries  # the clean text is a query of theirs
        for _, place, _, new in record.info["replaced"] if record.flipped else []:
            words[place] = new
        if record.flipped:
            assert " ".join(words) == found.perturbed_text()
    assert 20 < sum(record.flipped for record in records) < 180
