"""What a run reads of each source at given weights, as training mixes them: by rows."""

from dataclasses import dataclass

from common.config import ConfigError, config
from data_prep.card.facts import Facts
from data_prep.split import TRAIN


@config
class Mixture:
    """The `key=value` words of `python -m data_prep report`."""

    weights: dict[str, float] | None = None
    """share of each source in the rows read, on any scale; by default as many as it has rows"""
    tokens: int | None = None
    """slots (rows × row_tokens) of the run; by default as many as the training rows have"""


@dataclass(frozen=True)
class Mixed:
    """A source in a mixture: its training rows, its share of what there is and of what is read."""

    source: str
    rows: int
    share_of_rows: float
    share_read: float
    epochs: float


def mix(facts: Facts, mixture: Mixture) -> list[Mixed]:
    """The mixture, source by source; raises ConfigError for a weight that fits no source."""
    entries = facts.manifest["splits"][TRAIN]["sources"]
    rows = {source: entry["rows"] for source, entry in sorted(entries.items())}
    weights = mixture.weights if mixture.weights is not None else dict(rows)
    for source, weight in weights.items():
        if source not in rows:
            raise ConfigError(
                f"weights.{source}: {facts.folder} has no such source to train on; it has "
                f"{', '.join(rows)}"
            )
        if not weight > 0:
            raise ConfigError(f"weights.{source} is {weight}, it must be above 0")
    if not weights:
        raise ConfigError("weights names no source; leave it out")
    if mixture.tokens is not None and mixture.tokens <= 0:
        raise ConfigError(f"tokens is {mixture.tokens}, it must be above 0")
    total = sum(rows.values())
    read = total
    if mixture.tokens is not None:
        read = -(-mixture.tokens // facts.manifest["row_tokens"])
    whole = sum(weights.values())
    return [
        Mixed(
            source,
            count,
            count / total,
            weights.get(source, 0.0) / whole,
            read * weights.get(source, 0.0) / whole / count,
        )
        for source, count in rows.items()
    ]
