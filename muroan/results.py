"""Records of attacks: one line of JSON a sample, streamed to disk, and the folder of a run that can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TextIO, TypeVar

from muroan.attacks.base import Kind
from muroan.errors import MuroanError
from muroan.modalities import Region, Removal

Status = Literal["flipped", "held", "budget_exhausted", "skipped"]


@dataclass(slots=True)
class Count:
    """What was spent in one phase: distinct questions, model passes, and repeated questions answered for free.

    A backward pass is a query like a forward one: a budget limits both.
    """

    queries: int = 0
    forwards: int = 0
    cache_hits: int = 0
    backwards: int = 0


@dataclass(slots=True)
class AttackResult:
    """What an attack did to one sample.

    Every figure is the engine's, which asks the model about what a search returns once more, from scratch. The attack's
    own are `proven`, `info`, and the points of the trajectory before the last, which rest on answers that it was given.

    Attributes:
        index: the sample's place in its dataset.
        label, clean_label, adversarial_label: the true class, and the model's before and after.
        status: `flipped` (the attack reached its goal: another label, unless `Attack.reached` says else); `held` (it
            gave up by itself, perhaps with its last query); `budget_exhausted` (it was refused a question or pass that
            it would have made); `skipped` (wrong before the attack).
        regions: the winning removal, empty unless flipped: (modality, start, stop) a part.
        removed, total: elements a modality, each removed one counted once.
        ledger: what was spent, by phase. The attack's own phases come first; `clean`, `verify` and `audit` are
            the engine's and no queries.
        one_minimal: whether the goal is lost with any one part put back, be it that the label is no longer right where
            that is part of the goal (`Attack.valid_only`); None when not audited.
        interaction: whether a removal across modalities flips while none of its one-modality parts does;
            None when the removal lies in one modality.
        kind: `removal`; `perturbation` (the attack chose new values, which is strictly stronger: `removed` then holds
            the changed elements, of a text the words replaced, left out or put in by the fewest edits); `corruption`
            (noise that nobody chose).
        distance: of a perturbation, a modality: `l2` and `linf` in units of the model's input.
        proven: no removal in its universe that is smaller, by the attack's objective, reaches the goal; None when it
            makes no such claim.
        still_valid: whether the label is still right after the removal, says the dataset; None when it cannot tell.
        trajectory: (queries, decoupled fraction in percent) at every flip in hand that the attack held for smaller than
            those before, by its objective: what a budget of fewer queries would have had.
        info: what this attack adds of its own.
        media: what a report needs to draw the sample, a modality; only for the first samples.
        perturbed_media: the same of what a perturbation made of it.
    """

    id: str
    index: int
    attack: str
    label: int
    clean_label: int
    adversarial_label: int
    status: Status
    regions: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    ledger: dict[str, Count] = field(default_factory=dict)
    one_minimal: bool | None = None
    interaction: bool | None = None
    kind: Kind = "removal"
    distance: dict[str, dict[str, float]] = field(default_factory=dict)
    proven: bool | None = None
    still_valid: bool | None = None
    trajectory: list[tuple[int, float]] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    media: dict[str, Any] | None = None
    perturbed_media: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.attack, self.id

    @property
    def order(self) -> tuple[str, int, str]:
        return self.attack, self.index, self.id

    @property
    def removal(self) -> Removal:
        return Removal.of(*(Region(name, tuple(start), tuple(stop)) for name, start, stop in self.regions))

    @property
    def attacked(self) -> bool:
        return self.status != "skipped"

    @property
    def flipped(self) -> bool:
        """Whether the attack reached what it was after, which may be something else than another label."""
        return self.status == "flipped"

    @property
    def mislabelled(self) -> bool:
        """Whether the attack ended in another label than the true one."""
        return self.flipped and self.adversarial_label != self.label

    @property
    def decoupled_fraction(self) -> float:
        """Removed elements over elements, of all modalities together, in percent."""
        return 100 * sum(self.removed.values()) / max(1, sum(self.total.values()))

    def modality_fraction(self, modality: str) -> float:
        """Removed elements over elements of one modality, in percent."""
        return 100 * self.removed.get(modality, 0) / max(1, self.total[modality])

    @property
    def queries(self) -> int:
        """Distinct questions that the attack asked: what a budget limits."""
        return sum(c.queries for c in self.ledger.values())

    @property
    def forwards(self) -> int:
        """Model forwards run for this sample, the engine's own included."""
        return sum(c.forwards for c in self.ledger.values())

    @property
    def backwards(self) -> int:
        """Backward passes run for this sample."""
        return sum(c.backwards for c in self.ledger.values())

    @property
    def cache_hits(self) -> int:
        return sum(c.cache_hits for c in self.ledger.values())

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> AttackResult:
        """The record of a line. A key that is no field (a report's merged lines name their run) is left out."""
        fields = {key: value for key, value in json.loads(line).items() if key in cls.__dataclass_fields__}
        fields["ledger"] = {phase: Count(**count) for phase, count in fields["ledger"].items()}
        fields["regions"] = [(name, tuple(start), tuple(stop)) for name, start, stop in fields["regions"]]
        fields["trajectory"] = [(queries, fraction) for queries, fraction in fields.get("trajectory", [])]
        return cls(**fields)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """A short hash of all that decides what the records say."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]


def read_json(path: Path, remedy: str) -> Any:
    """What a file of this project's own says.

    Raises:
        MuroanError: it is damaged; `remedy` says what to do.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise MuroanError(f"{path} is damaged ({error}): {remedy}") from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


