"""Did a defence help? Defences against attacks in one grid, what training cost, and a verdict against the controls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from muroan.errors import MuroanError
from muroan.metrics import curve_score, pooled
from muroan.report.compare import Estimate, Row
from muroan.report.significance import holm, over_seeds, probability, sign_flip
from muroan.report.tables import figure, whole
from muroan.runs import Run, flat

UNDEFENDED = "undefended"
LEVEL = 0.05  # of p, below which a defence is said to have helped


@dataclass(frozen=True)
class Outcome:
    """What the removal attacks together did to one sample.

    Attributes:
        right: whether the model is right without attack.
        size: the smallest decoupled fraction, in percent, at which any attack flipped it; infinite if none did.
        valid: likewise, of the flips that leave the label right; NaN where the dataset cannot tell.
    """

    right: bool
    size: float
    valid: float

    @property
    def robust(self) -> float:
        """100 if it is right and no attack flips it, else 0."""
        return 100.0 * (self.right and self.size == np.inf)

    @property
    def robust_to_valid(self) -> float:
        """The same, where only flips that leave the label right count."""
        return np.nan if np.isnan(self.valid) else 100.0 * (self.right and self.valid == np.inf)

    @property
    def area(self) -> float:
        return _score(self.size)

    @property
    def decisive(self) -> float:
        """The size of the flip that a defence is judged by; see `Difference.decisive`."""
        return self.size if np.isnan(self.valid) else self.valid


def _score(size: float) -> float:
    return 100 * curve_score(size) if np.isfinite(size) else 0.0


@dataclass(frozen=True)
class Defended:
    """A model under one defence (or none), and the attacks on it.

    Attributes:
        name: the defence, with the settings that tell it apart from others of the name.
        control: whether it is one of the cheap controls, which a defence has to beat.
        attacks: by what the attack is called; the runs, one a seed.
        undefended: whether it is not hardened at all.
        base: the options of the model and of its training before it was hardened; defences of others are no match.
        effort: how long, and how, it was hardened: a control of another effort is none.
    """

    name: str
    control: bool
    attacks: Mapping[str, Row]
    undefended: bool = False
    base: str = ""
    effort: str = ""

    @property
    def title(self) -> str:
        return self.name + (" (control)" if self.control else "")

    @property
    def place(self) -> tuple[bool, bool, str]:
        """Where it stands: the undefended model first, controls next."""
        return not self.undefended, not self.control, self.name

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.attacks.values() for run in row.runs]

    @cached_property
    def judged(self) -> bool:
        """Whether the dataset can tell if a label is still right after a flip."""
        return any(run.judged for run in self.runs)

    def removals(self, attacks: Sequence[str]) -> list[Row]:
        """Those of the attacks that were run here and only remove."""
        return [self.attacks[name] for name in attacks if name in self.attacks and self.attacks[name].kind == "removal"]

    def seeds(self, attacks: Sequence[str]) -> list[Any]:
        """The seeds that the removal attacks among these were all run on."""
        own = [{run.about.get("seed") for run in row.runs} for row in self.removals(attacks)]
        return sorted(set.intersection(*own), key=str) if own else []

    def controls(self, other: Defended) -> bool:
        """Whether it is a control of another's: one that was trained for shorter, or otherwise, shows nothing."""
        return self.control and self.base == other.base and self.effort == other.effort

    def cost(self) -> dict[str, float]:
        """What hardening took, the mean over seeds; empty where nothing was hardened."""
        costs = {run.about.get("seed"): (run.about.get("training") or {}).get("cost") for run in self.runs}
        known = [cost for cost in costs.values() if cost]
        return {key: float(np.mean([cost[key] for cost in known])) for key in (known[0] if known else ())}

    def outcomes(self, seed: Any, attacks: Sequence[str]) -> dict[str, Outcome]:
        """What the removals of these attacks did to each sample of a seed that all of them had a go at, by its id."""
        runs = [run for row in self.removals(attacks) for run in row.runs if run.about.get("seed") == seed]
        by_id = [{r.id: r for r in run.records} for run in runs]
        found: dict[str, Outcome] = {}
        for key in by_id[0] if by_id else ():
            if not all(key in records for records in by_id):
                continue  # what an attack has not seen does not hold against it
            tried = [records[key] for records in by_id]
            size = min(r.decoupled_fraction if r.mislabelled else np.inf for r in tried)
            valid = min(r.decoupled_fraction if r.mislabelled and r.still_valid else np.inf for r in tried)
            found[key] = Outcome(tried[0].clean_label == tried[0].label, size, valid if self.judged else np.nan)
        return found


