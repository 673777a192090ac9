"""MMCert (Wang et al., CVPR 2024, arXiv 2403.19080): train on, and vote over, inputs of which little is kept.

Of each modality k random elements are kept, drawn independently of the other modalities: pixels or square patches of
an image, samples or frames of a sound, tokens of a text. Lost pixels and sound become the modality's zero; kept tokens
close ranks as after a deletion, and special tokens stay. A single altered element then matters little, and
`certificate` says how little at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from muroan.attacks.base import ThreatModel
from muroan.data.samples import Batch
from muroan.defenses.base import Defense
from muroan.errors import MuroanError, check_whole
from muroan.modalities import Audio, Image, Modality, Text, delete_positions, stable_seed
from muroan.models.base import Features, MultimodalModel

GOLDEN, MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def random_bits(seeds: Tensor, start: int, stop: int) -> Tensor:
    """Outputs `start` to `stop` of SplitMix64 (Steele, Lea and Flood 2014): the same on every device, in any order.

    Args:
        seeds: (B,) int64.

    Returns:
        (B, stop - start) int64, all 64 bits random.
    """

    def signed(constant: int) -> int:
        return constant - (1 << 64) if constant >> 63 else constant

    def mixed(z: Tensor, bits: int) -> Tensor:
        return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))  # a shift that draws in zeros

    counter = torch.arange(start + 1, stop + 1, device=seeds.device)
    z = seeds[:, None] + counter * signed(GOLDEN)
    z = mixed(z, 30) * signed(MIX[0])
    z = mixed(z, 27) * signed(MIX[1])
    return mixed(z, 31)


def choose(scores: Tensor, real: Tensor, k: Tensor) -> Tensor:
    """The k elements with the lowest scores: a random choice where the scores are random.

    Args:
        scores: (..., P); real: (..., P) bool, which positions are elements; k: (...) how many to choose.

    Returns:
        (..., P) bool.
    """
    highest = torch.iinfo(scores.dtype).max
    scores = scores.masked_fill(~real, highest)
    most = max(1, int(k.max()))
    lowest = scores.topk(most, largest=False).indices
    first = (torch.arange(most, device=k.device) < k[..., None]).expand(lowest.shape)
    return torch.zeros(scores.shape, dtype=torch.bool, device=k.device).scatter(-1, lowest, first) & real


class Ablation:
    """Keeps k random elements of each modality and takes the others away.

    Args:
        modalities: of the model.
        keep: by modality, a share of the input's own elements (at least one is kept), a number of elements, or None for
            all; entries for absent modalities are left alone.
        element: pixels a side of an image's patches, samples of a sound's frames; 1 where not given.

    Raises:
        MuroanError: a modality has no entry, no elements, or too few of them; an entry that is no share and no number.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        keep: Mapping[str, float | None],
        element: Mapping[str, int] | None = None,
    ):
        self.modalities, self.keep = dict(modalities), dict(keep)
        self.side: dict[str, int] = {name: (element or {}).get(name) or 1 for name in modalities}
        unknown = [name for name in {**keep, **(element or {})} if name not in {*modalities, "image", "text", "audio"}]
        if unknown:
            raise MuroanError(f"defense.keep and defense.element name {unknown}, the model takes {list(modalities)}")
        for name, modality in modalities.items():
            if not isinstance(modality, Image | Text | Audio):
                raise MuroanError(
                    f"mmcert knows no elements of {name!r} ({type(modality).__name__}): it keeps elements of images, "
                    f"texts and sounds"
                )
            if name not in keep:
                raise MuroanError(f"defense.keep has no entry for {name!r}: give a share, a number, or null for all")
            share = keep[name]
            number = share is None or (isinstance(share, int | float) and not isinstance(share, bool))
            if not number or (share is not None and (not share > 0 or (isinstance(share, float) and share > 1))):
                raise MuroanError(
                    f"defense.keep.{name} must be a share above 0 and at most 1.0, a number of elements, or null, "
                    f"got {share}"
                )
            longest = max(modality.shape[-2:]) if isinstance(modality, Image) else modality.shape[0]
            side = self.side[name]
            if not isinstance(side, int) or not 1 <= side <= longest or (isinstance(modality, Text) and side != 1):
                raise MuroanError(
                    f"defense.element.{name} must be {'1' if isinstance(modality, Text) else f'1 to {longest}'}, "
                    f"got {side}"
                )
            if not isinstance(modality, Text):
                self.check(name, math.prod(self.grid(name)))

    @property
    def texts(self) -> list[str]:
        """The modalities whose elements are tokens."""
        return [name for name, modality in self.modalities.items() if isinstance(modality, Text)]

    def grid(self, name: str) -> tuple[int, ...]:
        """The grid of positions at which elements may lie: of patches, of frames, of tokens."""
        modality = self.modalities[name]
        sides = modality.shape[1:] if isinstance(modality, Image) else modality.shape
        return tuple(-(-side // self.side[name]) for side in sides)

    def elements(self, name: str, x: Tensor) -> Tensor:
        """Which positions of inputs (B, *shape) are elements: (B, P) bool, with P positions in row-major order.

        Of a text these are all tokens but the special ones around it and the padding. Of a sound they are all
        positions, the silence behind a short one included: where it ends an attacker could change, and so n.
        """
        modality = self.modalities[name]
        if not isinstance(modality, Text):
            return torch.ones(len(x), math.prod(self.grid(name)), dtype=torch.bool, device=x.device)
        tokenizer = modality.tokenizer
        position = torch.arange(x.shape[1], device=x.device)
        padding = x == tokenizer.pad_id
        if tokenizer.pad_id in tokenizer.suffix:  # as CLIP's: the first one ends the text
            end = torch.where(padding, position, x.shape[1]).amin(1)
        else:
            end = torch.where(padding, 0, position + 1).amax(1) - len(tokenizer.suffix)
        return (position >= len(tokenizer.prefix)) & (position < end[:, None])

    def kept(self, name: str, n: int) -> int:
        """How many of n elements are kept; all of them where that is fewer, as an attacker may leave too few."""
        share = self.keep[name]
        if share is None:
            return n
        return min(n, max(1, math.floor(share * n + 0.5)) if isinstance(share, float) else int(share))

    def steady(self, name: str, n: int) -> int:
        """How many of n elements can be deleted before another number of the others is kept."""
        if not isinstance(self.modalities[name], Text):
            return n  # nothing shortens an image or a padded sound
        k = self.kept(name, n)
        return next((r - 1 for r in range(1, n + 1) if self.kept(name, n - r) != k), n)

    def check(self, name: str, n: int, where: str = "") -> None:
        """Raises MuroanError where more elements shall be kept than an untouched input has."""
        share = self.keep[name]
        if share is not None and not isinstance(share, float) and share > n:
            raise MuroanError(
                f"mmcert keeps k={share} elements of {name}, but there are n={n}{where}: "
                f"set defense.keep.{name} to {n} or less, or to a share such as 0.5"
            )

    def seeds(self, name: str, parts: Sequence[object], device: torch.device) -> Tensor:
        """(B,) seeds, one of each of the given parts."""
        return torch.tensor([stable_seed("mmcert", name, part) for part in parts], device=device)

    def scores(self, name: str, seeds: Tensor, start: int, stop: int) -> Tensor:
        """(B, stop - start, P) random numbers for the draws `start` to `stop` of each seed."""
        positions = math.prod(self.grid(name))
        return random_bits(seeds, start * positions, stop * positions).view(len(seeds), -1, positions)

    def ablate(self, name: str, x: Tensor, scores: Tensor) -> Tensor:
        """Keep the k elements with the lowest scores.

        Args:
            x: (B, *shape); scores: (B or 1, S, P), S draws of each input.

        Returns:
            (B * S, *shape), all draws of the first input first.
        """
        modality, draws = self.modalities[name], scores.shape[1]
        real = self.elements(name, x)
        if isinstance(modality, Text):
            kept = [self.kept(name, n) for n in real.sum(1).tolist()]
        else:
            real, kept = real[:1], [self.kept(name, real.shape[1])]
        chosen = choose(scores, real[:, None], torch.tensor(kept, device=x.device)[:, None].expand(-1, draws))
        if isinstance(modality, Text):
            rows = x.repeat_interleave(draws, 0)
            return delete_positions(rows, (real[:, None] & ~chosen).flatten(0, 1), modality.tokenizer.pad_id)
        grid = self.grid(name)
        mask = chosen.view(*chosen.shape[:2], *grid)
        for axis, side in enumerate(x.shape[-len(grid) :], start=-len(grid)):
            mask = mask.repeat_interleave(self.side[name], axis).narrow(axis, 0, side)
        if isinstance(modality, Image):
            mask = mask[:, :, None]  # the same for all channels
        return (x[:, None] * mask).flatten(0, 1)


class MMCert(Defense):
    """Trains on ablated inputs: the base model of MMCert.

    Validation and test judge it on one ablation of each sample, always the same, since that is what it is made for.

    Args:
        keep, element: see `Ablation`.
        threat_model, seed, training: see `Defense`.
    """

    voting = True

    def __init__(
        self,
        model: MultimodalModel,
        keep: Mapping[str, float | None],
        element: Mapping[str, int] | None = None,
        threat_model: ThreatModel | None = None,
        seed: int = 0,
        **training: Any,
    ):
        super().__init__(model, 1.0, threat_model, seed, **training)
        self.ablation = Ablation(model.modalities, keep, element)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if len(batch) == 0:
            return self.no_loss()
        # Anew in every epoch, and the same for a run that was resumed or shared out.
        parts = [f"{self.seed} {self.current_epoch} {sample.id}" for sample in batch.samples]
        loss = F.cross_entropy(self.model(self.ablated(batch, parts)).logits, batch.labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def ablated(self, batch: Batch, parts: Sequence[object]) -> dict[str, Tensor]:
        """(B, *shape) a modality, each sample ablated by a seed of its own.

        Raises:
            MuroanError: a sample has fewer elements than shall be kept.
        """
        inputs, given = {}, self.inputs(batch)
        for name in self.model.modalities:
            x = given[name][batch.rows[name]]
            for sample, n in zip(batch.samples, self.ablation.elements(name, x).sum(1).tolist(), strict=True):
                self.ablation.check(name, n, f" in sample {sample.id!r}")
            seeds = self.ablation.seeds(name, parts, x.device)
            inputs[name] = self.ablation.ablate(name, x, self.ablation.scores(name, seeds, 0, 1))
        return inputs

    def _judge(self, batch: Batch, split: str) -> None:
        if len(batch):
            rows = torch.arange(len(batch), device=batch.labels.device)
            inputs = self.ablated(batch, [sample.id for sample in batch.samples])
            batch = Batch(batch.samples, inputs, dict.fromkeys(inputs, rows), batch.labels, batch.bad)
        super()._judge(batch, split)


class SmoothedModel(MultimodalModel):
    """A model that votes over ablations of its input. It can be attacked like any other.

    The masks are drawn once, from the seed: the same question has the same answer, wherever it stands in a batch. An
    attacker can find out what they are, which fresh draws would not allow; certified is the vote over all masks.

    Args:
        model: the base model.
        keep, element: see `Ablation`.
        votes: how many ablations vote.
        rows: of the base model's batches.

    `encode` hands over the input itself, `fuse` asks the base model. The fusion embedding (B, D + C) is the mean of the
    votes' embeddings, and beside it the share of the votes for each class, which are the logits. Ties are broken by the
    mean of the votes' probabilities, which count for half a vote.
    """

    def __init__(
        self,
        model: MultimodalModel,
        keep: Mapping[str, float | None],
        element: Mapping[str, int] | None = None,
        votes: int = 100,
        seed: int = 0,
        rows: int = 256,
    ):
        super().__init__(model.modalities, model.num_classes)
        check_whole("certification", votes=votes)
        check_whole("SmoothedModel", rows=rows)
        self.model, self.votes, self.seed, self.rows = model, votes, seed, rows
        self.pretrained = model.pretrained
        self.ablation = Ablation(model.modalities, keep, element)

    def encode(self, modality: str, x: Tensor) -> Features:
        return x

    def fuse(self, features: dict[str, Features]) -> Tensor:
        inputs: dict[str, Tensor] = features  # type: ignore[assignment]
        count = len(next(iter(inputs.values())))
        step = max(1, self.rows // count)
        embedding: Tensor | None = None
        for start in range(0, self.votes, step):
            stop = min(self.votes, start + step)
            found, logits = self.model(self.ablations(inputs, start, stop))
            exact = torch.promote_types(logits.dtype, torch.float32)
            ballots = F.one_hot(logits.argmax(1), self.num_classes) + logits.to(exact).softmax(1) / (2 * self.votes)
            part = torch.cat([found.to(exact), ballots], 1).unflatten(0, (count, stop - start)).sum(1)
            embedding = part if embedding is None else embedding + part
        assert embedding is not None
        return embedding / self.votes

    def ablations(self, inputs: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """The inputs of votes `start` to `stop`: (B * votes, *shape) a modality, from inputs (B, *shape)."""
        ablated = {}
        for name, x in inputs.items():
            seeds = self.ablation.seeds(name, [self.seed], x.device)
            ablated[name] = self.ablation.ablate(name, x, self.ablation.scores(name, seeds, start, stop))
        return ablated

    def head(self, embedding: Tensor) -> Tensor:
        return embedding[:, -self.num_classes :]
