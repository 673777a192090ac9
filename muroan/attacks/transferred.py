"""Removals that flipped another model, tried on this one."""

from __future__ import annotations

import json
from pathlib import Path

from muroan.attacks.base import Attack, AttackedSample, Search
from muroan.errors import MuroanError
from muroan.modalities import Region, Removal


class Transferred(Attack):
    """Asks of each sample one removal, that which flipped it in a finished run.

    Of another model, or of this one before it was hardened. A sample that the run did not flip holds.

    Args:
        run: the run's folder.

    Raises:
        MuroanError: no folder was named, or it has no finished removal attack; when searching, it has no record of a
            sample, or the other model took the sample in another size (`muroan transfer` scales).
    """

    guided = False

    def __init__(self, run: str | None = None):
        if run is None:
            raise MuroanError(
                "attack.run must name the folder of a finished removal attack, such as attack.run=outputs/attack/NAME"
            )
        file = Path(run) / "records.jsonl"
        if not file.is_file():
            raise MuroanError(f"attack.run={run}: there is no records.jsonl, as a finished run of `muroan attack` has")
        try:
            records = [json.loads(line) for line in file.read_text().splitlines()]
        except ValueError as error:
            raise MuroanError(f"{file} has a line that is no record ({error}): attack that model again") from None
        if any(record.get("kind", "removal") != "removal" for record in records):
            raise MuroanError(f"attack.run={run} is no removal attack: what it did to its samples is not on record")
        self.known = {record["id"] for record in records}
        self.removals = {
            record["id"]: Removal.of(*(Region(m, tuple(start), tuple(stop)) for m, start, stop in record["regions"]))
            for record in records
            if record["status"] == "flipped" and record["adversarial_label"] != record["label"]
        }
        self.totals = {record["id"]: record["total"] for record in records}

    def search(self, sample: AttackedSample) -> Search:
        if sample.id not in self.known:
            raise MuroanError(f"attack.run has no record of sample {sample.id!r}: choose a run on the same samples")
        removal = self.removals.get(sample.id)
        if removal is None:
            return None
        for region in removal.regions:
            layout, total = sample.layouts.get(region.modality), self.totals[sample.id][region.modality]
            grid = None if layout is None else layout.grid
            # The words of a text are the same ones, however many of them a model takes.
            same = layout is not None and (bool(layout.words) or layout.count == total)
            if grid is None or not same or any(b > side for b, side in zip(region.stop, grid, strict=True)):
                raise MuroanError(
                    f"attack.run removed {region.start} to {region.stop} of {total} elements of {region.modality} from "
                    f"sample {sample.id!r}, which this model takes as {grid}: choose a run on inputs of the same size, "
                    f"or let `muroan transfer` scale the regions"
                )
        yield [removal]
        return removal
