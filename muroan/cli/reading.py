"""The commands that read the records of finished runs, and no model: `report`, `compare` and `defenses`."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from muroan.cli.jobs import folders

log = logging.getLogger("muroan")


def report(config: DictConfig) -> None:
    """Build the report of finished runs from their records alone."""
    from muroan.report import build as build_report

    page = build_report(folders(config.runs), Path(config.out))
    log.info("report: %s", page)


def compare(config: DictConfig) -> None:
    """Put finished runs side by side, from their records alone, and show the tables."""
    from muroan.report.compare import write

    page = write(folders(config.runs), Path(config.out))
    log.info("%s", page.read_text(encoding="utf-8"))
    log.info("comparison: %s", page)


def defenses(config: DictConfig) -> None:
    """Put defences beside each other and beside the undefended models, from the records of attacks on all of them."""
    from muroan.report.defenses import write

    page = write(folders(config.runs), Path(config.out))
    log.info("%s", page.read_text(encoding="utf-8"))
    log.info("defences: %s", page)
