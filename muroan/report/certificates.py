"""What certificates promise beside what attacks on the same vote leave, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muroan.errors import MuroanError
from muroan.report.plots import Certified, certified_curves
from muroan.report.tables import NOTHING, figure, whole
from muroan.runs import READABLE, Run, certifies, flat

if TYPE_CHECKING:
    from muroan.certification import Certificate, CertificateFolder

NOTE = (
    "Certified is what no attack whatever can change in a vote over ablated inputs. Right: right and not abstaining; "
    "against one element: right whatever is done to a single element of that modality alone; both in percent of the "
    "certified samples. The curve of an attack is of a vote of fixed masks that does not abstain, and of the one "
    "removal in its record: an upper bound. Broken: flips within the certified size, of which there should be none."
)


@dataclass(frozen=True, slots=True)
class Held:
    """What an attack did to certificates.

    Attributes:
        broken: ids of the samples that it flipped within their certified size; accuracy: percent that it left right.
    """

    broken: list[str]
    accuracy: float


def hold_against(folder: CertificateFolder, certificates: Sequence[Certificate], run: Run) -> Held:
    """What an attack did to the certificates of a folder.

    Raises:
        MuroanError: it attacked another vote, in a way that the certificates say nothing about, or other samples.
    """
    ours, theirs = folder.run["identity"], run.identity
    if not same_vote(ours, theirs):
        raise MuroanError(
            f"{run.folder} attacked another model or vote than was certified; attack it with "
            f"certification.smoothed=true and the same checkpoint and defense"
        )
    deleted = ours["certification"]["deleted"]
    deleted = [deleted] if isinstance(deleted, str) else deleted
    # A deletion moves all later sound; a masked word is a changed one.
    replaced = (theirs.get("threat_model") or {}).get("replacement") or {}
    beyond = [name for name in deleted if replaced.get(name) not in (None, "delete")]
    beyond += [name for name, how in replaced.items() if how == "delete" and name not in certificates[0].tokens]
    if beyond:
        raise MuroanError(
            f"{run.folder} replaces parts of {', '.join(beyond)} in a way that the certificates say nothing about: "
            f"attack with what they are made for (sound put to zero; words deleted, or certify without "
            f"certification.deleted)"
        )
    from muroan.certification import broken, robust_accuracy  # brings Lightning

    found = broken(certificates, run.records)
    return Held([c.id for c, _ in found], float(robust_accuracy(certificates, run.records, [1.0])[0]))


def same_vote(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether runs of these identities, a certification and an attack, asked the same model in the same vote."""
    return "certification" in theirs and all(theirs.get(key) == ours[key] for key in ("weights", "defense"))


@dataclass(frozen=True)
class Vote:
    """The certificates of one folder, and what attacks on the same vote did.

    Attributes:
        name: of the model and its defence, and the dataset; folder: of the certificates.
        settings: what decides them, but for the weights.
        summary: see `certification.summarise`.
        attacks: runs on it, and what each did.
    """

    name: str
    folder: str
    settings: dict[str, Any]
    certificates: list[Certificate]
    summary: dict[str, Any]
    attacks: list[tuple[Run, Held]]


def certificate_folders(folders: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The folders of certificates among these or below them, and those of the given ones that hold more than such."""
    found, others = set[Path](), []
    for folder in map(Path, folders):
        below = {file.parent.resolve() for file in folder.rglob("run.json")}
        certified = {path for path in below if certifies(path)}
        found |= certified
        if not below or below - certified:
            others.append(folder)
    return sorted(found), others


def find_votes(paths: Sequence[Path], runs: Sequence[Run]) -> tuple[list[Vote], list[str]]:
    """The certificates of some folders, held against those of the runs that attacked the same vote.

    Returns:
        The votes, and sentences about what is missing or does not fit.
    """
    if not paths:
        return [], []
    from muroan.certification import CertificateFolder, summarise  # brings Lightning, which no other report needs

    votes: list[Vote] = []
    said: list[str] = []
    for path in paths:
        folder = CertificateFolder(path)
        about, certificates = folder.run, folder.records()
        name = f"{about['model']} + {about['defense']} · {about['dataset']}"
        if not folder.finished:
            said.append(f"The certification of {name} is unfinished: {whole(len(certificates))} certificates so far.")
        attacks: list[tuple[Run, Held]] = []
        for run in runs if certificates else ():
            if same_vote(about["identity"], run.identity):
                try:
                    attacks.append((run, hold_against(folder, certificates, run)))
                except MuroanError as error:
                    said.append(f"No certificate is held against {run.label}: {error}.")
        said += [
            f"{run.label} broke {whole(len(held.broken))} certificates of {name}, which says that something is wrong."
            for run, held in attacks
            if held.broken
        ]
        if certificates:
            settings = {key: value for key, value in flat(about["identity"]).items() if key != "weights"}
            votes.append(Vote(name, path.name, settings, certificates, summarise(certificates), attacks))
    return _named(votes), said


def _named(votes: Sequence[Vote]) -> list[Vote]:
    """Votes of one name told apart by the settings in which they differ, or by their folders."""
    named = []
    for vote in votes:
        alike = [other.settings for other in votes if other.name == vote.name]
        differing = [f"{k}={v}" for k, v in vote.settings.items() if any(own.get(k) != v for own in alike)]
        told = ", ".join(differing) if 0 < len(differing) <= READABLE else vote.folder
        named.append(replace(vote, name=f"{vote.name} ({told})") if len(alike) > 1 else vote)
    often = Counter(vote.name for vote in named)
    return [replace(v, name=f"{v.name} ({v.folder})") if often[v.name] > 1 else v for v in named]


def _attack_names(vote: Vote) -> list[str]:
    """What the attacks on a vote are called beside it."""
    often = Counter(run.attack for run, _ in vote.attacks)
    return [run.attack if often[run.attack] == 1 else run.label for run, _ in vote.attacks]


def picture(votes: Sequence[Vote], dark: bool) -> bytes:
    """Certified accuracy beside what the attacks leave, a panel a vote, as a PNG."""
    panels: dict[str, Certified] = {}
    for vote in votes:
        records = [run.records for run, _ in vote.attacks]
        panels[vote.name] = vote.certificates, list(zip(_attack_names(vote), records, strict=True))
    return certified_curves(panels, dark)


def table(votes: Sequence[Vote]) -> list[list[str]]:
    """Heads and a row a vote."""
    names = list(dict.fromkeys(name for vote in votes for name in vote.summary["alone"]))
    heads = ["vote", "samples", "right (%)", "abstained", *(f"against one element of {name} (%)" for name in names)]
    rows = [[*heads, "left by attacks (%)", "broken"]]
    for vote in votes:
        told, alone = vote.summary, vote.summary["alone"]
        accuracies = [figure(held.accuracy, "rate") for _, held in vote.attacks]
        left = [f"{accuracy} {name}" for accuracy, name in zip(accuracies, _attack_names(vote), strict=True)]
        rows.append(
            [
                vote.name,
                whole(told["samples"]),
                figure(told["accuracy"], "rate"),
                whole(told["abstained"]),
                *(figure(alone[name]["any"] if name in alone else None, "rate") for name in names),
                "; ".join(left) or NOTHING,
                whole(sum(len(held.broken) for _, held in vote.attacks)) if vote.attacks else NOTHING,
            ]
        )
    return rows


def summary(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """The same figures, for `summary.json`."""
    return [
        {
            "vote": vote.name,
            **vote.summary,
            "attacks": [
                {"run": run.label, "broken": held.broken, "robust_accuracy": held.accuracy}
                for run, held in vote.attacks
            ],
        }
        for vote in votes
    ]