@dataclass(frozen=True)
class Difference:
    """A defence less another on the samples and seeds that both share, in percentage points, paired.

    Attributes:
        robust: difference of the robust accuracies under all removal attacks together.
        valid: the same, counting only flips that leave the label right; without a value where the dataset cannot tell.
        area: difference of the areas under the success curves: below 0, flips are fewer or need larger removals.
        larger: difference of the same areas over the samples that both are flipped on, by flips that count: below 0,
            they need larger removals.
        p: of `decisive`, by the exact sign-flip test over samples, two-sided; p_larger: likewise of `larger`.
        samples: how many were paired; by_seed: what `decisive` is in each seed, by which to tell chance in training.
    """

    robust: Estimate
    valid: Estimate
    area: Estimate
    larger: Estimate
    p: float
    p_larger: float
    samples: int
    by_seed: Mapping[Any, float]

    @property
    def decisive(self) -> Estimate:
        """What a defence is judged by: a flip after which another label is right is none that it should prevent."""
        return self.robust if self.valid["value"] is None else self.valid

    @property
    def points(self) -> float:
        """How much better the defence is than the other."""
        return self.decisive["value"] or 0.0

    @property
    def gain(self) -> tuple[float, float]:
        """The same for ranking: among equals, the size of the flips decides."""
        return self.points, -(self.area["value"] or 0.0)

    @property
    def each(self) -> str:
        """`by_seed` as text; empty where there is one seed."""
        told = ", ".join(f"{points:+.1f}" for points in self.by_seed.values())
        return f" (by seed {told})" if len(self.by_seed) > 1 else ""


@dataclass(frozen=True)
class Verdict:
    """A defence against the undefended model and against its controls.

    To have helped, a defence must be better than each of its controls, beyond chance, and in every seed; to have done
    worse, worse than any of them. Chance is that of the samples: that of training is seen in the seeds alone.

    Attributes:
        against: its controls, and the differences to them.
        control, beyond: the control that decides, and the difference to it.
        p: that of the claim. For one against each control it is the largest of their p (Berger 1982), for one against
            any the smallest times their number; then after Holm's correction over the verdicts on this model.
        p_larger: likewise that flips need larger removals than under each control; p_smaller: smaller ones than under
            any.
        steady: whether what is claimed is so in every seed.
        missing: controls that share no sample with it, so that it can't be said to have helped.
        unlike: controls that were hardened longer or shorter, or otherwise, and have no say.
    """

    defense: Defended
    undefended: Difference | None
    against: Sequence[tuple[Defended, Difference]]
    control: Defended | None
    beyond: Difference | None
    p: float = 1.0
    p_larger: float = 1.0
    p_smaller: float = 1.0
    steady: bool = True
    missing: tuple[str, ...] = ()
    unlike: tuple[str, ...] = ()

    @property
    def helped(self) -> bool:
        """Whether it is more robust than every control, beyond what chance explains."""
        return self.word == "helped"

    @property
    def word(self) -> str:
        """The finding in a word or two, empty where there is no control."""
        if self.beyond is None:
            return ""
        if self.p >= LEVEL or not self.steady:
            return "did not help"
        if self.beyond.points < 0:
            return "did worse"
        return "helped" if not self.missing else "cannot be said to have helped"

    @property
    def larger(self) -> bool:
        """Whether flips need larger removals than under each control: all that there is to see where nothing holds."""
        return self.p_larger < LEVEL and not self.missing

    @property
    def smaller(self) -> bool:
        """Whether smaller removals flip it than under some control."""
        return self.p_smaller < LEVEL

    @property
    def line(self) -> str:
        """The finding in one line."""
        if self.beyond is None or self.control is None:
            otherwise = f" (trained longer or otherwise: {', '.join(self.unlike)})" if self.unlike else ""
            lacking = f"there is no control to compare with{otherwise}"
            return f"{self.defense.name}: {lacking}, so that no claim can be made."
        judged, robust, area = self.beyond.decisive, self.beyond.robust, self.beyond.area
        what = f"{self.word} {'than a control' if self.word == 'did worse' else 'beyond its controls'}"
        if self.p < LEVEL and not self.steady:
            worse = self.beyond.points < 0
            what = "did worse than a control, but not in every seed" if worse else f"{what} in every seed"
        what += self._sizes
        to_valid = judged is not robust
        gains = f"robust accuracy{' to valid flips' if to_valid else ''} {_points(judged)} against {self.control.name}"
        gains += self.beyond.each
        if self.undefended is not None:
            gains += f" (against the undefended model {_points(self.undefended.decisive)})"
        gains += f", to all flips {_points(robust)} against {self.control.name}" if to_valid else ""
        return (
            f"{self.defense.name} {what}: {gains}, p {probability(self.p)}, curve area {_points(area)} (below 0, flips "
            f"are fewer or larger){self._lacking}; {whole(self.beyond.samples)} paired samples, "
            f"{_seeds(self.beyond.by_seed)}."
        )

    @property
    def _sizes(self) -> str:
        """What is claimed of the sizes of flips, and the figure of the control that decides it."""
        told = "over the samples that both are flipped on, curve area"
        if self.larger and not self.helped:
            control, found = max(self.against, key=lambda pair: pair[1].p_larger)
            return f", though flips need larger removals ({told} {_points(found.larger)} against {control.name})"
        if self.smaller:
            ahead = [pair for pair in self.against if (pair[1].larger["value"] or 0) > 0]
            control, found = min(ahead, key=lambda pair: pair[1].p_larger)
            return f", and smaller removals flip it than under {control.name} ({told} {_points(found.larger)})"
        return ""

    @property
    def _lacking(self) -> str:
        return f"; not compared with {', '.join(self.missing)}, which share no sample" if self.missing else ""


