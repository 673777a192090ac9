"""Whether a removal found on one model flips another: models by models, from finished attack runs.

The removals that won against each model are asked of every other model on the same samples, through the query engine.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muroan.attacks.base import Ask, Attack, AttackedSample, Search, ThreatModel
from muroan.data.base import MultimodalData
from muroan.data.samples import Sample
from muroan.engine import QueryEngine
from muroan.errors import MuroanError
from muroan.metrics import bootstrap
from muroan.modalities import Audio, Layout, Modality, Region, Removal, Text
from muroan.models.base import MultimodalModel
from muroan.results import AttackResult
from muroan.runs import KINDS, Run, differences, find_runs
from muroan.training.module import load_weights, weights_hash

log = logging.getLogger("muroan")

# Makes dataset and model, untrained, of what a `run.json` says.
Build = Callable[[Mapping[str, Any]], tuple[MultimodalData, MultimodalModel]]

# The types that Lightning gives a whole model.
TRUE = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


# ---------------------------------------------------------------------------------------------------------
# Asking one model what was found on others


@dataclass(frozen=True)
class Source:
    """What an attack found on one model.

    Attributes:
        name: of the model, in tables.
        records: of the attack; those that are not flipped to another label have no say.
        modalities: of the model, which the records' regions lie in.
    """

    name: str
    records: Sequence[AttackResult]
    modalities: Mapping[str, Modality]

    @property
    def flipped(self) -> list[AttackResult]:
        """The records of flips to another label."""
        return [record for record in self.records if record.mislabelled]


@dataclass(frozen=True)
class Cell:
    """What a model makes of the removals that were found on another.

    Attributes:
        source, target: names of the models.
        own: whether they are one and the same.
        flipped: samples that the source was flipped on.
        left_out: of these, the samples that the removal could not be asked on.
        n: of these, the samples that it could be and that the target gets right when nothing is removed.
        rate: percent of n that the target gets wrong after the removal, with its bootstrap interval.
        same_class: percent of n that it takes for the same wrong class as the source; None without any.
    """

    source: str
    target: str
    own: bool
    flipped: int
    left_out: int
    n: int
    rate: Mapping[str, float | None]
    same_class: float | None


class Replay(Attack):
    """Ask removals that were found on other models. Nothing is searched, and nothing returned.

    `info["answers"]` says the class for the removal of each source that flipped the sample, by the source's place; None
    where the removal cannot be made of this model's input.
    """

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        self.found: dict[str, dict[int, AttackResult]] = {}
        for place, source in enumerate(sources):
            for record in source.flipped:
                self.found.setdefault(record.id, {})[place] = record

    def search(self, sample: AttackedSample) -> Search:
        fitting: dict[int, Removal] = {}
        for place, record in self.found[sample.id].items():
            removal = fitted(record, self.sources[place].modalities, sample.modalities, sample.layouts)
            if removal is not None:
                fitting[place] = removal
        responses = yield Ask(list(fitting.values()), phase="replay")
        labels = dict(zip(fitting, (response.label for response in responses), strict=True))
        sample.info["answers"] = [(place, labels.get(place)) for place in self.found[sample.id]]
        return None


def fitted(
    record: AttackResult,
    found_on: Mapping[str, Modality],
    modalities: Mapping[str, Modality],
    layouts: Mapping[str, Layout],
) -> Removal | None:
    """The winning removal of a record in the elements of another model's input.

    Regions of an image are scaled to the other size, rounded outwards, so that never less of the picture is lost.

    Args:
        found_on: modalities of the model that the record is about.
        modalities, layouts: of the other model, and of this sample as it takes it.

    Returns:
        None where the parts of the input do not correspond.
    """
    regions = []
    for region in record.removal.regions:
        name = region.modality
        before, after = found_on[name], layouts[name].grid
        # A text or a sound has its own number of elements, an image those that its model takes.
        sides = len(region.start)
        grid = (record.total[name],) if sides == 1 else tuple(before.shape[-sides:])
        if math.prod(grid) != record.total[name]:
            raise MuroanError(
                f"the record of sample {record.id!r} has {record.total[name]} elements of {name}, its model takes "
                f"{grid}: the record is of another model"
            )
        if len(after) != sides or not _corresponds(before, modalities[name], grid, after):
            return None
        axes = list(zip(region.start, region.stop, grid, after, strict=True))
        start = tuple(a * new // old for a, _, old, new in axes)
        stop = tuple(-(-b * new // old) for _, b, old, new in axes)
        regions.append(Region(name, start, stop))
    return Removal.of(*regions)


def _corresponds(before: Modality, after: Modality, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether two element grids of one sample span the same thing, so that places in one are places in the other."""
    if isinstance(before, Text) or isinstance(after, Text):
        return old == new
    if isinstance(before, Audio) and isinstance(after, Audio):
        return abs(old[0] / before.rate - new[0] / after.rate) < 1 / min(before.rate, after.rate)
    return True  # pictures are resized as a whole


