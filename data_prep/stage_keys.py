"""What decides the content of each stage, as hashes, and what is redone when they change."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from common.config import config_to_dict
from common.files import write_json
from data_prep import packing, tasks
from data_prep.card.terms import ALL_TERMS
from data_prep.cleaning import add_cleaning_keys
from data_prep.config import DataPrep
from data_prep.inputs import EvaluationInput, Input
from data_prep.shards import FORMAT_VERSION
from data_prep.stages import Stage, stage_key

# Raised when a stage makes something else of the same input; results of an older one are redone.
VERSION = 5

# In out_dir: the hashes of what decided the stages, for the next run to compare.
SETTINGS_FILE = "settings.json"

Keys = dict[str, str]
Settings = dict[str, dict[str, str]]


def stage_keys(
    config: DataPrep,
    inputs: Sequence[Input],
    evaluation_inputs: Sequence[EvaluationInput],
    tokenizer: dict[str, Any] | None,
    lengths: Sequence[int],
) -> tuple[Keys, Settings]:
    """The key of every stage, known before any has run, and the hashes of its settings by name.

    tokenizer: the description of an existing one; lengths: all that have data sets.
    """
    keys: Keys = {}
    settings_of: Settings = {}

    def add(name: str, *before: str, **settings: Any) -> None:
        built_on = [keys[stage] for stage in before]
        settings |= {"version of data_prep": VERSION}
        keys[name] = stage_key(name, built_on=built_on, **settings)
        settings_of[name] = {key: stage_key(key, of=settings[key]) for key in settings}

    pubmed = [source.description() for source in inputs if source.source == "pubmed"]
    add("scan", inputs=pubmed)
    add("fold", "scan", part_records=tasks.FOLD_RECORDS)
    made = {
        "keep_retracted": config.keep_retracted,
        "pubmed": config_to_dict(config.pubmed),
        "redaction": config.redaction,
        "code_templates": sorted(set(config.code_templates)),
        "part_characters": config.part_characters,
    }
    add("documents", "fold", inputs=[source.description() for source in inputs], **made)
    add_cleaning_keys(config, evaluation_inputs, add)
    add("statistics", "kept", terms=ALL_TERMS)
    if tokenizer is not None:
        add("tokenizer", description=tokenizer)
    else:
        trained = config.tokenizer
        drawn = {"sample_bytes": trained.sample_bytes, "shares": trained.shares}
        add("sample", "kept", seed=config.seed, **drawn)
        add("tokenizer", "sample", vocab_size=trained.vocab_size)
    add("tokens", "kept", "tokenizer")
    for length in lengths:
        shape = {"row_tokens": config.row_tokens, "max_documents": config.max_documents}
        shape |= {"max_length": length, "plan_documents": config.plan_documents}
        shape |= {"look_ahead": packing.LOOK_AHEAD}
        add(f"plan-{length}", "tokens", seed=config.seed, **shape)
        size = {"rows_per_shard": config.rows_per_shard, "format": FORMAT_VERSION}
        add(f"rows-{length}", f"plan-{length}", **size)
    return keys, settings_of


def all_lengths(config: DataPrep) -> list[int]:
    """The lengths asked for, then those made by earlier runs: they share the tokenizer."""
    folders = (config.out_dir / "completions").glob("rows-*")
    made = {int(folder.name.removeprefix("rows-")) for folder in folders}
    return [*config.max_lengths, *sorted(made - set(config.max_lengths))]


def withdraw_what_is_stale(config: DataPrep, keys: Mapping[str, str], settings: Settings) -> None:
    """Say in a line on stderr which results of earlier runs go, and because of which settings.

    Data sets that would be made otherwise now lose their manifests.
    """
    out = config.out_dir
    path = out / SETTINGS_FILE
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stages = {name: Stage(out, name, key, []) for name, key in keys.items()}
    stale = [name for name, stage in stages.items() if stage.is_stale()]
    if stale:
        _announce(config, stale, _changed(stale, earlier, settings))
    for name in stale:
        stages[name].withdraw_manifest()
    write_json(path, earlier | settings)


def _changed(stale: Sequence[str], earlier: Mapping[str, Any], settings: Settings) -> set[str]:
    return {
        setting
        for name in stale
        for setting, value in settings[name].items()
        if earlier.get(name, {}).get(setting, value) != value
    }


def _announce(config: DataPrep, stale: Sequence[str], changed: set[str]) -> None:
    others = set(all_lengths(config)) - set(config.max_lengths)
    gone = [f"rows-{length}" for length in sorted(others) if f"rows-{length}" in stale]
    of_others = {f"{kind}-{length}" for kind in ("plan", "rows") for length in others}
    again = [name for name in stale if name not in of_others]
    print(
        f"data_prep: {config.out_dir}: other {', '.join(sorted(changed)) or 'settings'} than "
        f"before; made again: {', '.join(again) or 'nothing'}"
        + (f"; no data set any more: {', '.join(gone)}" if gone else ""),
        file=sys.stderr,
        flush=True,
    )