@dataclass(frozen=True)
class Further:
    """What is left where an attack is added to those that all hardened models were attacked by.

    Attributes:
        attack: only the models here were attacked by it.
        held: the models, the seeds of each that have all of these attacks, and the figures under them together; see
            `Grid.worst`.
        differences: of a defence to a control of its, of every two.
    """

    attack: str
    held: Sequence[tuple[Defended, Sequence[Any], dict[str, Estimate]]]
    differences: Sequence[tuple[Defended, Defended, Difference]]

    @property
    def line(self) -> str:
        """The finding in one line."""
        metric = "robust_to_valid" if all(d.judged for d, _, _ in self.held) else "robust_accuracy"
        over = list(dict.fromkeys(_seeds(seeds) for _, seeds, _ in self.held))
        held = ", ".join(
            f"{figure(worst[metric]['value'], 'rate')} % {d.title}{f' ({_seeds(seeds)})' if len(over) > 1 else ''}"
            for d, seeds, worst in self.held
        )
        # Of each defence the control that leaves it the least.
        least = {d.name: (d, c, x) for d, c, x in sorted(self.differences, key=lambda it: it[2].gain, reverse=True)}
        each = "".join(
            f"; {d.name} against {c.name} {_points(found.decisive)}{found.each}, p {probability(found.p)}"
            for d, c, found in (least[d.name] for d, _, _ in self.held if d.name in least)
        )
        what = " to valid flips" if metric == "robust_to_valid" else ""
        where = f" ({over[0]})" if len(over) == 1 else ""
        return f"With {self.attack} added to the attacks{where}, robust accuracy{what} is {held}{each}."