def ask(
    name: str,
    model: MultimodalModel,
    samples: Iterable[Sample],
    sources: Sequence[Source],
    *,
    own: Sequence[bool] = (),
    replacement: Mapping[str, str] | None = None,
    batch_size: int = 64,
    precision: str = "32",
    seed: int = 0,
) -> list[Cell]:
    """Ask a model the removals that were found on others, all in one pass over the samples.

    Args:
        name: of the model, in tables.
        model: in evaluation mode.
        samples: as the model takes them; those that no source was flipped on cost nothing.
        sources: the others, the model itself perhaps among them.
        own: for each source, whether it is this very model; by name when not given.
        replacement: what stands in for removed elements; see `ThreatModel`.
        batch_size, precision, seed: see `QueryEngine`; the seed is that of noise replacements.

    Returns:
        One cell a source.

    Raises:
        MuroanError: see `QueryEngine`; a sample has another label than in a record.
    """
    replay = Replay(sources)

    def wanted() -> Iterator[Sample]:
        for sample in samples:
            for place, record in replay.found.get(sample.id, {}).items():
                if record.label != sample.label:
                    raise MuroanError(
                        f"sample {sample.id!r} is of class {sample.label} in the data of {name}, and of class "
                        f"{record.label} in the records of {sources[place].name}: they are not of the same data"
                    )
            if sample.id in replay.found:
                yield sample

    # Nothing is split, so that any image is large enough; and nothing is limited.
    threat_model = ThreatModel(dict(replacement or {}), min_side=dict.fromkeys(model.modalities, 1))
    engine = QueryEngine(model, replay, threat_model, batch_size, precision, seed, keep_media=0)
    answers: list[dict[str, int | None]] = [{} for _ in sources]
    seen: set[str] = set()
    for result in engine.run(wanted()):
        seen.add(result.id)
        for place, label in result.info.get("answers", ()):
            answers[place][result.id] = label
    cells = []
    for place, source in enumerate(sources):
        flipped = source.flipped
        asked = [(record, answers[place].get(record.id)) for record in flipped]
        told = [(record, label) for record, label in asked if label is not None]
        unfitting = sum(label is None for label in answers[place].values())
        cells.append(
            Cell(
                source.name,
                name,
                own[place] if own else source.name == name,
                flipped=len(flipped),
                left_out=unfitting + sum(record.id not in seen for record in flipped),
                n=len(told),
                rate=bootstrap(np.array([100.0 * (label != record.label) for record, label in told]), "rate"),
                same_class=float(np.mean([100.0 * (label == record.adversarial_label) for record, label in told]))
                if told
                else None,
            )
        )
    return cells


# ---------------------------------------------------------------------------------------------------------
# Which runs belong together


@dataclass(frozen=True)
class Group:
    """Runs of one attack, with the same settings and threat model, on several models for the same data.

    Attributes:
        name: of dataset and attack, unique.
        attack: of the attack, with the settings that tell it from another group's.
        rows: the runs by name.
        columns: the name of each model, by its run's `target`.
    """

    name: str
    attack: str
    rows: dict[str, Run]
    columns: dict[tuple[str, str, str], str]

    @property
    def dataset(self) -> str:
        return next(iter(self.rows.values())).dataset

    @property
    def replacement(self) -> dict[str, str]:
        threat_model = next(iter(self.rows.values())).identity.get("threat_model") or {}
        return {k: v for k, v in (threat_model.get("replacement") or {}).items() if v is not None}


@dataclass(frozen=True)
class Matrix:
    """The cells of a group, row by row."""

    group: Group
    cells: list[list[Cell]]