class Record(Protocol):
    """What a run folder keeps, a line of JSON each.

    Attributes:
        id: of the sample.
        key: of two records with the same one, the first counts.
        order: what they are sorted by.
    """

    id: str

    @property
    def key(self) -> tuple[Any, ...]: ...

    @property
    def order(self) -> tuple[Any, ...]: ...

    def to_json(self) -> str: ...


R = TypeVar("R", bound=Record)


class RecordFolder(ABC, Generic[R]):
    """The folder of one run.

    Every process appends its records to a part file of its own; `finish` sorts all parts into one file.
    A run that is started again finds the records of its parts and goes on from there.

    Files: `run.json` (identity, config, versions, class names), `<records>.part-<rank>.jsonl` while running,
    `<records>.jsonl` when finished.

    Attributes:
        stem: what the files of records are called.
        task, kind: the command and what a record is, for messages.
    """

    stem: ClassVar[str]
    task: ClassVar[str]
    kind: ClassVar[str]

    def __init__(self, path: str | Path, rank: int = 0):
        self.path, self.rank = Path(path), rank
        self._part: TextIO | None = None

    @staticmethod
    @abstractmethod
    def parse(line: str) -> R:
        """The record of a line."""

    @property
    def records_file(self) -> Path:
        return self.path / f"{self.stem}.jsonl"

    @property
    def finished(self) -> bool:
        return self.records_file.exists()

    @property
    def run(self) -> dict[str, Any]:
        """What `run.json` says.

        Raises:
            MuroanError: the folder holds no run.
        """
        try:
            return json.loads((self.path / "run.json").read_text())
        except FileNotFoundError:
            raise MuroanError(
                f"{self.path} holds no {self.task} run (no run.json): name a folder that `muroan {self.task}` wrote"
            ) from None
        except ValueError as error:
            raise MuroanError(
                f"{self.path / 'run.json'} is not JSON ({error}): it was edited; remove the folder to run again"
            ) from None

    def matches(self, run: Mapping[str, Any]) -> bool:
        """Whether the folder's run has the identity of this one."""
        return self.run["identity"] == json.loads(json.dumps(run["identity"]))

    def clear(self) -> None:
        """Forget all records of the folder."""
        for file in (
            *(self.path / n for n in ("run.json", "summary.json")),
            self.records_file,
            *self.path.glob("*.part-*.jsonl"),
        ):
            file.unlink(missing_ok=True)

    def start(self, run: Mapping[str, Any]) -> None:
        """Claim the folder for a run, one that goes on if it was finished; call in one process.

        Args:
            run: plain JSON with at least `identity`, all that decides what the records say.

        Raises:
            MuroanError: the folder holds records of another configuration; the message names what differs.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "run.json").exists() and not self.matches(run):
            differing = what_differs(self.run["identity"], json.loads(json.dumps(run["identity"])))
            raise MuroanError(
                f"{self.path} holds records of another configuration ({differing}): "
                f"choose another folder with out=..., or start anew with rerun=true"
            )
        kept: dict[str, Any] = {}
        if self.finished:
            kept = {key: value for key, value in self.run.items() if key in ("unreadable", "disagreements")}
            (self.path / "summary.json").unlink(missing_ok=True)  # of fewer records than there will be
            self.records_file.replace(self.path / f"{self.stem}.part-before.jsonl")
        write_json(self.path / "run.json", {**run, **kept, "fingerprint": fingerprint(run["identity"])})

    def records(self) -> list[R]:
        """All records so far, one a sample, sorted by the samples' order."""
        files = [self.records_file] if self.finished else []
        files += sorted(self.path.glob(f"{self.stem}.part-*.jsonl"))
        found: dict[tuple[Any, ...], R] = {}
        for file in files:
            for record in self.read(file):
                found.setdefault(record.key, record)
        return sorted(found.values(), key=lambda r: r.order)

    @classmethod
    def read(cls, path: Path) -> list[R]:
        """The records of a file; a last line that a kill cut short is left out.

        Raises:
            MuroanError: another line is not a record.
        """
        lines = path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or cut short
            try:
                records.append(cls.parse(line.decode()))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise MuroanError(
                    f"{path} line {number} is not {cls.kind} ({error}): it was edited or written by another "
                    f"version; remove the file to {cls.task} these samples again"
                ) from None
        return records

    def append(self, result: R) -> None:
        if self._part is None:
            self._part = _open_part(self.path / f"{self.stem}.part-{self.rank}.jsonl")
        self._part.write(result.to_json() + "\n")
        self._part.flush()

    def append_unreadable(self, bad: Sequence[tuple[str, str]]) -> None:
        """Note samples that could not be read: (id, reason) each."""
        if bad:
            with _open_part(self.path / f"unreadable.part-{self.rank}.jsonl") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in bad)

    def unreadable(self) -> dict[str, str]:
        """Why samples could not be read, by their ids: of a finished run, or of one under way."""
        parts = sorted(self.path.glob("unreadable.part-*.jsonl"))
        if not parts:
            return dict(self.run.get("unreadable") or []) if (self.path / "run.json").exists() else {}
        # What follows the last newline of a part is empty or cut short.
        return dict(json.loads(line) for part in parts for line in part.read_text().split("\n")[:-1])

    def close(self) -> None:
        """Stop appending; `finish` comes later, in one process, when all have closed."""
        if self._part is not None:
            self._part.close()
            self._part = None

    def finish(self, **more: Any) -> list[R]:
        """Sort the parts of all processes into one file and return the records; `run.json` gets `more`."""
        self.close()
        records = self.records()
        read = {record.id for record in records}  # some perhaps at a second try, after an interruption
        unreadable = sorted((id, why) for id, why in self.unreadable().items() if id not in read)
        if (self.path / "run.json").exists():
            about = {key: value for key, value in self.run.items() if key != "unreadable"}
            write_json(self.path / "run.json", {**about, **more, **({"unreadable": unreadable} if unreadable else {})})
        write_records(self.records_file, records)
        for part in self.path.glob("*.part-*.jsonl"):
            part.unlink()
        return records


class RunFolder(RecordFolder[AttackResult]):
    """The folder of one attack run; see `RecordFolder`."""

    stem, task, kind = "records", "attack", "an attack record"
    parse = staticmethod(AttackResult.from_json)


def read_records(path: Path) -> list[AttackResult]:
    """The attack records of a file; see `RecordFolder.read`."""
    return RunFolder.read(path)


def _open_part(path: Path) -> TextIO:
    """Open a file to append lines; one that a kill cut short is dropped, or the next would be glued to it."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return path.open("a")


def write_records(path: Path, records: Iterable[Record]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(record.to_json() + "\n" for record in records))
    temporary.replace(path)


def what_differs(old: Any, new: Any, at: str = "") -> str:
    """The first few values that differ between two configurations, for a message."""
    found: list[str] = []

    def walk(a: Any, b: Any, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        elif a != b:
            found.append(f"{path}: {a!r} there, {b!r} asked for")

    walk(old, new, at)
    return "; ".join(found[:4]) + ("; …" if len(found) > 4 else "")