@dataclass(frozen=True)
class Grid:
    """The defences of one model on one dataset, undefended first, controls next.

    Attributes:
        attacks: those that were run on all hardened models, in order; the worst case is over the removals among them.
    """

    dataset: str
    model: str
    defenses: list[Defended]
    attacks: list[str]

    @property
    def name(self) -> str:
        return f"{self.dataset} · {self.model}"

    def fewer(self, defense: Defended) -> str:
        """Which seeds a defence is over, where others are over more; else nothing."""
        own = defense.seeds(self.attacks)
        others = {seed for other in self.defenses for seed in other.seeds(self.attacks)}
        return "" if others <= set(own) else f" ({_seeds(own)})"

    @cached_property
    def further(self) -> list[Further]:
        """What the removal attacks show that only some of the hardened models were attacked by."""
        rows = {name: row for d in self.defenses if not d.undefended for name, row in d.attacks.items()}
        found = []
        for name in (name for name, row in rows.items() if name not in self.attacks and row.kind == "removal"):
            attacks = [*self.attacks, name]
            own = [d for d in self.defenses if name in d.attacks]
            run_on = [(d, d.seeds(attacks)) for d in own]
            held = [(d, seeds, self.worst(d, attacks, seeds)) for d, seeds in run_on if seeds]
            pairs = [(d, c) for d in own if not (d.control or d.undefended) for c in own if c.controls(d)]
            each = [(d, c, self.difference(d, c, attacks)) for d, c in pairs]
            if held:
                found.append(Further(name, held, [(d, c, x) for d, c, x in each if x is not None]))
        return found

    @property
    def left_out(self) -> str:
        """Which seeds of which models have no worst case, since not all of its attacks were run on them."""
        places: dict[str, list[str]] = {}
        for defense in self.defenses:
            every = {run.about.get("seed") for row in defense.removals(self.attacks) for run in row.runs}
            if left := sorted(every - set(defense.seeds(self.attacks)), key=str):
                places.setdefault(_seeds(left), []).append(defense.name)
        told = "; ".join(f"{seeds} of {', '.join(names)}" for seeds, names in places.items())
        return f"Not in the worst case, as not all of its attacks were run there: {told}." if told else ""

    def worst(self, defense: Defended, attacks: Sequence[str] = (), seeds: Sequence[Any] = ()) -> dict[str, Estimate]:
        """Clean and robust accuracies, and the curve area under several removal attacks together.

        Args:
            attacks: those that all were attacked by, unless said; seeds: all that these were run on, unless said.
        """
        attacks = attacks or self.attacks
        found = [defense.outcomes(seed, attacks) for seed in seeds or defense.seeds(attacks)]
        return {
            "clean_accuracy": pooled([{key: 100.0 * o.right for key, o in own.items()} for own in found], "rate"),
            "robust_accuracy": pooled([{key: o.robust for key, o in own.items()} for own in found], "rate"),
            "robust_to_valid": pooled([{key: o.robust_to_valid for key, o in own.items()} for own in found], "rate"),
            "curve_area": pooled([{key: o.area for key, o in own.items() if o.right} for own in found]),
        }

    @property
    def said(self) -> list[str]:
        """The findings, a line each."""
        lines = [*(verdict.line for verdict in self.verdicts), *(more.line for more in self.further)]
        return [*lines, self.left_out] if self.left_out else lines

    def difference(self, a: Defended, b: Defended, attacks: Sequence[str] = ()) -> Difference | None:
        """`a` less `b` under several removal attacks together (those that all were attacked by, unless said), on the
        seeds that both have; None where they share no sample."""
        robust: dict[Any, dict[Any, float]] = {}
        valid, area, larger = dict(robust), dict(robust), dict(robust)
        attacks = [name for name in attacks or self.attacks if name in a.attacks and name in b.attacks]
        shared = [seed for seed in a.seeds(attacks) if seed in b.seeds(attacks)]
        for seed in shared:
            first, second = a.outcomes(seed, attacks), b.outcomes(seed, attacks)
            both = {key: (first[key], second[key]) for key in first if key in second}
            if not both:
                continue
            robust[seed] = {key: x.robust - y.robust for key, (x, y) in both.items()}
            valid[seed] = {key: x.robust_to_valid - y.robust_to_valid for key, (x, y) in both.items()}
            area[seed] = {key: x.area - y.area for key, (x, y) in both.items() if x.right and y.right}
            sizes = {key: (x.decisive, y.decisive) for key, (x, y) in both.items() if x.right and y.right}
            flipped = {key: pair for key, pair in sizes.items() if np.isfinite(pair).all()}
            larger[seed] = {key: _score(x) - _score(y) for key, (x, y) in flipped.items()}
        if not robust:
            return None
        decisive = valid if a.judged and b.judged else robust
        return Difference(
            *(pooled(list(robust.values())), pooled(list(valid.values()))),
            *(pooled(list(area.values())), pooled(list(larger.values()))),
            p=sign_flip(over_seeds(list(decisive.values()))),
            p_larger=sign_flip(over_seeds(list(larger.values()))),
            samples=sum(map(len, robust.values())),
            by_seed={seed: float(np.mean(list(own.values()))) for seed, own in decisive.items()},
        )

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """One for each defence that is no control."""
        found = []
        for defense in self.defenses:
            if defense.control or defense.undefended:
                continue
            match = [other for other in self.defenses if other.base == defense.base]
            plain = next((other for other in match if other.undefended), None)
            gain = None if plain is None else self.difference(defense, plain)
            against = [(c, self.difference(defense, c)) for c in match if c.controls(defense)]
            controls = [(c, difference) for c, difference in against if difference is not None]
            missing = tuple(c.name for c, difference in against if difference is None)
            unlike = tuple(c.name for c in match if c.control and not c.controls(defense))
            found.append(replace(_judged(defense, gain, controls), missing=missing, unlike=unlike))
        judged = [verdict for verdict in found if verdict.beyond is not None]
        p = iter(holm([v.p for v in judged]))
        larger, smaller = iter(holm([v.p_larger for v in judged])), iter(holm([v.p_smaller for v in judged]))
        return [
            v if v.beyond is None else replace(v, p=next(p), p_larger=next(larger), p_smaller=next(smaller))
            for v in found
        ]