def grouped(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """The finished removal runs by dataset, attack and threat model; and what was left out.

    Each checkpoint is a model of its own. A model that was attacked several times alike (with other seeds of the
    attack) has a row for each.

    Raises:
        MuroanError: there are no such runs, or none of the groups has two models.
    """
    why = [_unfit(run) for run in runs]
    fit = [run for run, reason in zip(runs, why, strict=True) if not reason]
    notes = []
    if len(fit) < len(runs):
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(why).items()) if reason)
        notes.append(f"{len(runs) - len(fit)} of {len(runs)} runs have no part in this: {left}.")
        if not fit:
            raise MuroanError(
                f"none of these {len(runs)} run(s) is a finished removal attack ({left}): attack two or more models "
                f"with `muroan attack` first"
            )
    found: dict[str, list[Run]] = {}
    for run in sorted(fit, key=lambda run: (run.dataset, run.is_control, run.attack, run.model, _seed(run))):
        found.setdefault(_setup(run), []).append(run)
    names = _group_names(list(found.values()))
    groups = []
    for members, (attack, name) in zip(found.values(), names, strict=True):
        columns = _model_names(members)
        if len(columns) < 2:
            (only,) = columns.values()
            notes.append(f"{name}: left out, as {only} is the only model.")
            continue
        often = Counter(run.target for run in members)
        rows = {columns[run.target] + (f", {run.folder}" if often[run.target] > 1 else ""): run for run in members}
        groups.append(Group(name, attack, rows, columns))
    if not groups:
        listed = "; ".join(
            f"{name} has {next(iter(_model_names(m).values()))}"
            for m, (_, name) in zip(found.values(), names, strict=True)
        )
        raise MuroanError(
            f"at least two models are needed, attacked alike (dataset, attack, its settings and threat model): {listed}"
        )
    return groups, notes


def _unfit(run: Run) -> str:
    """Why a run has no part in this; empty if it has."""
    if not run.finished or run.kind != "removal":
        return KINDS[run.kind] or "unfinished"
    return "of a vote over ablations" if run.about.get("smoothed") else ""


def _seed(run: Run) -> tuple[int, str, str]:
    seed = str(run.about.get("seed"))
    return len(seed), seed, run.folder


def _setup(run: Run) -> str:
    """All that the runs of a group have in common. Other options of the dataset may differ, such as image sizes:
    samples are known by their ids.
    """
    about, identity = run.about, run.identity
    listed = (identity.get("dataset") or {}).get("content")
    data = [run.dataset, listed, about["classes"], sorted(about.get("modalities", ()))]
    return json.dumps([data, run.attack, identity.get("attack"), identity.get("threat_model")], sort_keys=True)


def _group_names(groups: Sequence[Sequence[Run]]) -> list[tuple[str, str]]:
    """For each group the attack, with settings or a folder where that is not enough, and the same with the dataset."""
    first = [_only(group[0], attack=True) for group in groups]
    names = []
    for run in first:
        others = [other for other in first if (other.dataset, other.attack) == (run.dataset, run.attack)]
        own = differences(run, others, ())
        attack = f"{run.attack} ({', '.join(own)})" if own else run.attack
        names.append((attack, f"{run.dataset} · {attack}"))
    often = Counter(names)
    return [
        (f"{attack} ({run.folder})", f"{name} ({run.folder})") if often[attack, name] > 1 else (attack, name)
        for run, (attack, name) in zip(first, names, strict=True)
    ]


def _model_names(group: Sequence[Run]) -> dict[tuple[str, str, str], str]:
    """The models of a group, by name, and by seed and settings, and then weights, where that is not enough."""
    first = {run.target: _only(run, attack=False) for run in reversed(group)}
    first = dict(reversed(first.items()))
    names = {}
    for target, run in first.items():
        own = differences(run, [other for other in first.values() if other.model == run.model], ())
        names[target] = f"{run.model} ({', '.join(own)})" if 0 < len(own) <= 3 else run.model
    often = Counter(names.values())
    return {t: f"{name} (weights {t[2][:8]})" if often[name] > 1 else name for t, name in names.items()}


def _only(run: Run, attack: bool) -> Run:
    """The run with what tells attacks, or else models, apart as its identity."""
    identity, config = run.identity, run.about.get("config") or {}
    keys = ("attack", "threat_model") if attack else ("model", "seed")
    own = {key: identity.get(key) for key in keys}
    own |= {} if attack else {key: config.get(key) for key in ("training", "defense")}
    return replace(run, about={**run.about, "identity": own})


# ---------------------------------------------------------------------------------------------------------
# From run folders to matrices


