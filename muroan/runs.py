"""Finished (or unfinished) attack runs as their folders tell them, and what sets them apart."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from muroan.errors import MuroanError
from muroan.metrics import summarise
from muroan.results import AttackResult, Kind, RunFolder

KINDS: dict[Kind, str] = {
    "removal": "",
    "perturbation": "value-choosing",
    "corruption": "corruption",
}  # as tables say it

# Attacks that nothing guides; runs of earlier versions do not say so.
UNGUIDED = ("random_removal", "leave_one_out", "missing_modality", "exhaustive", "swapped_modality")

READABLE = 4  # settings at most that a name tells

# Options of a dataset that have no part in training.
TESTED = ("test_limit", "test_batch_size", "visible", "root", "obtain", "skip_bad", "num_workers")


@dataclass(frozen=True)
class Run:
    """One attack on one model, as its folder tells it.

    Attributes:
        folder: its path below the folder that all runs of the report share.
        about: what `run.json` says.
        records: one a sample, in the samples' order.
        finished: whether all samples were attacked.
        where: what the attack was run on, with as much as it takes to tell it apart from the report's other runs.
    """

    folder: str
    about: dict[str, Any]
    records: list[AttackResult]
    finished: bool
    where: str = ""

    @property
    def label(self) -> str:
        """What the run is called in the report, unique in it."""
        return f"{self.attack} · {self.where}"

    @property
    def key(self) -> str:
        """What the run is known by, whatever its folder: the attack, and a hash of all that decides its records."""
        return f"{self.attack}-{str(self.about.get('fingerprint'))[:6]}"

    @property
    def attack(self) -> str:
        return str(self.about["attack"])

    @property
    def model(self) -> str:
        """The model's name, what it was hardened by, and whether what was attacked is its vote over ablations."""
        defense, smoothed = self.about.get("defense"), self.about.get("smoothed")
        name = f"{self.about['model']} + {defense}" if defense else str(self.about["model"])
        return f"{name}, smoothed" if smoothed else name

    @property
    def dataset(self) -> str:
        return str(self.about["dataset"])

    @cached_property
    def kind(self) -> Kind:
        """What the attack may do; samples that it skipped do not tell."""
        return next((r.kind for r in self.records if r.kind != "removal"), "removal")

    @property
    def is_control(self) -> bool:
        """Whether the attack removes at random: what a guided attack has to beat; see `Attack.control`."""
        return bool(self.about.get("control", self.kind == "removal" and self.attack.startswith("random")))

    @property
    def is_guided(self) -> bool:
        """Whether the attack goes by the model's answers, so that it should beat a control; see `Attack.guided`."""
        unguided = self.is_control or self.kind == "corruption" or self.attack in UNGUIDED
        return bool(self.about.get("guided", not unguided))

    @property
    def goal(self) -> str:
        """What the attack brings samples to, where it is not simply another label; see `Attack.goal`."""
        told = self.about.get("goal")
        if told is None:  # runs of earlier versions do not say
            goals = {"_targeted": "another class", "_embedding": "another fusion embedding"}
            ours = self.attack.startswith("decoupling")
            told = next((goal for part, goal in goals.items() if ours and part in self.attack), "")
        # `decoupling_fast` takes valid flips alone where the dataset can tell, and any where it cannot.
        if not told and self.options.get("valid_only") and self.judged:
            told = "another label with the old label still right"
        return str(told)

    @property
    def options(self) -> dict[str, Any]:
        """The attack's own; empty where they are not known."""
        options = self.identity.get("attack")
        return options if isinstance(options, dict) else {}

    @property
    def reach(self) -> list[str] | None:
        """The modalities that the attack was told to keep to; None where it may work on all."""
        names = set(self.options.get("modalities") or ())
        return sorted(names) if names and names < set(self.modalities) else None

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides what the records say; empty where another program wrote the run."""
        identity = self.about.get("identity")
        return identity if isinstance(identity, dict) else {}

    @property
    def hardening(self) -> dict[str, Any]:
        """What decides how the model was hardened; empty where it was not. The folder of an offline set does not."""
        config = self.about.get("config") or {}
        if not config.get("defense"):
            return {}
        defense = {key: value for key, value in config["defense"].items() if key != "folder"}
        return {"defense": defense, "hardening": config.get("hardening") or {}}

    @property
    def rules(self) -> str:
        """What two attacks must have in common to be held against each other: what they may do, and what for."""
        # Earlier versions kept it as it was typed: null for a default.
        told = self.about.get("threat_model") or self.identity.get("threat_model")
        given = {key: value for key, value in flat(told).items() if value is not None and key != "_target_"}
        return json.dumps([given, self.goal], sort_keys=True)

    def must_beat(self, control: Run) -> bool:
        """Whether a random control does the same at random: under the same rules, in the same modalities."""
        return control.is_control and self.rules == control.rules and self.reach == control.reach

    @property
    def judged(self) -> bool:
        """Whether the dataset can tell if a label is still right after a flip, also where there is none."""
        told = any(r.still_valid is not None for r in self.records)
        return bool(self.about.get("judged", told))  # runs of earlier versions do not say

    @property
    def mislabels(self) -> bool:
        """Whether all that counts as a flip is another label, so that it can stand beside other attacks' flips."""
        return all(r.mislabelled for r in self.records if r.flipped)

    @property
    def target(self) -> tuple[str, str, str]:
        """What was attacked: dataset, model and weights. Runs with the same target can be compared."""
        return self.dataset, self.model, str((self.about.get("checkpoint") or {}).get("sha256"))

    @property
    def training(self) -> dict[str, Any]:
        """What decides how the model was trained, before it was hardened and apart from the seed."""
        config = self.about.get("config") or {}
        data = {key: value for key, value in (config.get("dataset") or {}).items() if key not in TESTED}
        return {"model": config.get("model"), "training": config.get("training"), "dataset": data}

    @property
    def modalities(self) -> list[str]:
        return sorted({name for r in self.records for name in r.total})

    @property
    def unreadable(self) -> list[Any]:
        return list(self.about.get("unreadable") or [])

    @cached_property
    def statuses(self) -> Counter[str]:
        return Counter(r.status for r in self.records)

    @cached_property
    def summary(self) -> dict[str, dict[str, float | None]]:
        """Every metric with its interval."""
        return summarise(self.records, judged=self.judged)

    def by_id(self, column: np.ndarray) -> dict[Any, float]:
        """One number a record by the sample's id."""
        return dict(zip((r.id for r in self.records), column.tolist(), strict=True))

    def value(self, metric: str) -> float | None:
        return self.summary.get(metric, {}).get("value")

    def class_name(self, label: int) -> str:
        classes = self.about["classes"]
        return str(classes[label]) if 0 <= label < len(classes) else f"class {label}"


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Every run in the folders or below them, sorted by dataset, model and attack, random controls last.

    Raises:
        MuroanError: a folder is missing or has no run below it, or a `run.json` is not an attack's.
    """
    found: set[Path] = set()
    for folder in map(Path, folders):
        below = [file.parent.resolve() for file in folder.rglob("run.json")] if folder.is_dir() else []
        # A folder of certificates is only looked at, and refused, when it is named itself.
        attacked = [path for path in below if path == folder.resolve() or not certifies(path)]
        if not attacked:
            missing = "has no run.json in it or below it" if folder.is_dir() else "is not a folder"
            if below:
                missing = (
                    "holds certificates alone; certification.attacked=[RUN] of `muroan certify` puts them beside runs, "
                    "and so does `muroan report` where runs are named, too"
                )
            raise MuroanError(f"{folder} {missing}: name a folder that `muroan attack` wrote, or one that holds such")
        found.update(attacked)
    if not found:
        raise MuroanError("a report needs at least one run folder, got none")
    common = Path(os.path.commonpath(found))
    runs = [_read(path, str(path.relative_to(common)) if path != common else path.name) for path in sorted(found)]
    # A run that was stopped before its first record has nothing to say.
    runs = [run for run in runs if run.records or run.finished] or runs
    runs.sort(key=lambda run: (run.target, run.is_control, run.attack, run.folder))
    return _label(runs)


def certifies(path: Path) -> bool:
    """Whether a folder is that of a certification, perhaps one that has no certificate yet."""
    about = RunFolder(path).run
    return "attack" not in about and "certification" in (about.get("identity") or {})


def _read(path: Path, name: str) -> Run:
    folder = RunFolder(path)
    about = folder.run
    absent = {"attack", "model", "dataset", "classes"} - set(about)
    if absent:
        raise MuroanError(f"{path / 'run.json'} lacks {', '.join(sorted(absent))}: it is not of an attack run")
    return Run(name, about, folder.records(), folder.finished)


def _label(runs: Sequence[Run]) -> list[Run]:
    """Name what each run attacked by the model, and by dataset, settings and folder where that is not enough."""
    several = len({run.dataset for run in runs}) > 1
    for name in ("{0.model}", "{0.model} · {0.dataset}")[: 1 + several]:
        runs = [replace(run, where=name.format(run)) for run in runs]
        often = Counter(run.label for run in runs)
        if max(often.values()) == 1:
            return list(runs)
    named = [
        replace(run, where=f"{run.where} ({_settings(run, [r for r in runs if r.label == run.label])})")
        if often[run.label] > 1
        else run
        for run in runs
    ]
    often = Counter(run.label for run in named)
    return [
        replace(run, where=f"{old.where} ({run.folder})") if often[run.label] > 1 else run
        for run, old in zip(named, runs, strict=True)
    ]


def _settings(run: Run, others: Sequence[Run]) -> str:
    """The settings in which a run differs from others; its folder when there are none, or too many to read."""
    differing = differences(run, others, ("weights",))
    return ", ".join(differing) if 0 < len(differing) <= READABLE else run.folder


def differences(run: Run, others: Sequence[Run], ignore: Sequence[str]) -> list[str]:
    """The settings of a run, `name=value`, that one of the others does not have; `ignore` names whole groups.

    Of more than `READABLE` of them only those that fewer than half of the others have.
    """
    own = flat(run.about.get("identity"))
    theirs = [flat(other.about.get("identity")) for other in others]
    alike = {
        key: sum(other.get(key) == value for other in theirs)
        for key, value in own.items()
        if key.split(".")[0] not in ignore
    }
    differing = [key for key, count in alike.items() if count < len(theirs)]
    if len(differing) > READABLE:
        differing = [key for key in differing if 2 * alike[key] < len(theirs)]
    return [f"{key}={own[key]}" for key in differing]


def flat(settings: Any, at: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if not isinstance(settings, dict):
        return {at: settings}
    parts = (flat(value, f"{at}.{key}" if at else key) for key, value in settings.items())
    return {key: value for part in parts for key, value in part.items()}
