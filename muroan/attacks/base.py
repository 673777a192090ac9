"""What an attack is: a search, written as a plain generator over one sample.

    class RandomRemoval(Attack):
        def search(self, sample):
            for _ in range(self.draws):
                removal = sample.draw(parts=2)
                (response,) = yield [removal]          # ask any number of removals, get as many responses
                if sample.flipped(response):
                    return removal

No batching, no device, no counting in here: the `QueryEngine` runs many searches at once, keeps the ledger,
enforces the budget and recomputes success and size of what a search returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from muroan.attacks.target import BudgetExhausted, Perturbation, Target
from muroan.errors import MuroanError, check_names, check_whole
from muroan.modalities import Layout, Modality, Region, Removal, removed_elements

__all__ = ["Ask", "Attack", "AttackedSample", "BatchAttack", "BudgetExhausted", "Perturbation", "Response", "Search"]
__all__ += ["Target", "ThreatModel", "Together"]

Kind = Literal["removal", "perturbation", "corruption"]

Below = dict[Region, tuple[list[Region], list[Region]]]  # see `AttackedSample.below`

ROOTS = 64  # roots whose regions are remembered: one a modality and length


@dataclass(frozen=True, slots=True)
class Response:
    """What the model says to one removal.

    Attributes:
        label: predicted class.
        margin: logit of the sample's label minus the best other one; negative when flipped.
        embedding_argmax: position of the largest entry of the fusion embedding.
        embedding_shift: cosine distance of the fusion embedding to the clean one, 0 to 2.
        logits: (C,).
        embedding_margin: the entry of the fusion embedding that is largest when clean, minus the largest other one;
            negative when `embedding_argmax` has moved.
    """

    label: int
    margin: float
    embedding_argmax: int
    embedding_shift: float
    logits: np.ndarray
    embedding_margin: float = 0.0

    def __reduce__(self) -> tuple[type[Response], tuple[Any, ...]]:
        # What a dataclass with slots does of itself takes several times as long.
        seen = self.label, self.margin, self.embedding_argmax, self.embedding_shift, self.logits, self.embedding_margin
        return Response, seen


@dataclass(slots=True)
class Ask:
    """Questions to the model. A search may yield a plain list of removals for the default phase.

    Attributes:
        removals: asked in this order; with `until`, as far as needed, and drawn from lazily.
        phase: under which the ledger counts them.
        until: stop at the first response for which this holds. The search gets the responses up to and including
            it, as if it had asked one by one; the engine may run ahead to fill its batches, which costs forwards,
            not queries.
        admissible: whether the search takes note of flips among the answers, to return one if it ended now; False where
            it looks at something else, so that the trajectory does not credit it with them.
    """

    removals: Iterable[Removal]
    phase: str = "search"
    until: Callable[[Response], bool] | None = None
    admissible: bool = True


@dataclass(slots=True)
class Together:
    """A question that needs the model itself, asked for many samples at once.

    The engine runs `function` over a full batch of the samples whose searches ask it; what it returns, one item a
    sample, is what each search gets. The passes that the function makes are counted a row.

    Attributes:
        function: the same object for all samples, such as a method of the attack.
        phase: under which the ledger counts the passes.
    """

    function: Callable[[Target], Sequence[Any]]
    phase: str = "search"


# What comes back from an `Ask` is a list of responses, from a `Together` this sample's item.
Search = Generator[Ask | Together | Sequence[Removal], Any, Removal | Perturbation | None]


@dataclass(frozen=True)
class ThreatModel:
    """What the attacker may do.

    Attributes:
        replacement: what stands in for removed elements, by modality; a modality's own default where not given.
        min_side: regions whose longest side is no larger are not split, by modality, in elements; likewise.
        max_queries: distinct questions that an attack may ask about one sample; None for no limit.
    """

    replacement: Mapping[str, str] = field(default_factory=dict)
    min_side: Mapping[str, int] = field(default_factory=dict)
    max_queries: int | None = None

    def complete(self, modalities: Mapping[str, Modality]) -> ThreatModel:
        """The threat model with the modalities' defaults filled in; entries for absent modalities are left out.

        Raises:
            MuroanError: a replacement that a modality cannot take, a `min_side` or budget below 1, or one value where
                each modality has its own.
        """
        for option, value in (("replacement", self.replacement), ("min_side", self.min_side)):
            if not isinstance(value, Mapping):
                name = next(iter(modalities))
                raise MuroanError(
                    f"threat_model.{option} goes by modality, got {value!r} for all: "
                    f"threat_model.{option}.{name}={value}, and so on for {', '.join(modalities)}"
                )
        replacement = {n: m.replacements[0] for n, m in modalities.items()} | _given(self.replacement, modalities)
        min_side = {n: m.min_side for n, m in modalities.items()} | _given(self.min_side, modalities)
        for name, modality in modalities.items():
            modality.check_replacement(name, replacement[name])
            check_whole("threat_model.min_side", **{name: min_side[name]})
            if int(min_side[name]) != modality.min_side:  # the default is there for every size
                modality.check_min_side(name, int(min_side[name]))
        whole = isinstance(self.max_queries, int) and not isinstance(self.max_queries, bool)
        if self.max_queries is not None and (not whole or self.max_queries < 1):
            raise MuroanError(
                f"threat_model.max_queries must be a whole number, at least 1, or null, got {self.max_queries!r}"
            )
        return ThreatModel(replacement, {name: int(side) for name, side in min_side.items()}, self.max_queries)

    def beyond_defaults(self, modalities: Mapping[str, Modality]) -> dict[str, Any]:
        """The threat model as plain JSON, without what is a modality's default anyway: the same however it was
        spelled."""
        full = self.complete(modalities)
        return {
            "replacement": {n: r for n, r in full.replacement.items() if r != modalities[n].replacements[0]},
            "min_side": {n: side for n, side in full.min_side.items() if side != modalities[n].min_side},
            "max_queries": full.max_queries,
        }


def _given(options: Mapping[str, Any], modalities: Mapping[str, Modality]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in modalities and value is not None}


@dataclass
class AttackedSample:
    """One correctly classified sample, as a search sees it.

    Attributes:
        label: the true class, which the model predicts.
        clean: the model's response to nothing removed.
        modalities, layouts: what the input is made of.
        threat_model: complete.
        rng: this sample's own; its draws depend on the seed, the attack and the sample's id alone.
        valid: whether the label is still right after a removal, says the dataset; None where it cannot tell.
        proven: a search may set whether it asked every smaller removal; see `AttackResult.proven`.
        info: a search may write what it wants recorded, as plain JSON.
        below: the regions below each root, and the atoms among them; samples that are attacked alike may share one.
    """

    id: str
    label: int
    clean: Response
    modalities: Mapping[str, Modality]
    layouts: Mapping[str, Layout]
    threat_model: ThreatModel
    rng: np.random.Generator
    valid: Callable[[Removal], bool | None] | None = None
    proven: bool | None = None
    info: dict[str, Any] = field(default_factory=dict)
    below: Below = field(default_factory=dict, repr=False)
    _universes: dict[tuple[str, ...], list[Region]] = field(default_factory=dict, init=False, repr=False)

    def flipped(self, response: Response) -> bool:
        return response.label != self.label

    def root(self, modality: str) -> Region:
        """The region of all elements of a modality."""
        return self.modalities[modality].root(modality, self.layouts[modality])

    def split(self, region: Region) -> list[Region]:
        """The children of a region; empty where the threat model allows nothing finer."""
        return split(region, self.modalities, self.threat_model)

    def universe(self, *modalities: str) -> list[Region]:
        """All regions below the roots of the given (or all) modalities, depth first.

        Where nothing lies below the root (a text of one word), the universe is the root.
        """
        return [region for name in modalities or self.modalities for region in self._below(self.root(name))[0]]

    def atoms(self, *modalities: str) -> list[Region]:
        """Those of the universe that the threat model splits no further, in its order.

        They tile the input, so that every removal of the universe is a set of them and sizes add up.
        """
        return [region for name in modalities or self.modalities for region in self._below(self.root(name))[1]]

    def _below(self, root: Region) -> tuple[list[Region], list[Region]]:
        if root not in self.below:
            found: list[Region] = []
            atoms: list[Region] = []

            def descend(region: Region) -> None:
                children = self.split(region)
                if not children:
                    atoms.append(region)
                for child in children:
                    found.append(child)
                    descend(child)

            descend(root)
            if len(self.below) >= ROOTS:
                self.below.clear()
            self.below[root] = found or [root], atoms
        return self.below[root]

    def draw(self, parts: int, *modalities: str) -> Removal:
        """A removal of up to `parts` regions drawn uniformly from the universe of the given (or all) modalities."""
        universe = self._universes.get(modalities)
        if universe is None:
            universe = self._universes[modalities] = self.universe(*modalities)
        picks = self.rng.choice(len(universe), min(parts, len(universe)), replace=False)
        return Removal.of(*(universe[i] for i in picks))

    def chosen(self, modalities: Sequence[str] | None) -> list[str]:
        """The names of the modalities that an attack is to work on: all, where it names none.

        Raises:
            MuroanError: the model does not have one of them; they are no list of different names.
        """
        check_names("attack", modalities=modalities)
        if absent := [name for name in modalities or () if name not in self.modalities]:
            raise MuroanError(f"attack.modalities names {absent}, the model has {list(self.modalities)}")
        return list(modalities or self.modalities)

    def demand(self, attack: str, least: int, what: str) -> None:
        """Refuse to start a search whose first phase the budget has no room for.

        Args:
            least: queries that it takes; what: it takes them for.

        Raises:
            MuroanError: the budget is smaller.
        """
        budget = self.threat_model.max_queries
        if budget is not None and budget < least:
            raise MuroanError(
                f"threat_model.max_queries={budget} is too small for {attack}: its first phase asks {what} of sample "
                f"{self.id!r}; allow at least {least}, more where inputs are longer, and some 100 to find anything"
            )

    def size(self, removal: Removal) -> float:
        """Removed elements over elements of all modalities, in percent."""
        removed = sum(bits.bit_count() for bits in removed_elements(removal, self.layouts).values())
        return 100 * removed / sum(layout.count for layout in self.layouts.values())


def split(region: Region, modalities: Mapping[str, Modality], threat_model: ThreatModel) -> list[Region]:
    """The children of a region; empty where a (complete) threat model allows nothing finer."""
    if region.longest_side <= threat_model.min_side[region.modality]:
        return []
    return modalities[region.modality].split(region)


def descend(
    root: Region, modalities: Mapping[str, Modality], threat_model: ThreatModel, rng: np.random.Generator
) -> Region:
    """A random region below a root: its depth is drawn, then its place, so that large ones come as often as small ones.

    A root that cannot be split is the region.
    """
    path = [root]
    while children := split(path[-1], modalities, threat_model):
        path.append(children[rng.integers(len(children))])
    return path[rng.integers(1, len(path))] if len(path) > 1 else root


class Attack(ABC):
    """Base of every attack. Its name in records is the class name in snake case unless it sets `name`.

    Attributes:
        kind: what its search returns; see `AttackResult.kind`.
        needs_donors: whether it takes parts from other samples; see `Target.donors`.
        guided: whether the model's answers decide what it tries next, so that reports expect it to beat random removal.
        control: whether it is random removal: what a guided attack has to beat.
        apart: whether its searches may run in processes of their own (`QueryEngine.search_processes`): worth it where
            they compute much between their questions. They are asked and answered as ever, but ask removals alone, in
            lists, with an `until` that can be pickled.
        valid_only: whether only a flip counts after which the label is still right.
        goal: what a sample is brought to, where it is not simply another label: reports hold an attack against those of
            the same goal alone.
    """

    name = ""
    kind: Kind = "removal"
    needs_donors = False
    guided = True
    control = False
    apart = False
    valid_only = False
    goal = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = "".join("_" + c.lower() if c.isupper() else c for c in cls.__name__).lstrip("_")

    @abstractmethod
    def search(self, sample: AttackedSample) -> Search:
        """Yield removals to ask, get their responses, return a removal that flips the label, or None."""

    def attackable(self, label: int, classes: int) -> bool:
        """Whether a sample of this true class can be attacked at all; one that cannot is skipped.

        Raises:
            MuroanError: the attack does not fit a model of so many classes.
        """
        return True

    def reached(self, label: int, response: Response) -> bool:
        """Whether a response is what the attack is after; the engine judges its result by this.

        Args:
            label: the true class.
        """
        return response.label != label

    def cost(self, sample: AttackedSample, removal: Removal) -> float:
        """What the attack wants to be small in a removal that flips: the decoupled fraction, in percent.

        A record's trajectory has the flips that cost less than all before.
        """
        return sample.size(removal)


class BatchAttack(Attack):
    """Base of attacks that choose new values and work on a whole batch: they follow gradients, or query values.

    class SignStep(BatchAttack):
        def perturb(self, target):
            x = target.inputs["image"].clone()
            rows = target.able(torch.arange(len(target)), 2)  # samples whose budget allows a forward and a backward
            _, gradients = target.gradient(target.margin, rows=rows, of=["image"])
            x[rows] -= 0.1 * gradients["image"].sign()
            return target.perturbations({"image": x})
    """

    name = ""
    kind: Kind = "perturbation"

    @abstractmethod
    def perturb(self, target: Target) -> Sequence[Perturbation | None]:
        """One perturbation a sample of the batch, in order; None where nothing was found."""

    def search(self, sample: AttackedSample) -> Search:
        return (yield Together(self.perturb))