def measure(
    folders: Sequence[Path], build: Build, batch_size: int = 64, device: str | torch.device = "cpu"
) -> tuple[list[Matrix], list[str]]:
    """Ask the models of finished removal attacks what was found on each other.

    Args:
        folders: run folders, or folders that hold such at any depth.
        build: makes dataset and model, untrained, of what a `run.json` says.
        batch_size, device: of the questions.

    Returns:
        The matrices, and what a reader has to know: warnings, and what was left out.

    Raises:
        MuroanError: see `grouped`; a checkpoint is missing or was changed, a dataset is not there.
    """
    groups, notes = grouped(find_runs(folders))
    matrices = _asked(groups, build, batch_size, device)
    return matrices, [*_warnings(matrices), *notes]


def _asked(groups: Sequence[Group], build: Build, batch_size: int, device: str | torch.device) -> list[Matrix]:
    """The matrices of some groups. One model at a time is in memory; all are checked before the first is asked."""
    about = {run.target: run for group in reversed(groups) for run in reversed(group.rows.values())}
    about = dict(reversed(about.items()))
    modalities = {target: trained(run, build)[1].modalities for target, run in about.items()}
    cells: dict[tuple[str, str, str], Cell] = {}
    for number, (target, run) in enumerate(about.items(), start=1):
        data, model = trained(run, build)
        attacked_in = str(run.identity.get("precision"))
        model = model.eval().to(device=device, dtype=TRUE.get(attacked_in))
        precision = {"bf16-mixed": "bf16", "16-mixed": "16"}.get(attacked_in, "32")
        for group in groups:
            if target not in group.columns:
                continue
            name = group.columns[target]
            log.info("%s: asking %s (model %d of %d)", group.name, name, number, len(about))
            # Noise differs by the seed of the run that it was found in; nothing else does.
            noise = "noise" in group.replacement.values()
            by_seed: dict[int, list[tuple[str, Run]]] = {}
            for row, source in group.rows.items():
                by_seed.setdefault(int(source.about.get("seed") or 0) if noise else 0, []).append((row, source))
            for seed, rows in by_seed.items():
                sources = [Source(row, source.records, modalities[source.target]) for row, source in rows]
                ids = {record.id for source in sources for record in source.flipped}
                try:
                    found = ask(
                        name,
                        model,
                        _samples(data, ids),
                        sources,
                        own=[source.target == target for _, source in rows],
                        replacement=group.replacement,
                        batch_size=batch_size,
                        precision=precision,
                        seed=seed,
                    )
                except MuroanError as error:
                    raise MuroanError(f"{group.name}, asking {name}: {error}") from None
                cells.update({(group.name, cell.source, name): cell for cell in found})
    return [
        Matrix(group, [[cells[group.name, row, name] for name in group.columns.values()] for row in group.rows])
        for group in groups
    ]


def trained(run: Run, build: Build) -> tuple[MultimodalData, MultimodalModel]:
    """Dataset and model of a run, with the very weights that were attacked.

    Raises:
        MuroanError: the checkpoint is missing or was changed, or the test split cannot be read.
    """
    checkpoint = run.about.get("checkpoint") or {}
    if not isinstance(run.about.get("config"), dict) or "sha256" not in checkpoint:
        raise MuroanError(f"{run.folder}: its run.json does not say what was attacked (config, checkpoint)")
    try:
        data, model = build(run.about)
        data.limits["test"] = None  # other runs may have attacked other samples
        data.examples("test")
        if checkpoint.get("path") is not None:
            load_weights(model, Path(checkpoint["path"]))
    except MuroanError as error:
        raise MuroanError(f"{run.folder}: {error}") from None
    weights = weights_hash(model)
    if weights != checkpoint["sha256"]:
        raise MuroanError(
            f"{run.folder}: {checkpoint.get('path') or 'the model'} has changed since it was attacked (its weights "
            f"were {str(checkpoint['sha256'])[:8]}…, they are {weights[:8]}…): attack it again, or bring back the old"
        )
    return data, model


def _samples(data: MultimodalData, ids: set[str]) -> Iterator[Sample]:
    dataset = data.prepared("test")
    for index, example in enumerate(dataset.examples):
        if example.id in ids:
            sample = dataset[index]
            if isinstance(sample, Sample):
                yield sample


def _warnings(matrices: Sequence[Matrix]) -> list[str]:
    """Models that their own removals do not flip again."""
    found = []
    for matrix in matrices:
        for cell in itertools.chain.from_iterable(matrix.cells):
            again = round(cell.n * (cell.rate["value"] or 0) / 100)
            if cell.own and again < cell.flipped:
                found.append(
                    f"Warning: {matrix.group.name}: {cell.source} is flipped again by {again} of its own "
                    f"{cell.flipped} removals, not by all: its arithmetic was rounded differently (another device, "
                    f"precision or batch size), or its data has changed."
                )
    return found