def _judged(defense: Defended, gain: Difference | None, controls: Sequence[tuple[Defended, Difference]]) -> Verdict:
    """The verdict on a defence, before it is corrected for others."""
    # Of equal ones the control that leaves the least gain; among equals again, in the size of the flips.
    ranked = sorted(controls, key=lambda pair: pair[1].gain)
    if not ranked:
        return Verdict(defense, gain, controls, None, None)
    larger = all((beyond.larger["value"] or 0) < 0 for _, beyond in ranked)
    p_larger = max(beyond.p_larger for _, beyond in ranked) if larger else 1.0
    smaller = [beyond.p_larger for _, beyond in ranked if (beyond.larger["value"] or 0) > 0]
    p_smaller = min(1.0, min(smaller) * len(controls)) if smaller else 1.0
    worse = [pair for pair in ranked if pair[1].points < 0]
    if worse:
        steadily = [pair for pair in worse if max(pair[1].by_seed.values()) < 0]
        control, beyond = min(steadily or worse, key=lambda pair: pair[1].p)
        p, steady = min(1.0, beyond.p * len(controls)), bool(steadily)
    elif ranked[0][1].points == 0:
        (control, beyond), p, steady = ranked[0], 1.0, True
    else:
        control, beyond = max(ranked, key=lambda pair: pair[1].p)
        p, steady = beyond.p, all(points > 0 for _, other in ranked for points in other.by_seed.values())
        if not steady and p < LEVEL:  # the one that stands against it
            control, beyond = min(ranked, key=lambda pair: min(pair[1].by_seed.values()))
    return Verdict(defense, gain, controls, control, beyond, p, p_larger, p_smaller, steady)


def grids(runs: Sequence[Run]) -> list[Grid]:
    """The runs by dataset and model, each with its defences. Attacks on a smoothed vote are left to `muroan certify`.

    Raises:
        MuroanError: no run is of a hardened model.
    """
    if not any(run.about.get("defense") for run in runs):
        raise MuroanError(
            "no run is of a hardened model: `muroan harden defense=NAME`, then `muroan attack defense=NAME`, and name "
            "the folders of these attacks and of those on the undefended model in runs"
        )
    runs = [run for run in runs if not run.about.get("smoothed")]
    found = []
    for place in dict.fromkeys((run.dataset, str(run.about["model"])) for run in runs):
        own = [run for run in runs if (run.dataset, str(run.about["model"])) == place]
        defenses = _defenses(own)
        if all(d.undefended for d in defenses):
            continue
        found.append(Grid(*place, defenses, _common(defenses)))
    return found


def _common(defenses: Sequence[Defended]) -> list[str]:
    """The attacks that all hardened models were attacked by, less removals that would take a seed from most of these,
    or leave them none in common."""
    hardened = [d for d in defenses if not d.undefended]
    order = dict.fromkeys(name for d in defenses for name in d.attacks)
    names = [name for name in order if all(name in d.attacks for d in hardened)]

    def others(name: str) -> list[str]:
        return [n for n in names if n != name]

    def shared(attacks: Sequence[str]) -> int:
        return len(set.intersection(*(set(d.seeds(attacks)) for d in hardened)))

    def runs(name: str) -> int:
        return sum(len(d.attacks[name].runs) for d in hardened)

    def taken(name: str) -> int:
        return sum(len(d.seeds(names)) < len(d.seeds(others(name))) for d in hardened)

    while len(removals := [row.name for row in hardened[0].removals(names)]) > 1:
        if not shared(names):
            names.remove(max(removals, key=lambda name: (shared(others(name)), -runs(name))))
        elif 2 * max(map(taken, removals)) > len(hardened):
            names.remove(max(removals, key=lambda name: (taken(name), -runs(name))))
        else:
            break
    return names


def _defenses(runs: Sequence[Run]) -> list[Defended]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_setup(run), []).append(run)
    variants: dict[str, set[tuple[str, ...]]] = {}
    for run in runs:
        variants.setdefault(run.attack, set()).add(_variant(run))
    names = _names(groups)
    found = []
    for key, group in groups.items():
        attacks: dict[str, list[Run]] = {}
        for run in group:
            told = [word for word in _variant(run) if any(word not in other for other in variants[run.attack])]
            name = f"{run.attack} ({', '.join(told)})" if told else run.attack
            attacks.setdefault(name, []).append(run)
        control = any((run.about.get("training") or {}).get("control") for run in group)
        rows = {name: Row(tuple(_one_a_seed(names[key], name, own)), name) for name, own in sorted(attacks.items())}
        undefended = not group[0].about.get("defense")
        found.append(Defended(names[key], control, rows, undefended, _base(group[0]), _effort(group[0])))
    return sorted(found, key=lambda defense: defense.place)


def _one_a_seed(defense: str, attack: str, runs: Sequence[Run]) -> list[Run]:
    seeds = [run.about.get("seed") for run in runs]
    if len(set(seeds)) < len(seeds):
        raise MuroanError(
            f"{defense}, {attack}: {len(runs)} runs with the seeds {', '.join(map(str, seeds))}, and nothing tells "
            f"which of one seed to take ({', '.join(run.folder for run in runs[:4])}): name fewer folders in runs"
        )
    return sorted(runs, key=lambda run: str(run.about.get("seed")))


def _setup(run: Run) -> str:
    """What decides how a model was hardened, apart from the seed."""
    return json.dumps([run.about.get("defense"), _options(run)], sort_keys=True)


def _base(run: Run) -> str:
    """What decides how a model was trained before it was hardened, apart from the seed."""
    return json.dumps(run.training, sort_keys=True)


def _effort(run: Run) -> str:
    """How long, and how, a model was hardened, whatever by."""
    told = ("epochs", "batches", "lr", "weight_decay", "warmup", "clip", "start")
    hardening = run.hardening.get("hardening", {})
    return json.dumps({key: hardening.get(key) for key in told})


def _options(run: Run) -> dict[str, Any]:
    return {**run.hardening, **run.training}


# Of an attack's identity: what is no setting of the attack, and what has words of its own.
NO_SETTING = ("model", "seed", "weights", "keep_media", "defense", "certification")
SAID = ("attack.run", "dataset.test_limit", "threat_model.max_queries", "attack.valid_only")


def _variant(run: Run) -> tuple[str, ...]:
    """What tells an attack from the same one under other conditions."""
    identity = run.identity
    budget = (identity.get("threat_model") or {}).get("max_queries")
    words = [f"{whole(budget)} queries" if budget else "no limit", "valid flips" if valid_only(run) else "all flips"]
    settings = flat({key: value for key, value in identity.items() if key not in NO_SETTING})
    return *words, *(f"{key}={value}" for key, value in settings.items() if key not in SAID)


def valid_only(run: Run) -> bool:
    """Whether the attack looks for flips alone that leave the label right."""
    attack = run.identity.get("attack")
    return isinstance(attack, dict) and bool(attack.get("valid_only"))


def _names(groups: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """What each group is called: the defence, and the settings in which it differs from others of the name."""
    settings = {
        key: (str(runs[0].about.get("defense") or UNDEFENDED), flat(_options(runs[0]))) for key, runs in groups.items()
    }
    names, differing = {}, {}
    for key, (name, own) in settings.items():
        others = [options for other, (title, options) in settings.items() if title == name and other != key]
        differing[key] = [
            f"{k.removeprefix('defense.').removeprefix('hardening.')}={v}"
            for k, v in own.items()
            if any(o.get(k) != v for o in others)
        ]
    longest = max(map(len, differing.values()), default=0)
    for shown in range(min(3, longest), longest + 1):  # no more than it takes to tell them apart
        names = {
            key: f"{name} ({', '.join(differing[key][:shown])})" if differing[key] else name
            for key, (name, _) in settings.items()
        }
        if len(set(names.values())) == len(names):
            break
    return names


def _seeds(seeds: Iterable[Any]) -> str:
    """Some seeds by their names."""
    told = ", ".join(map(str, seeds))
    return f"seed{'s'[: ',' in told]} {told or 'none'}"


def _points(estimate: Estimate) -> str:
    if estimate["value"] is None:
        return "not to be had"
    if estimate["value"] == estimate["low"] == estimate["high"] == 0:
        return "+0.0 points (the same on every sample)"  # which another sample need not be
    return f"{estimate['value']:+.1f} points [{estimate['low']:+.1f}, {estimate['high']:+.1f}]"
